"""Check the images that tokenizers take: one rule for encoding, training, editing and evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rqgen.checks import check_tensor

# Images in [-1, 1] have a mean of |x| of at most 1, and resizing, noise or a decoder add less than the rest. The
# second bound is for images in 0..255 that are nearly black.
_FARTHEST_MEAN, _FARTHEST_VALUE = 1.75, 8.0


def check_images(images: Any, *, values: bool = True) -> None:
    """Raise unless `images` are a dense floating-point tensor and, with `values`, about within [-1, 1]: in no image may
    the mean of |x| exceed 1.75, or any |x| exceed 8.

    Values beyond [-1, 1] within these bounds are accepted as they are. NaN and infinity are not checked (a tokenizer
    gives code -1 for them). On a GPU this is a host-device synchronisation, except in the capture of a graph.

    Raises:
        TypeError: not a dense tensor, or another dtype; the text says how to convert it.
        ValueError: values far outside [-1, 1]; the text says how to convert them.
    """
    if isinstance(images, np.ndarray):
        raise TypeError(
            f"images: expected a tensor (B, channels, height, width) in [-1, 1], got a numpy array of {images.dtype}; "
            "convert it by torch.from_numpy(images), and (B, height, width, channels) in 0..255 by "
            "torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1"
        )
    check_tensor(images, "images")
    if not images.is_floating_point():
        raise TypeError(
            f"images: expected a floating-point tensor in [-1, 1], got {images.dtype}; convert 0..255 by "
            "images / 127.5 - 1"
        )
    if not values or images.ndim < 2 or images.numel() == 0 or not _readable(images):
        return
    size = (
        (images.float() if images.element_size() == 1 else images)
        .detach()
        .nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        .abs_()
        .flatten(1)
    )
    if bool(((size.mean(dim=1) > _FARTHEST_MEAN) | (size.amax(dim=1) > _FARTHEST_VALUE)).any()):
        finite = images.detach().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        raise ValueError(
            f"images: expected values in [-1, 1], got {finite.min().item():g} .. {finite.max().item():g}; convert "
            "0..255 by images / 127.5 - 1, 0..1 by images * 2 - 1"
        )


def check_latents(latents: Any, name: str, shape: tuple[int | None, ...], device: torch.device) -> None:
    """Raise unless `latents` are floating-point numbers (B, *shape) on the model's `device`; None is any size.

    Raises:
        TypeError: not a dense tensor, or not floating point.
        ValueError: another shape, or on another device.
    """
    check_tensor(latents, name, device)
    sizes = tuple(latents.shape[1:])
    if latents.ndim != 1 + len(shape) or any(size not in (None, has) for size, has in zip(shape, sizes, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape (B, {expected}), got {tuple(latents.shape)}")
    if not latents.is_floating_point():
        raise TypeError(f"{name}: expected floating point, got {latents.dtype}")


def check_some(images: Tensor) -> None:
    """Raise ValueError for an empty batch: a loss is a mean over images, and codebooks learn from them."""
    if len(images) == 0:
        raise ValueError(f"images: expected at least one to train on, got shape {tuple(images.shape)}")


def _readable(tensor: Tensor) -> bool:
    """Return True if values can be read: not in a graph that is compiled or captured, nor without any (meta)."""
    if tensor.is_meta or torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
