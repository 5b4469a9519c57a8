"""Random crops of scikit-learn's two photographs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from rqgen.config import check_bounds

from ..datasets import Augmentation, ImageDataset, Split, check_split, choose_classes, item_generator
from ..pictures import Picture
from . import Source, register

if TYPE_CHECKING:
    from ..settings import DataConfig


@dataclass
class PhotosOptions:
    """Options of source "photos"."""

    crops_per_epoch: int = 1024
    """Number of random crops in an epoch."""

    def __post_init__(self) -> None:
        check_bounds(self, crops_per_epoch=(1, 10**7))


@register
class Photos(Source):
    """Random crops of scikit-learn's two photographs, the larger ones shrunk. They come with scikit-learn."""

    name = "photos"
    options = PhotosOptions

    def open(self, config: DataConfig, options: PhotosOptions, split: Split) -> PhotoCrops:
        return PhotoCrops(config, options, split)


class PhotoCrops(ImageDataset):
    """Random square crops of scikit-learn's two photographs, of any side from the resolution to the
    photograph's height, shrunk to the resolution. Held-out crops come from the right-hand part of each
    photograph, which training crops never touch. The class is the photograph."""

    varies = True

    def __init__(self, config: DataConfig, options: PhotosOptions, split: Split) -> None:
        from sklearn.datasets import load_sample_images

        check_split(split)

        sample = load_sample_images()
        names = [Path(name).stem for name in sample.filenames]
        self.class_names, chosen = choose_classes(names, config.classes, "photos")
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
        self._config, self._crops = config, options.crops_per_epoch
        self._augment = Augmentation(config, split)

    def __len__(self) -> int:
        return self._crops

    def item(self, index: int, epoch: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 <= index < {len(self)}, got {index}")
        label = index % len(self._regions)
        region = self._regions[label]
        generator = item_generator(self._config.split_seed, epoch, index, stream=1)
        side = int(generator.integers(self._config.resolution, min(region.size) + 1))
        left = int(generator.integers(0, region.width - side + 1))
        top = int(generator.integers(0, region.height - side + 1))
        crop = region.crop((left, top, left + side, top + side))
        size = (self._config.resolution, self._config.resolution)
        picture = Picture([crop.resize(size, Image.Resampling.LANCZOS)], more_frames=False)
        return self._augment(picture.tensor(self._config.channel_count), index, epoch), label
