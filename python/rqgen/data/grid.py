"""Many images on one sheet, and onto disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from rqgen.checks import check_integer
from rqgen.files import new_file

# Suffix -> Pillow's name of the format, and what keeps the pixels as they are.
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".bmp": ("BMP", {}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".png": ("PNG", {}),
    ".tif": ("TIFF", {"compression": "tiff_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_deflate"}),
    ".webp": ("WEBP", {"lossless": True}),
}
# The largest width and height, in pixels.
_LARGEST = {"JPEG": 65500, "WEBP": 16383}
# EXIF's "Software", and the name that `save_image` writes there.
_SOFTWARE, _WRITER = 0x0131, "rqgen"
# A BMP has no EXIF data, but four bytes of its header are the writer's own.
_BMP_RESERVED, _BMP_WRITER = 6, b"rqgn"
_LABEL_HEIGHT, _LABEL_LETTERS = 12, 24


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] (values outside are cut off) -> bytes 0..255, same shape.

    Raises:
        TypeError: not floating point: bytes are images already.
        ValueError: NaN or infinity, which would become a colour like any other; a tensor without values (meta).
    """
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"images: expected floating-point numbers in [-1, 1], got {got}")
    if images.is_meta:
        raise ValueError("images: expected a tensor with values, got one on the meta device")
    if not bool(images.isfinite().all()):
        found = "NaN" if bool(images.isnan().any()) else "infinity"
        raise ValueError(f"images: expected numbers in [-1, 1], got {found}")
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(
    images_nchw: torch.Tensor, columns: int, *, gap: int = 2, row_labels: Sequence[str] = ()
) -> torch.Tensor:
    """Images (N, channels, H, W) in [-1, 1], row after row, on white: bytes (channels, rows*(H+gap)+gap,
    ...). With ``row_labels``, one for each row, a column of text stands at the left; long ones are cut."""
    if images_nchw.ndim != 4 or len(images_nchw) == 0:
        raise ValueError(f"images: expected (N, channels, H, W) with N >= 1, got shape {tuple(images_nchw.shape)}")
    columns, gap = check_integer(columns, "columns", 1), check_integer(gap, "gap", 0)
    count, channels, height, width = images_nchw.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    if len(row_labels) not in (0, rows):
        raise ValueError(f"row_labels: expected one for each of {rows} rows, or none, got {len(row_labels)}")
    sheet = torch.full((channels, *grid_size(count, columns, (height, width), gap=gap)), 255, dtype=torch.uint8)
    for number, image in enumerate(to_uint8(images_nchw).cpu()):
        top = gap + (number // columns) * (height + gap)
        left = gap + (number % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    if not row_labels:
        return sheet
    return torch.cat([_label_column(row_labels, height, gap).expand(channels, -1, -1), sheet], dim=2)


def grid_size(
    count: int, columns: int, size: tuple[int, int], *, gap: int = 2, row_labels: Sequence[str] = ()
) -> tuple[int, int]:
    """Height and width of the `image_grid` of `count` images of this size (height, width)."""
    columns = min(columns, count)
    labels = _label_column(row_labels, size[0], gap).shape[1] if row_labels else 0
    return -(-count // columns) * (size[0] + gap) + gap, columns * (size[1] + gap) + gap + labels


def _label_column(labels: Sequence[str], height: int, gap: int) -> torch.Tensor:
    """Black text on white, centred in rows of this height: bytes (rows*(height+gap)+gap, width)."""
    font = ImageFont.load_default(min(_LABEL_HEIGHT, height))
    lines = [" ".join(label.split()) for label in labels]
    cut = [label if len(label) <= _LABEL_LETTERS else f"{label[: _LABEL_LETTERS - 3]}..." for label in lines]
    width = max(round(font.getlength(label) + 0.5) for label in cut) + 2 * gap
    column = Image.new("L", (width, len(labels) * (height + gap) + gap), 255)
    for row, label in enumerate(cut):
        cell = Image.new("L", (width, height), 255)
        ImageDraw.Draw(cell).text((width - gap, height / 2), label, fill=0, font=font, anchor="rm")
        column.paste(cell, (0, gap + row * (height + gap)))
    return torch.from_numpy(np.array(column))


def check_image_name(path: str | Path, *, size: tuple[int, int] = (1, 1), name: str = "path") -> None:
    """Raise ValueError where no image of this size (height, width) can be written under this name: before the work
    whose result it would hold."""
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(f"{name}: expected a file name that ends in {', '.join(_FORMATS)}, got '{path}'")
    kind, _ = _FORMATS[suffix]
    largest = _LARGEST.get(kind)
    if largest is not None and max(size) > largest:
        raise ValueError(
            f"{name}: a {kind} holds at most {largest} pixels a side, but this image has {size[1]}x{size[0]}: "
            f"choose a name that ends in .png, got '{path}'"
        )


def save_image(sheet_chw: torch.Tensor, path: str | Path, *, scale: int = 1) -> None:
    """Bytes (1|3, H, W) to an image file, each pixel ``scale`` times as wide and high; whole or not at all.

    The name's suffix decides the format: PNG, JPEG (quality 95), WebP (lossless), TIFF or BMP. Raise ValueError for
    others, and for images larger than the format holds.
    """
    if sheet_chw.dtype != torch.uint8 or sheet_chw.ndim != 3 or sheet_chw.shape[0] not in (1, 3):
        raise ValueError(
            f"sheet: expected uint8 (1|3, H, W), got {sheet_chw.dtype} with shape {tuple(sheet_chw.shape)}"
        )
    _, height, width = sheet_chw.shape
    path, scale = Path(path), check_integer(scale, "scale", 1)
    check_image_name(path, size=(height * scale, width * scale))
    pixels = sheet_chw.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    kind, options = _FORMATS[path.suffix.lower()]
    exif = Image.Exif()
    exif[_SOFTWARE] = _WRITER
    with new_file(path) as written:
        image.save(written, format=kind, exif=exif, **options)
        if kind == "BMP":
            with open(written, "r+b") as file:
                file.seek(_BMP_RESERVED)
                file.write(_BMP_WRITER)


def is_saved_image(path: Path) -> bool:
    """Recognise a file that `save_image` wrote, by its EXIF data or the reserved bytes of a BMP."""
    try:
        with open(path, "rb") as file:
            head = file.read(_BMP_RESERVED + len(_BMP_WRITER))
        if head[:2] == b"BM":
            return head[_BMP_RESERVED:] == _BMP_WRITER
        with Image.open(path) as image:
            return image.getexif().get(_SOFTWARE) == _WRITER
    except (OSError, ValueError, SyntaxError):
        return False
