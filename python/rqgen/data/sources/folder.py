"""A folder of images."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from PIL import Image

from rqgen.config import check_fields

from ..datasets import (
    NO_LABEL,
    Augmentation,
    ImageDataset,
    Split,
    choose_classes,
    fingerprint,
    split_by_name,
    stratified_split,
)
from ..pictures import Picture, PictureError, open_picture, parse_colour
from . import Source, register

if TYPE_CHECKING:
    from ..settings import DataConfig

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
        *(".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    }
)

# Folders of thumbnails, resource forks and deleted files that operating systems and servers put among the images.
_FOREIGN_FOLDERS = frozenset({"@eadir", "__macosx", "$recycle.bin", "system volume information", "lost+found"})


@dataclass
class FolderOptions:
    """Options of source "folder"; data.folder=PATH is short for data.folder.path=PATH."""

    shorthand: ClassVar[str] = "path"

    path: Path | None = None
    """The folder of images; its sub-folders are the classes. A path implies data.source=folder."""
    fit: Literal["crop", "enlarge", "exact"] = "crop"
    """Images of another size: "crop" shrinks the shorter side and takes the centre, and refuses
    smaller images; "enlarge" accepts those too; "exact" refuses every other size."""
    background: str = "white"
    """The colour behind transparent pixels: its name, or "#rrggbb"."""
    on_broken: Literal["fail", "skip"] = "fail"
    """An image file that cannot be decoded, or of a size that `fit` refuses, ends the run, or is named and left out."""
    split: Literal["name", "order"] = "name"
    """"name": an image is held out by the hash of its path in the folder, so that it stays in its part when images are
    added. "order": by a shuffle of the list of files, as older versions did; adding images changes all of it."""

    def __post_init__(self) -> None:
        check_fields(self)
        parse_colour(self.background)


@register
class Folder(Source):
    """Every image below a folder, whose sub-folders are the classes."""

    name = "folder"
    options = FolderOptions

    def open(self, config: DataConfig, options: FolderOptions, split: Split) -> FolderImages:
        return FolderImages(config, options, split)


class FolderImages(ImageDataset):
    """Every image below a folder, as `rqgen.data.read_image` reads it. Sub-folders with images are classes, numbered in
    the order of their names; images that lie directly in a folder without such sub-folders have no class.

    Skipped, and counted in one log line: hidden files and folders, folders that other programs make (`@eaDir`,
    `__MACOSX`), folders without images or named like one, links that lead nowhere or to a folder already read, folders
    that cannot be read, files that are not images.
    All image files are decoded once at the start, in parallel: a broken one shows up before the training does.
    """

    def __init__(self, config: DataConfig, options: FolderOptions, split: Split) -> None:
        assert options.path is not None  # DataConfig holds this
        folder = options.path
        if not folder.is_dir():
            raise FileNotFoundError(f"folder.path: no folder {folder}")
        self._config, self._options, self._background = config, options, parse_colour(options.background)
        found = _FolderScan(folder)
        classes, loose = found.classes, found.loose
        if classes and loose:
            raise ValueError(
                f"{folder}: holds both class folders and loose images ({loose[0].name}, ...); "
                "put every image into a class folder, or none"
            )
        if classes:
            names = list(classes)
            self.class_names, chosen = choose_classes(names, config.classes, str(folder))
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
        if options.split == "name":
            paths = [self._name(path) for path, _ in files]
            keep = split_by_name(paths, config.held_out_fraction, config.split_seed, split)
        else:
            keep = stratified_split([label for _, label in files], config.held_out_fraction, config.split_seed, split)
        self.files = self._readable([files[i] for i in keep])
        if keep and not self.files:
            raise ValueError(f"{folder}: none of its image files can be read")
        if split == "train":
            there = {label for _, label in self.files}
            if empty := [name for label, name in enumerate(self.class_names) if label not in there]:
                _warn_once(f"{folder}: classes without an image to train on: {len(empty)} ({empty[0]})")
        self._augment = Augmentation(config, split)
        self.varies = self._augment.on

    def __len__(self) -> int:
        return len(self.files)

    def item(self, index: int, epoch: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[index]
        picture = self._fit(path, self._open(path))
        return self._augment(picture.tensor(self._config.channel_count), index, epoch), label

    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "names": fingerprint([self._name(path) for path, _ in self.files])}

    def _name(self, path: Path) -> str:
        """The path of an image within the folder."""
        assert self._options.path is not None
        return path.relative_to(self._options.path).as_posix()

    def _readable(self, files: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
        with ThreadPoolExecutor() as pool:
            checked = list(pool.map(self._check, (path for path, _ in files)))
        for fault, _ in checked:
            if fault is not None and self._options.on_broken == "fail":
                raise ValueError(f"{fault}; data.folder.on_broken=skip leaves such files out")
            if fault is not None:
                logger.warning("skipped %s", fault)
        if frames := [path for (path, _), (_, more) in zip(files, checked, strict=True) if more]:
            _warn_once(
                f"{self._options.path}: files with several frames, of which the first is read: {len(frames)} "
                f"({frames[0].name})"
            )
        return [file for file, (fault, _) in zip(files, checked, strict=True) if fault is None]

    def _check(self, path: Path) -> tuple[str | None, bool]:
        """Decode a file: (what is wrong with it, if anything, whether it holds more than its first frame)."""
        try:
            picture = self._open(path)
            self._fit(path, picture)
        except PictureError as error:
            return f"{error.path}: broken image file ({error.reason})", False
        except _SizeError as error:
            return str(error), False
        return None, picture.more_frames

    def _open(self, path: Path) -> Picture:
        return open_picture(path, channels=self._config.channel_count, background=self._background)

    def _fit(self, path: Path, picture: Picture) -> Picture:
        side, fit = self._config.resolution, self._options.fit
        given_width, given_height = picture.size
        size = f"{path}: image is {given_width}x{given_height} pixels"
        if fit == "exact" and picture.size != (side, side):
            raise _SizeError(f"{size}, expected exactly {side}x{side} (data.folder.fit=exact)")
        if fit == "crop" and min(picture.size) < side:
            raise _SizeError(f"{size}, smaller than {side}x{side}; data.folder.fit=enlarge accepts such images")
        scale = side / min(picture.size)
        width, height = max(side, round(given_width * scale)), max(side, round(given_height * scale))
        if picture.size != (width, height):
            method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
            picture = picture.map(lambda plane: plane.resize((width, height), method))
        left, top = (width - side) // 2, (height - side) // 2
        return picture.map(lambda plane: plane.crop((left, top, left + side, top + side)))


class _SizeError(ValueError):
    """An image has a size that `FolderOptions.fit` refuses."""


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
        """The number of each kind with an example, as text; empty where nothing was skipped."""
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
    if path.is_dir() and path.name.lower() in _FOREIGN_FOLDERS:
        return "folders of other programs"
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
