"""Datasets of images: the split, the choice of classes, and random variations of training images.

Every dataset answers ``item(index, epoch) -> (image, label)``: the image a float32 tensor (channels, H, W) in
[-1, 1], the label an int (-1 where there are no classes). Random parts of an item (a crop, a flip) are sampled
from a generator seeded by (seed, epoch, index) alone: they do not depend on what was read before, nor on the worker
that reads, and are the same in a resumed run.
"""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from rqgen.checks import find_name
from rqgen.config import did_you_mean, one_of

if TYPE_CHECKING:
    from .settings import DataConfig

Split = Literal["train", "held_out", "all"]
NO_LABEL = -1


class ImageDataset(ABC):
    """Images with labels. ``class_names`` is empty where there are no classes; ``varies`` says whether an item
    differs from epoch to epoch (random crops, flips)."""

    class_names: tuple[str, ...] = ()
    varies: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, index: int, epoch: int) -> tuple[torch.Tensor, int]:
        """The image (channels, H, W) in [-1, 1] and its label, as sampled for this epoch."""

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these images from others, as plain data: a training run keeps it until it is resumed.
        ``images`` is their number, ``classes`` that of classes."""
        return {"images": len(self), "classes": len(self.class_names)}


def check_split(split: str) -> None:
    """Raise ValueError for anything but the name of a split."""
    if split not in (names := get_args(Split)):
        raise ValueError(f"split: {one_of(names, split)}")


def stratified_split(labels: Sequence[int], fraction: float, seed: int, split: Split) -> list[int]:
    """Indices of one split, ascending: ``round(fraction * n)`` of every class's n items are held out."""
    check_split(split)
    if split == "all":
        return list(range(len(labels)))
    generator = np.random.default_rng(seed)
    labels_n = np.asarray(labels)
    held_out: set[int] = set()
    for label in np.unique(labels_n):
        members = generator.permutation(np.flatnonzero(labels_n == label))
        held_out.update(members[: round(fraction * len(members))].tolist())
    return [index for index in range(len(labels)) if (index in held_out) == (split == "held_out")]


def split_by_name(names: Sequence[str], fraction: float, seed: int, split: Split) -> list[int]:
    """Indices of one split, ascending. An item is held out where the hash of its name and the seed falls below
    ``fraction``: it stays where it is when others come or go."""
    check_split(split)
    if split == "all":
        return list(range(len(names)))
    held_out = [_place_of_name(name, seed) < fraction for name in names]
    return [index for index, is_held_out in enumerate(held_out) if is_held_out == (split == "held_out")]


def _place_of_name(name: str, seed: int) -> float:
    """Return a number in [0, 1) that looks uniform. File systems differ in how they write one letter: NFC counts."""
    text = f"{seed}/{unicodedata.normalize('NFC', name)}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def fingerprint(names: Sequence[str]) -> str:
    """The first 16 hex digits of SHA-256 over names in their order."""
    text = "\0".join(names)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def choose_classes(
    names: Sequence[str], wanted: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], dict[int, int]]:
    """The class names in use, and for each used position in ``names`` the label it gets. ``wanted`` as
    `DataConfig.classes`; names are found as `rqgen.checks.find_name` does. Raise ValueError for a name that is not
    there, suggesting the nearest."""
    if wanted is None:
        return tuple(names), {position: position for position in range(len(names))}
    positions = {name: find_name(name, names) for name in wanted}
    for name, position in positions.items():
        if position is None:
            raise ValueError(f"classes: unknown class '{name}' in {where}; {did_you_mean(name, names)}")
    chosen = {position: label for label, position in enumerate(positions.values()) if position is not None}
    if len(chosen) != len(wanted) or not wanted:
        raise ValueError(f"classes: expected a list of different class names, got {wanted}")
    return tuple(names[position] for position in chosen), chosen


def item_generator(seed: int, epoch: int, index: int, *, stream: int) -> np.random.Generator:
    """Return the generator of the random parts of one item. Streams 0 and 2 are `Augmentation`'s."""
    return np.random.default_rng((seed, epoch, index, stream))


class Augmentation:
    """Mirror half of the training images and move them, as ``config`` says, by random numbers that depend on (seed,
    epoch, index) alone. ``on`` is False where it changes no image of this split."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        training = split == "train"
        self._flip, self._shift = training and config.horizontal_flip, config.shift if training else 0
        self.on = self._flip or self._shift > 0
        self._seed = config.split_seed

    def __call__(self, image_chw: torch.Tensor, index: int, epoch: int) -> torch.Tensor:
        if self._flip and item_generator(self._seed, epoch, index, stream=0).random() < 0.5:
            image_chw = image_chw.flip(-1)
        if self._shift:
            generator = item_generator(self._seed, epoch, index, stream=2)
            down, right = generator.integers(-self._shift, self._shift + 1, size=2).tolist()
            rows, columns = (torch.arange(side) for side in image_chw.shape[1:])
            rows, columns = (rows - down).clamp(0, len(rows) - 1), (columns - right).clamp(0, len(columns) - 1)
            image_chw = image_chw[:, rows.unsqueeze(1), columns]
        return image_chw
