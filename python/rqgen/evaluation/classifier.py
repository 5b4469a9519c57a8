"""Classifier of images, trained on real ones, for the accuracy of samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rqgen.checks import check_integer, check_nonnegative, check_tensor, check_within, integers
from rqgen.models.images import check_images


class ImageClassifier:
    """Support vector machine (scikit-learn's ``SVC``, RBF kernel, C = ``penalty``) on the pixels averaged to ``side`` x
    ``side``. It is fitted to real training images, never to held-out or sampled ones.

    Images are (N, channels, H, W) in [-1, 1] with H and W multiples of ``side``; labels int64 (N,), >= 0. Errors are
    TypeError and ValueError; RuntimeError before `fit`."""

    def __init__(self, *, side: int = 8, penalty: float = 10.0) -> None:
        from sklearn.svm import SVC  # takes half a second to import

        self._side = check_integer(side, "side", 1)
        if not check_nonnegative(penalty, "penalty") > 0:
            raise ValueError(f"penalty: expected a number > 0, got {penalty}")
        self._machine = SVC(C=penalty)
        self._channels: int | None = None

    def fit(self, images: Tensor, labels: Tensor) -> ImageClassifier:
        features, targets = self._features(images), self._targets(images, labels)
        if len(np.unique(targets)) < 2:
            raise ValueError("labels: expected images of at least two classes")
        self._machine.fit(features, targets)
        self._channels = images.shape[1]
        return self

    def predict(self, images: Tensor) -> Tensor:
        """Return the class of every image, int64 (N,)."""
        if self._channels is None:
            raise RuntimeError("ImageClassifier: must be fitted first")
        if images.ndim == 4 and images.shape[1] != self._channels:
            raise ValueError(f"images: expected {self._channels} channels, as in training, got {images.shape[1]}")
        return torch.from_numpy(self._machine.predict(self._features(images)))

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of images whose predicted class is their label."""
        targets = self._targets(images, labels)
        return float((self.predict(images).numpy() == targets).mean())

    def _features(self, images: Tensor) -> np.ndarray:
        check_images(images)
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images: expected (N, channels, H, W), N >= 1, got {tuple(images.shape)}")
        if images.is_meta:
            raise ValueError("images: expected a tensor with values, got one on the meta device")
        if images.shape[2] % self._side or images.shape[3] % self._side:
            raise ValueError(
                f"images: expected sides that are multiples of {self._side}, got {tuple(images.shape[2:])}"
            )
        if not bool(images.isfinite().all()):
            raise ValueError("images: expected numbers in [-1, 1], got NaN or infinity")
        window = (images.shape[2] // self._side, images.shape[3] // self._side)
        return F.avg_pool2d(images.detach().float().cpu(), window).flatten(1).numpy()

    @staticmethod
    def _targets(images: Tensor, labels: Tensor) -> np.ndarray:
        check_images(images, values=False)
        check_tensor(labels, "labels")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels: expected shape {(len(images),)}, got {tuple(labels.shape)}")
        check_within(targets := integers(labels, "labels").cpu(), "labels", "label", 0, None)
        return targets.numpy()
