"""Many images on one sheet, and onto disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rqgen.files import new_file


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] (values outside are cut off) -> bytes 0..255, same shape."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(images_nchw: torch.Tensor, columns: int, *, gap: int = 2) -> torch.Tensor:
    """Images (N, channels, H, W) in [-1, 1], row after row, on white: bytes (channels, rows*(H+gap)+gap,
    ...)."""
    if images_nchw.ndim != 4 or len(images_nchw) == 0:
        raise ValueError(f"images: expected (N, channels, H, W) with N >= 1, got shape {tuple(images_nchw.shape)}")
    if columns < 1 or gap < 0:
        raise ValueError(f"columns: expected at least 1 (and gap >= 0), got {columns} (gap {gap})")
    count, channels, height, width = images_nchw.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for number, image in enumerate(to_uint8(images_nchw).cpu()):
        top = gap + (number // columns) * (height + gap)
        left = gap + (number % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def save_png(sheet_chw: torch.Tensor, path: Path, *, scale: int = 1) -> None:
    """Bytes (1|3, H, W) to a PNG file, each pixel ``scale`` times as wide and high; whole or not at all."""
    if sheet_chw.dtype != torch.uint8 or sheet_chw.ndim != 3 or sheet_chw.shape[0] not in (1, 3):
        raise ValueError(
            f"sheet: expected uint8 (1|3, H, W), got {sheet_chw.dtype} with shape {tuple(sheet_chw.shape)}"
        )
    pixels = sheet_chw.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    with new_file(path) as written:
        image.save(written, format="PNG")
