"""Where images come from: `digits`, `photos`, or a folder.

Every dataset answers ``item(index, epoch) -> (image, label)``: the image a float32 tensor (channels, H, W) in
[-1, 1], the label an int (-1 where there are no classes). What is random in an item (a crop, a flip) is drawn
from a generator seeded by (seed, epoch, index) alone: the same whatever was read before, by whichever worker,
in a resumed run too.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from rqgen.checks import DIGIT_NAMES, find_name
from rqgen.config import Given, check_bounds, check_seeds, did_you_mean

from .pictures import Picture, PictureError, open_picture, parse_colour

logger = logging.getLogger(__name__)

Split = Literal["train", "held_out", "all"]

IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
        *(".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    }
)
NO_LABEL = -1


@dataclass
class DataConfig:
    """Which images, at which size, and how they are split.

    ``held_out_fraction`` of every class is set aside by a shuffle that depends only on ``split_seed``:
    whoever reads the same source with the same seed gets the same split.
    """

    source: Literal["digits", "photos", "folder"] = "digits"
    """scikit-learn's handwritten digits, random crops of its two photographs, or a folder of images."""
    folder: Path | None = None
    """The folder of images, for source "folder" (which follows from it): its sub-folders are the classes."""
    classes: list[str] | None = None
    """Only these classes, numbered in this order (None: all, in the order of their names)."""
    resolution: int = 32
    """Side of the square images in pixels. A tokenizer's model follows."""
    channels: Literal[1, 3] | None = None
    """1 (grey) or 3 (colour). None: 1 for digits, 3 for photographs and folders. A tokenizer's model follows."""
    fit: Literal["crop", "enlarge", "exact"] = "crop"
    """Folder images of another size: "crop" shrinks the shorter side and takes the centre, and refuses
    smaller images; "enlarge" accepts those too; "exact" refuses every other size."""
    background: str = "white"
    """What shows through transparent pixels of folder images: the name of a colour, or "#rrggbb"."""
    on_broken: Literal["fail", "skip"] = "fail"
    """An image file that cannot be decoded ends the run, or is named and left out."""
    held_out_fraction: float = 1 / 6
    """The share of every class that trains nothing."""
    split_seed: int = 0
    """Of the split, and of random crops, flips and shifts."""
    horizontal_flip: bool = False
    """Mirror half of the training images."""
    shift: int = 0
    """Move training images by up to so many pixels, up or down and left or right; the border is repeated."""
    crops_per_epoch: int = 1024
    """Source "photos": how many random crops make an epoch."""

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"resolution: expected a positive number of pixels, got {self.resolution}")
        # Digits are enlarged from 8x8 and kept in memory, all of them.
        check_bounds(self, resolution=(1, 512 if self.source == "digits" else 16384), crops_per_epoch=(1, 10**7))
        check_seeds(self, "split_seed")
        if self.channels is None:
            self.channels = 1 if self.source == "digits" else 3
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 (grey) or 3 (colour), got {self.channels}")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction: expected 0 <= fraction < 1, got {self.held_out_fraction}")
        if not 0 <= self.shift < self.resolution:
            raise ValueError(f"shift: expected 0 <= shift < resolution ({self.resolution}), got {self.shift}")
        parse_colour(self.background)
        if (self.source == "folder") != (self.folder is not None):
            raise ValueError(f"folder: expected a path for source 'folder' and none otherwise, got {self.folder}")

    @classmethod
    def implied(cls, given: Given[DataConfig]) -> dict[str, Any]:
        """Whoever gives a folder means it."""
        return {"source": "folder"} if given.read("folder") is not None else {}


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
    kinds: dict[str, Callable[[DataConfig, Split], ImageDataset]]
    kinds = {"digits": DigitImages, "photos": PhotoCrops, "folder": FolderImages}
    dataset = kinds[config.source](config, split)
    if split == "train" and len(dataset) == 0:
        raise ValueError(f"held_out_fraction: {config.held_out_fraction} leaves no images to train on")
    return dataset


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
    """scikit-learn's 1,797 handwritten digits (8x8, values 0..16), enlarged (Lanczos); kept in memory. Classes are
    called "zero" to "nine"; numerals name them too."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.class_names, chosen = _choose_classes(list(DIGIT_NAMES), config.classes, "digits")
        indices = [index for index, label in enumerate(digits.target) if int(label) in chosen]
        labels = [chosen[int(digits.target[index])] for index in indices]
        keep = stratified_split(labels, config.held_out_fraction, config.split_seed, split)
        size = (config.resolution, config.resolution)
        small_nhw = digits.images.astype(np.float32) / 8 - 1
        enlarged = [
            np.asarray(Image.fromarray(small_nhw[indices[i]]).resize(size, Image.Resampling.LANCZOS)) for i in keep
        ]
        images_n1hw = torch.from_numpy(np.reshape(enlarged, (-1, 1, *size)).astype(np.float32)).clamp_(-1, 1)
        self.images = images_n1hw.expand(-1, config.channels, -1, -1).contiguous()
        self.labels = torch.tensor([labels[i] for i in keep], dtype=torch.int64)
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
            photo = Image.fromarray(sample.images[position]).convert("L" if config.channels == 1 else "RGB")
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
        picture = Picture([crop.resize(size, Image.Resampling.LANCZOS)], more_frames=False)
        return self._augment(picture.tensor(self._config.channels), index, epoch), label


class FolderImages(ImageDataset):
    """Every image below a folder, as `rqgen.data.read_image` reads it. Sub-folders with images are classes, numbered in
    the order of their names; images that lie directly in a folder without such sub-folders have no class.

    Skipped, and counted in one log line: hidden files and folders, folders without images or named like one, links that
    lead nowhere or to a folder already read, folders that cannot be read, files that are not images.
    All image files are decoded once at the start, in parallel: a broken one shows up before the training does.
    """

    def __init__(self, config: DataConfig, split: Split) -> None:
        assert config.folder is not None  # DataConfig holds this
        folder = config.folder
        if not folder.is_dir():
            raise FileNotFoundError(f"image folder not found: {folder}")
        self._config, self._background = config, parse_colour(config.background)
        found = _FolderScan(folder)
        classes, loose = found.classes, found.loose
        if classes and loose:
            raise ValueError(
                f"{folder}: holds both class folders and loose images ({loose[0].name}, ...); "
                "put every image into a class folder, or none"
            )
        if classes:
            names = list(classes)
            self.class_names, chosen = _choose_classes(names, config.classes, str(folder))
            files = [(path, chosen[i]) for i in chosen for path in classes[names[i]]]
        else:
            if config.classes is not None:
                raise ValueError(f"classes: {folder} has no class folders, so classes cannot be chosen")
            files = [(path, NO_LABEL) for path in loose]
        if not files:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            skipped = f"; skipped {found.skipped}" if found.skipped else ""
            raise ValueError(f"{folder}: no image files found (looked for {kinds}){skipped}")
        if found.skipped:
            _warn_once(f"{folder}: skipped {found.skipped}")
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
        picture = self._fit(path, self._open(path))
        return self._augment(picture.tensor(self._config.channels), index, epoch), label

    def _readable(self, files: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
        with ThreadPoolExecutor() as pool:
            checked = list(pool.map(self._check, (path for path, _ in files)))
        for fault, _ in checked:
            if fault is not None and self._config.on_broken == "fail":
                raise ValueError(
                    f"{fault.path}: broken image file ({fault.reason}); on_broken=skip leaves such files out"
                )
            if fault is not None:
                logger.warning("skipped broken image file %s (%s)", fault.path, fault.reason)
        if frames := [path for (path, _), (_, more) in zip(files, checked, strict=True) if more]:
            _warn_once(
                f"{self._config.folder}: files with several frames, of which the first is read: {len(frames)} "
                f"({frames[0].name})"
            )
        return [file for file, (fault, _) in zip(files, checked, strict=True) if fault is None]

    def _check(self, path: Path) -> tuple[PictureError | None, bool]:
        """What keeps a file from being read, and whether it holds more than its first frame."""
        try:
            picture = self._open(path)
        except PictureError as error:
            return error, False
        self._fit(path, picture)
        return None, picture.more_frames

    def _open(self, path: Path) -> Picture:
        return open_picture(path, channels=self._config.channels, background=self._background)

    def _fit(self, path: Path, picture: Picture) -> Picture:
        side, fit = self._config.resolution, self._config.fit
        given_width, given_height = picture.size
        size = f"{path}: image is {given_width}x{given_height} pixels"
        if fit == "exact" and picture.size != (side, side):
            raise ValueError(f"{size}, expected exactly {side}x{side} (fit=exact)")
        if fit == "crop" and min(picture.size) < side:
            raise ValueError(f"{size}, smaller than {side}x{side}; fit=enlarge accepts such images")
        scale = side / min(picture.size)
        width, height = max(side, round(given_width * scale)), max(side, round(given_height * scale))
        if picture.size != (width, height):
            method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
            picture = picture.map(lambda plane: plane.resize((width, height), method))
        left, top = (width - side) // 2, (height - side) // 2
        return picture.map(lambda plane: plane.crop((left, top, left + side, top + side)))


class _FolderScan:
    """The images below a folder by class, those that lie directly in it, and what was skipped."""

    def __init__(self, folder: Path) -> None:
        self._top = folder
        self._skipped: dict[str, list[str]] = {}
        self._named: set[str] = set()
        self.loose: list[Path] = []
        self.classes: dict[str, list[Path]] = {}
        """Class name -> its images, at any depth, sorted; in the order of the names, none empty."""
        folders, self.loose = self._entries(folder)
        for path in folders:
            if images := sorted(self._images_below(path, {_identity(folder)})):
                self.classes[path.name] = images
            else:
                self._skip("folders without images", path)

    @property
    def skipped(self) -> str:
        """How many of which kind, each with an example; empty where nothing was."""
        return ", ".join(f"{kind}: {len(names)} ({names[0]})" for kind, names in self._skipped.items())

    def _images_below(self, folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
        identity = _identity(folder)
        if identity in seen:
            self._skip("links to folders already read", folder)
            return
        seen.add(identity)
        folders, images = self._entries(folder)
        yield from images
        for path in folders:
            yield from self._images_below(path, seen)

    def _entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Sub-folders to look into and image files, both sorted by name."""
        found: dict[str, list[Path]] = {"folder": [], "image": []}
        try:
            for path in sorted(folder.iterdir()):
                kind = _kind(path)
                if kind in found:
                    found[kind].append(path)
                else:
                    self._skip(kind, path)
        except OSError:
            self._skip("folders that cannot be read", folder)
        return found["folder"], found["image"]

    def _skip(self, kind: str, path: Path) -> None:
        name = str(path.relative_to(self._top))
        if name not in self._named:
            self._named.add(name)
            self._skipped.setdefault(kind, []).append(name)


def _kind(path: Path) -> str:
    """ "folder", "image", or what it is that is skipped."""
    named_image = path.suffix.lower() in IMAGE_SUFFIXES
    if path.name.startswith("."):
        return "hidden files and folders"
    if path.is_dir():
        return "folders named like an image" if named_image else "folder"
    if not path.exists():
        return "links that lead nowhere"
    return "image" if named_image and path.is_file() else "other files"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


@functools.cache
def _warn_once(message: str) -> None:
    """A run opens its folder for training and again for held-out images: one line is enough."""
    logger.warning(message)


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
    positions = {name: find_name(name, names) for name in wanted}
    for name, position in positions.items():
        if position is None:
            raise ValueError(f"classes: unknown class '{name}' in {where}; {did_you_mean(name, names)}")
    chosen = {position: label for label, position in enumerate(positions.values()) if position is not None}
    if len(chosen) != len(wanted) or not wanted:
        raise ValueError(f"classes: expected a list of different class names, got {wanted}")
    return tuple(names[position] for position in chosen), chosen


def _item_generator(seed: int, epoch: int, index: int, *, stream: int) -> np.random.Generator:
    return np.random.default_rng((seed, epoch, index, stream))
