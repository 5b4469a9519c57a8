"""A judge that has only seen real images: does a sample show the class it was asked for?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rqgen.models.images import check_images


class ImageClassifier:
    """A support vector machine (scikit-learn's ``SVC``, RBF kernel, C = 10) on the pixels averaged to
    ``side`` x ``side``. It is fitted to real training images and never sees held-out or sampled ones.

    Images are (N, channels, H, W) in [-1, 1] with H and W multiples of ``side``; labels int64 (N,).
    """

    def __init__(self, *, side: int = 8, penalty: float = 10.0) -> None:
        from sklearn.svm import SVC  # half a second that only this class is worth

        self._side = side
        self._machine = SVC(C=penalty)
        self._fitted = False

    def fit(self, images: Tensor, labels: Tensor) -> ImageClassifier:
        features, targets = self._features(images), self._targets(images, labels)
        if len(np.unique(targets)) < 2:
            raise ValueError("labels: expected images of at least two classes")
        self._machine.fit(features, targets)
        self._fitted = True
        return self

    def predict(self, images: Tensor) -> Tensor:
        """The class of every image, int64 (N,)."""
        if not self._fitted:
            raise RuntimeError("the classifier must be fitted first")
        return torch.from_numpy(self._machine.predict(self._features(images)))

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images whose predicted class is their label."""
        targets = self._targets(images, labels)
        return float((self.predict(images).numpy() == targets).mean())

    def _features(self, images: Tensor) -> np.ndarray:
        check_images(images)
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images: expected (N, channels, H, W), N >= 1, got {tuple(images.shape)}")
        if images.shape[2] % self._side or images.shape[3] % self._side:
            raise ValueError(
                f"images: expected sides that are multiples of {self._side}, got {tuple(images.shape[2:])}"
            )
        window = (images.shape[2] // self._side, images.shape[3] // self._side)
        return F.avg_pool2d(images.detach().float().cpu(), window).flatten(1).numpy()

    @staticmethod
    def _targets(images: Tensor, labels: Tensor) -> np.ndarray:
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels: expected shape {(len(images),)}, got {tuple(labels.shape)}")
        return labels.cpu().numpy()
