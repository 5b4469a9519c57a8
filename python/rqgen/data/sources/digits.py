"""scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from rqgen.checks import DIGIT_NAMES

from ..datasets import Augmentation, ImageDataset, Split, choose_classes, stratified_split
from . import Source, register

if TYPE_CHECKING:
    from ..settings import DataConfig


@register
class Digits(Source):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged. They come with scikit-learn."""

    name = "digits"
    channels = 1
    max_resolution = 512  # all of them are kept in memory

    def open(self, config: DataConfig, options: None, split: Split) -> DigitImages:
        return DigitImages(config, split)


class DigitImages(ImageDataset):
    """scikit-learn's 1,797 handwritten digits (8x8, values 0..16), enlarged (Lanczos); kept in memory. Classes are
    called "zero" to "nine"; numerals name them too."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.class_names, chosen = choose_classes(DIGIT_NAMES, config.classes, "digits")
        indices = [index for index, label in enumerate(digits.target) if int(label) in chosen]
        labels = [chosen[int(digits.target[index])] for index in indices]
        keep = stratified_split(labels, config.held_out_fraction, config.split_seed, split)
        size = (config.resolution, config.resolution)
        small_nhw = digits.images.astype(np.float32) / 8 - 1
        enlarged = [
            np.asarray(Image.fromarray(small_nhw[indices[i]]).resize(size, Image.Resampling.LANCZOS)) for i in keep
        ]
        images_n1hw = torch.from_numpy(np.reshape(enlarged, (-1, 1, *size)).astype(np.float32)).clamp_(-1, 1)
        self.images = images_n1hw.expand(-1, config.channel_count, -1, -1).contiguous()
        self.labels = torch.tensor([labels[i] for i in keep], dtype=torch.int64)
        self._augment = Augmentation(config, split)
        self.varies = self._augment.on

    def __len__(self) -> int:
        return len(self.images)

    def item(self, index: int, epoch: int) -> tuple[torch.Tensor, int]:
        return self._augment(self.images[index], index, epoch), int(self.labels[index])
