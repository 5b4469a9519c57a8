"""Where images come from: `digits`, `photos`, or a folder.

Every dataset answers ``item(index, epoch) -> (image, label)``: the image a float32 tensor (channels, H, W) in
[-1, 1], the label an int (-1 where there are no classes). What is random in an item (a crop, a flip) is drawn
from a generator seeded by (seed, epoch, index) alone: the same whatever was read before, by whichever worker,
in a resumed run too.
"""

from __future__ import annotations

import difflib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from rqgen.config import check_finite

logger = logging.getLogger(__name__)

Split = Literal["train", "held_out", "all"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
NO_LABEL = -1


@dataclass
class DataConfig:
    """Which images, at which size, and how they are split.

    ``held_out_fraction`` of every class is set aside by a shuffle that depends only on ``split_seed``:
    whoever reads the same source with the same seed gets the same split.
    """

    source: Literal["digits", "photos", "folder"] = "digits"
    folder: Path | None = None
    """The folder of images, for source "folder": its sub-folders are the classes."""
    classes: list[str] | None = None
    """Only these classes, numbered in this order (None: all, in the order of their names)."""
    resolution: int = 32
    channels: int = 1
    """1 (grey) or 3 (colour)."""
    fit: Literal["crop", "enlarge", "exact"] = "crop"
    """Folder images of another size: "crop" shrinks the shorter side and takes the centre, and refuses
    smaller images; "enlarge" accepts those too; "exact" refuses every other size."""
    on_broken: Literal["fail", "skip"] = "fail"
    """An image file that cannot be decoded ends the run, or is named and left out."""
    held_out_fraction: float = 1 / 6
    split_seed: int = 0
    horizontal_flip: bool = False
    """Mirror half of the training images."""
    shift: int = 0
    """Move training images by up to so many pixels, up or down and left or right; the border is repeated."""
    crops_per_epoch: int = 1024
    """Source "photos": how many random crops make an epoch."""

    def __post_init__(self) -> None:
        check_finite(self)
        if self.resolution < 1:
            raise ValueError(f"resolution: expected a positive number of pixels, got {self.resolution}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 (grey) or 3 (colour), got {self.channels}")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction: expected 0 <= fraction < 1, got {self.held_out_fraction}")
        if not 0 <= self.shift < self.resolution:
            raise ValueError(f"shift: expected 0 <= shift < resolution ({self.resolution}), got {self.shift}")
        if self.crops_per_epoch < 1:
            raise ValueError(f"crops_per_epoch: expected at least 1, got {self.crops_per_epoch}")
        if (self.source == "folder") != (self.folder is not None):
            raise ValueError(f"folder: expected a path for source 'folder' and none otherwise, got {self.folder}")


class ImageDataset(ABC):
    """Images with labels. ``class_names`` is empty where there are no classes; ``varies`` says whether an item
    differs from epoch to epoch (random crops, flips)."""

    class_names: tuple[str, ...] = ()
    varies: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item(self, index: int, epoch: int) -> tuple[torch.Tensor, int]:
        """The image (channels, H, W) in [-1, 1] and its label, as drawn in this epoch."""


def open_dataset(config: DataConfig, split: Split) -> ImageDataset:
    """The images of one split. Raises FileNotFoundError or ValueError where there is nothing to read."""
    if config.source == "digits":
        return DigitImages(config, split)
    if config.source == "photos":
        return PhotoCrops(config, split)
    return FolderImages(config, split)


def stratified_split(labels: Sequence[int], fraction: float, seed: int, split: Split) -> list[int]:
    """Indices of one split, ascending: ``round(fraction * n)`` of every class's n items are held out."""
    if split == "all":
        return list(range(len(labels)))
    generator = np.random.default_rng(seed)
    labels_n = np.asarray(labels)
    held_out: set[int] = set()
    for label in np.unique(labels_n):
        members = generator.permutation(np.flatnonzero(labels_n == label))
        held_out.update(members[: round(fraction * len(members))].tolist())
    return [index for index in range(len(labels)) if (index in held_out) == (split == "held_out")]


class DigitImages(ImageDataset):
    """scikit-learn's 1,797 handwritten digits (8x8, values 0..16), enlarged (Lanczos); kept in memory."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        names = [str(digit) for digit in range(10)]
        self.class_names, chosen = _choose_classes(names, config.classes, "digits")
        indices = [index for index, label in enumerate(digits.target) if int(label) in chosen]
        labels = [chosen[int(digits.target[index])] for index in indices]
        keep = stratified_split(labels, config.held_out_fraction, config.split_seed, split)
        size = (config.resolution, config.resolution)
        small_nhw = digits.images.astype(np.float32) / 8 - 1
        enlarged = [
            np.asarray(Image.fromarray(small_nhw[indices[i]]).resize(size, Image.Resampling.LANCZOS)) for i in keep
        ]
        images_n1hw = torch.from_numpy(np.stack(enlarged)).clamp_(-1, 1).unsqueeze(1)
        self.images = images_n1hw.expand(-1, config.channels, -1, -1).contiguous()
        self.labels = torch.tensor([labels[i] for i in keep])
        self._augment = _Augmentation(config, split)
        self.varies = self._augment.on

    def __len__(self) -> int:
        return len(self.images)

    def item(self, index: int, epoch: int) -> tuple[torch.Tensor, int]:
        return self._augment(self.images[index], index, epoch), int(self.labels[index])


class PhotoCrops(ImageDataset):
    """Random square crops of scikit-learn's two photographs, of any side from the resolution to the
    photograph's height, shrunk to the resolution. Held-out crops come from the right-hand part of each
    photograph, which training crops never touch. The class is the photograph."""

    varies = True

    def __init__(self, config: DataConfig, split: Split) -> None:
        from sklearn.datasets import load_sample_images

        sample = load_sample_images()
        names = [Path(name).stem for name in sample.filenames]
        self.class_names, chosen = _choose_classes(names, config.classes, "photos")
        self._regions: list[Image.Image] = [Image.new("L", (1, 1))] * len(chosen)
        for position, label in chosen.items():
            photo = Image.fromarray(sample.images[position]).convert(_mode(config.channels))
            border = photo.width - round(config.held_out_fraction * photo.width)
            left, right = {"train": (0, border), "held_out": (border, photo.width), "all": (0, photo.width)}[split]
            if min(right - left, photo.height) < config.resolution:
                raise ValueError(
                    f"resolution: the {split} part of photograph '{names[position]}' is "
                    f"{right - left}x{photo.height} pixels, too small for crops of side {config.resolution}"
                )
            self._regions[label] = photo.crop((left, 0, right, photo.height))
        self._config = config
        self._augment = _Augmentation(config, split)

    def __len__(self) -> int:
        return self._config.crops_per_epoch

    def item(self, index: int, epoch: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 <= index < {len(self)}, got {index}")
        label = index % len(self._regions)
        region = self._regions[label]
        draw = _item_generator(self._config.split_seed, epoch, index, stream=1)
        side = int(draw.integers(self._config.resolution, min(region.size) + 1))
        left = int(draw.integers(0, region.width - side + 1))
        top = int(draw.integers(0, region.height - side + 1))
        crop = region.crop((left, top, left + side, top + side))
        size = (self._config.resolution, self._config.resolution)
        return self._augment(_to_tensor(crop.resize(size, Image.Resampling.LANCZOS)), index, epoch), label


class FolderImages(ImageDataset):
    """Every image below a folder. Sub-folders are classes, numbered in the order of their names; images that
    lie directly in a folder without sub-folders have no class. All files are decoded once at the start, in
    parallel: a broken file shows up before the training does."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        assert config.folder is not None  # DataConfig holds this
        folder = config.folder
        if not folder.is_dir():
            raise FileNotFoundError(f"image folder not found: {folder}")
        self._config = config
        folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        loose = _image_files(folder, recursive=False)
        if folders and loose:
            raise ValueError(
                f"{folder}: holds both class folders and loose images ({loose[0].name}, ...); "
                "put every image into a class folder, or none"
            )
        if folders:
            names = [path.name for path in folders]
            self.class_names, chosen = _choose_classes(names, config.classes, str(folder))
            files = [(path, chosen[i]) for i in chosen for path in _image_files(folders[i], recursive=True)]
        else:
            if config.classes is not None:
                raise ValueError(f"classes: {folder} has no class folders, so classes cannot be chosen")
            files = [(path, NO_LABEL) for path in loose]
        if not files:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"{folder}: no image files found (looked for {kinds})")
        keep = stratified_split([label for _, label in files], config.held_out_fraction, config.split_seed, split)
        self.files = self._readable([files[i] for i in keep])
        if keep and not self.files:
            raise ValueError(f"{folder}: none of its image files can be read")
        self._augment = _Augmentation(config, split)
        self.varies = self._augment.on

    def __len__(self) -> int:
        return len(self.files)

    def item(self, index: int, epoch: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[index]
        return self._augment(_to_tensor(self._fit(path, self._open(path))), index, epoch), label

    def _readable(self, files: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
        with ThreadPoolExecutor() as pool:
            faults = list(pool.map(self._fault, (path for path, _ in files)))
        for (path, _), fault in zip(files, faults, strict=True):
            if fault is not None and self._config.on_broken == "fail":
                raise ValueError(f"{path}: broken image file ({fault}); on_broken=skip leaves such files out")
            if fault is not None:
                logger.warning("skipped broken image file %s (%s)", path, fault)
        return [file for file, fault in zip(files, faults, strict=True) if fault is None]

    def _fault(self, path: Path) -> str | None:
        try:
            image = self._open(path)
        except Exception as error:  # each format's decoder fails in its own ways
            return f"{type(error).__name__}: {error}".replace(f" {str(path)!r}", "")
        self._fit(path, image)
        return None

    def _open(self, path: Path) -> Image.Image:
        with Image.open(path) as opened:
            return opened.convert(_mode(self._config.channels))

    def _fit(self, path: Path, image: Image.Image) -> Image.Image:
        side, fit = self._config.resolution, self._config.fit
        size = f"{path}: image is {image.width}x{image.height} pixels"
        if fit == "exact" and image.size != (side, side):
            raise ValueError(f"{size}, expected exactly {side}x{side} (fit=exact)")
        if fit == "crop" and min(image.size) < side:
            raise ValueError(f"{size}, smaller than {side}x{side}; fit=enlarge accepts such images")
        scale = side / min(image.size)
        width, height = max(side, round(image.width * scale)), max(side, round(image.height * scale))
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))


