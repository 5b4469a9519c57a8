"""Checks of batches of images, by their argument's name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rqgen.checks import check_tensor


def check_batch(
    images: Any,
    name: str,
    *,
    channels: tuple[int, ...] | None = None,
    smallest: int = 1,
    device: torch.device | None = None,
    owner: str = "model",
) -> None:
    """Raises TypeError or ValueError unless `images` are floating-point images (B, C, H, W) with one of these numbers
    of channels (None: any) and at least `smallest` pixels along each side, on the `device` of their `owner` where one
    is given."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name}: expected a tensor (B, C, H, W), got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point tensor in [-1, 1], got {images.dtype}; convert 0..255 by "
            "images / 127.5 - 1"
        )
    shape = tuple(images.shape)
    wanted = "C" if channels is None else " or ".join(map(str, channels))
    if len(shape) != 4 or (channels is not None and shape[1] not in channels):
        raise ValueError(f"{name}: expected (B, {wanted}, H, W), got shape {shape}")
    if min(shape[2:]) < smallest:
        raise ValueError(f"{name}: expected at least {smallest} x {smallest} pixels, got {shape[2]} x {shape[3]}")
    check_tensor(images, name, device, owner)


def check_pair(first: Tensor, second: Tensor, names: tuple[str, str]) -> None:
    """Raises ValueError unless two batches have one shape and lie on one device."""
    if first.shape != second.shape:
        raise ValueError(
            f"{names[1]}: expected the shape of {names[0]}, {tuple(first.shape)}, got {tuple(second.shape)}"
        )
    if first.device != second.device:
        raise ValueError(f"{names[1]}: expected the device of {names[0]}, {first.device}, got {second.device}")


def check_finite(images: Tensor, name: str) -> None:
    """Raises ValueError for NaN or infinity among images, which would stay in running statistics and averages for good.
    On a GPU this waits for the device; a graph that is compiled or captured, or has no values, is not looked into."""
    if images.is_meta or torch.compiler.is_compiling():
        return
    if images.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if not bool(images.detach().isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity among them")
