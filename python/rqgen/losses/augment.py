"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020), for small sets of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rqgen.checks import check_integer

from .batches import check_batch

POLICIES = ("colour", "translation", "cutout")
_UNIFORMS = 7
_TRANSLATION, _CUTOUT = 1 / 8, 1 / 2


class DiffAugment(nn.Module):
    """Changes images, real and reconstructed alike, before a discriminator sees them, so that it cannot memorise the
    real ones; gradients pass through.

        discriminator = nn.Sequential(DiffAugment(seed=0), PatchDiscriminator())

    In train mode, for each image x (C, H, W) with u_0 .. u_6 uniform in [0, 1), in this order:

        colour:        x + u_0 - 1/2;  2 u_1 (x - m) + m, m the mean over channels;  (u_2 + 1/2) (x - m) + m, m the mean
                       over all of x
        translation:   by up to an eighth of the height (u_3) and width (u_4), zeros behind
        cutout:        zeros in a square of half the height and width, its center anywhere (u_5, u_6)

    In eval mode images pass unchanged. Uniforms are counter-based: those of the i-th image that the module has seen are
    words of Philox 4x64 (Salmon et al. 2011) with the key `seed` and the counter i, whatever the batch. i is in the
    state dict, so that training resumes with the same ones; give each of several processes a seed of its own.

    Images are (B, C, H, W), of any floating-point dtype, and stay so.

    Args:
        policies: which of "colour", "translation" and "cutout" are used.
        seed: in [0, 2^63).

    Raises:
        TypeError, ValueError: an argument of another type or out of range; images of another dtype or shape.
    """

    def __init__(self, policies: Sequence[str] = POLICIES, *, seed: int = 0) -> None:
        super().__init__()
        unknown = [policy for policy in policies if policy not in POLICIES]
        if unknown or isinstance(policies, str):
            raise ValueError(f"policies: expected some of {', '.join(POLICIES)}, got {policies!r}")
        self.policies = tuple(policies)
        self.seed = check_integer(seed, "seed", 0, 2**63 - 1)
        self.seen = 0

    def get_extra_state(self) -> Tensor:
        """Images seen so far; for the state dict."""
        return torch.tensor(self.seen)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the number of images seen from a state dict."""
        self.seen = int(state)

    def forward(self, images: Tensor) -> Tensor:
        check_batch(images, "images")
        if not self.training or not self.policies or len(images) == 0:
            return images
        uniforms_un = self._uniforms(len(images)).to(images.device)
        if "colour" in self.policies:
            images = _recoloured(images, uniforms_un[:3].to(images.dtype).view(3, -1, 1, 1, 1))
        if "translation" in self.policies:
            images = _translated(images, uniforms_un[3], uniforms_un[4])
        if "cutout" in self.policies:
            images = _cut(images, uniforms_un[5], uniforms_un[6])
        return images

    def _uniforms(self, count: int) -> Tensor:
        """float64 (7, count), of the next images."""
        rows = [
            np.random.Generator(np.random.Philox(key=self.seed, counter=[0, index, 0, 0])).random(_UNIFORMS)
            for index in range(self.seen, self.seen + count)
        ]
        self.seen += count
        return torch.from_numpy(np.stack(rows, axis=1))


def _recoloured(images: Tensor, uniforms: Tensor) -> Tensor:
    brightness, saturation, contrast = uniforms
    images = images + (brightness - 0.5)
    mean = images.mean(dim=1, keepdim=True)
    images = (images - mean) * (2 * saturation) + mean
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _translated(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    for dim, uniform in ((2, down), (3, across)):
        size = images.shape[dim]
        farthest = round(size * _TRANSLATION)
        shift_n = (uniform * (2 * farthest + 1)).floor().long() - farthest
        source_ns = torch.arange(size, device=images.device) - shift_n.unsqueeze(1)
        shape = (len(images), 1, size, 1) if dim == 2 else (len(images), 1, 1, size)
        inside = ((source_ns >= 0) & (source_ns < size)).view(shape)
        index = source_ns.clamp(0, size - 1).view(shape).expand_as(images)
        images = torch.where(inside, images.gather(dim, index), 0)
    return images


def _cut(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    within = []
    for dim, uniform in ((2, down), (3, across)):
        size = images.shape[dim]
        side = round(size * _CUTOUT)
        # As many centers as places at which the square may lie with its center inside, edges included.
        first_n = (uniform * (size + 1 - side % 2)).floor().long() - side // 2
        place_ns = torch.arange(size, device=images.device) - first_n.unsqueeze(1)
        within.append((place_ns >= 0) & (place_ns < side))
    return torch.where((within[0].unsqueeze(2) & within[1].unsqueeze(1)).unsqueeze(1), 0, images)