class _Augmentation:
    """Mirrors every other training image and moves it, by draws that depend on (seed, epoch, index)."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        training = split == "train"
        self._flip, self._shift = training and config.horizontal_flip, config.shift if training else 0
        self.on = self._flip or self._shift > 0
        self._seed = config.split_seed

    def __call__(self, image_chw: torch.Tensor, index: int, epoch: int) -> torch.Tensor:
        if self._flip and _item_generator(self._seed, epoch, index, stream=0).random() < 0.5:
            image_chw = image_chw.flip(-1)
        if self._shift:
            draw = _item_generator(self._seed, epoch, index, stream=2)
            down, right = draw.integers(-self._shift, self._shift + 1, size=2).tolist()
            rows, columns = (torch.arange(side) for side in image_chw.shape[1:])
            rows, columns = (rows - down).clamp(0, len(rows) - 1), (columns - right).clamp(0, len(columns) - 1)
            image_chw = image_chw[:, rows.unsqueeze(1), columns]
        return image_chw


def _choose_classes(names: list[str], wanted: list[str] | None, where: str) -> tuple[tuple[str, ...], dict[int, int]]:
    """The class names in use, and for each used position in ``names`` the label it gets."""
    if wanted is None:
        return tuple(names), {position: position for position in range(len(names))}
    if len(set(wanted)) != len(wanted) or not wanted:
        raise ValueError(f"classes: expected a list of different class names, got {wanted}")
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(names[:20])}"
            raise ValueError(f"classes: unknown class '{name}' in {where}; {hint}")
    return tuple(wanted), {names.index(name): label for label, name in enumerate(wanted)}


def _image_files(folder: Path, *, recursive: bool) -> list[Path]:
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def read_image(path: Path, *, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """One image file as float32 (channels, H, W) in [-1, 1].

    Raises FileNotFoundError, or ValueError for a file that is no image or an image of another size.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image file not found: {path}")
    try:
        with Image.open(path) as opened:
            image = opened.convert(_mode(channels))
    except Exception as error:  # each format's decoder fails in its own ways
        raise ValueError(f"{path}: not a readable image ({type(error).__name__}: {error})") from error
    if (image.height, image.width) != size:
        raise ValueError(f"{path}: expected {size[1]}x{size[0]} pixels, got {image.width}x{image.height}")
    return _to_tensor(image)


def _item_generator(seed: int, epoch: int, index: int, *, stream: int) -> np.random.Generator:
    return np.random.default_rng((seed, epoch, index, stream))


def _mode(channels: int) -> str:
    return "L" if channels == 1 else "RGB"


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """(H, W) or (H, W, 3) bytes -> float32 (channels, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
