"""Settings of the images: those that all sources share, and a section for the options of each source."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from rqgen.config import check_bounds, check_seeds, fill_sections, open_sections, shorthands, to_dict

from .datasets import ImageDataset, Split, check_split
from .sources import SOURCES


@open_sections(SOURCES, chosen_by="source")
@dataclass
class DataConfig:
    """The images, their size, and their split.

    ``held_out_fraction`` of every class is set aside by a shuffle that depends only on ``split_seed`` (of a folder by
    the names of the images and ``split_seed``): whoever reads the same source with the same seed gets the same split.
    """

    # Keys of configurations and models that were written before each source had its section.
    moved: ClassVar[dict[str, str]] = {
        "fit": "folder.fit",
        "background": "folder.background",
        "on_broken": "folder.on_broken",
        "crops_per_epoch": "photos.crops_per_epoch",
    }

    source: str = "digits"
    """The source of the images, see `rqgen list sources`. data.folder=PATH implies "folder"."""
    classes: list[str] | None = None
    """Only these classes, numbered in this order (None: all, in the order of their names)."""
    resolution: int = None  # type: ignore[assignment]  # filled in below
    """Side of the square images in pixels. Default: the source's, 32 for those that come with rqgen. A tokenizer's
    model follows."""
    channels: Literal[1, 3] | None = None
    """1 (grey) or 3 (colour). None: the source's, 1 for digits, 3 for photographs and folders. A tokenizer's model
    follows."""
    held_out_fraction: float = 1 / 6
    """The share of every class that trains nothing; of a folder about this share, see data.folder.split."""
    split_seed: int = 0
    """Seed of the split, and of random crops, flips and shifts."""
    horizontal_flip: bool = False
    """Mirror half of the training images."""
    shift: int = 0
    """Move training images by up to this many pixels, up or down and left or right; the border is repeated."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the chosen source by its name, and of others where they were given."""

    def __post_init__(self) -> None:
        fill_sections(self)
        source = SOURCES.find(self.source, "source")
        if self.resolution is None:
            self.resolution = source.resolution
        if self.channels is None:
            self.channels = source.channels
        check_bounds(self, resolution=(1, source.max_resolution))
        check_seeds(self, "split_seed")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction: expected 0 <= fraction < 1, got {self.held_out_fraction}")
        if not 0 <= self.shift < self.resolution:
            raise ValueError(f"shift: expected 0 <= shift < resolution ({self.resolution}), got {self.shift}")

    @property
    def channel_count(self) -> int:
        """`channels`, the source's default filled in."""
        assert self.channels is not None  # see __post_init__
        return self.channels

    @property
    def place(self) -> tuple[str, Any]:
        """The source, and the value of its section's shorthand (the path of a folder; None without a shorthand).
        Settings of the same place read the same images."""
        return self.source, place_of(self.source, self.options.get(self.source))

    def idle_options(self) -> dict[str, Any]:
        """Dotted path -> value of options of other sources than the chosen one: they have no effect."""
        idle = {name: options for name, options in self.options.items() if name != self.source}
        return {
            f"{name}.{key}": value
            for name, options in idle.items()
            for key, value in to_dict(options).items()
            if value != to_dict(type(options)())[key]
        }


def saved_settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of images as a run or a model saved them, for `from_dict`, with what older versions did not say: they
    split a folder by the order of its files."""
    folder = plain.get("folder")
    if isinstance(folder, str):
        folder = {"path": folder}
    if isinstance(folder, Mapping) and "split" not in folder:
        return {**plain, "folder": {**folder, "split": "order"}}
    return dict(plain)


def place_of(source: str, options: Any) -> Any:
    """The value of the shorthand of a source's options, links of a path resolved; None without a shorthand."""
    path = shorthands(DataConfig).get(source)
    value = None if path is None or options is None else getattr(options, path.partition(".")[2])
    return Path(os.path.realpath(value)) if isinstance(value, Path) else value


def open_dataset(config: DataConfig, split: Split) -> ImageDataset:
    """The images of one split.

    Raises:
        TypeError, ValueError: settings that are wrong by now.
        FileNotFoundError, ValueError: nothing to read.

        A message about a setting opens with its name, `data.NAME`.
    """
    check_split(split)
    with _naming_data():
        config = replace(config)  # checks again: a field may have been set since
        dataset = SOURCES.find(config.source, "source").open(config, config.options.get(config.source), split)
        if split == "train" and len(dataset) == 0:
            raise ValueError(f"held_out_fraction: {config.held_out_fraction} leaves no images to train on")
    return dataset


@contextlib.contextmanager
def _naming_data() -> Iterator[None]:
    """Make an error that opens with a setting of the images, such as "folder.path: ...", open with "data."."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        if len(error.args) == 1 and isinstance(told := error.args[0], str):
            found = re.match(r"(\w+)[.\w[\]]*: ", told)
            names = {one.name for one in fields(DataConfig)} | set(SOURCES.sections())
            if found is not None and found[1] in names:
                error.args = (f"data.{told}",)
        raise
