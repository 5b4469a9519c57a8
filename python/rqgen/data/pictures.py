"""Image files as a viewer shows them: the one place that opens a picture."""

from __future__ import annotations

import functools
import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from rqgen.reading import describe_file

logger = logging.getLogger(__name__)

Colour = str | tuple[int, int, int]

_ORIENTATION = 0x0112
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE_VALUE, _PLANAR_CONFIGURATION, _SAMPLE_FORMAT = 258, 262, 281, 284, 339
_WHITE_IS_ZERO, _SIGNED, _SEPARATE = 0, 2, 2
# What Pillow multiplies grey samples of 2 and 4 bits by.
_GREY_STEPS = {"L;2": 85, "L;4": 17}
# Of float32: 1 is often written as the next larger number.
_ROUNDING = 1e-6
# ITU-R 601, as Pillow's conversion to grey.
_LUMA = np.array([0.299, 0.587, 0.114])
# Pillow keeps the first byte of a 16-bit colour sample: read in the other byte order, the second one is first.
_OTHER_BYTE = {
    **{f"{bands};16B": f"{bands};16L" for bands in ("RGB", "RGBA", "RGBX")},
    **{f"{bands};16{order}": f"{bands};16B" for bands in ("RGB", "RGBA", "RGBX") for order in "LN"},
}


class PictureError(ValueError):
    """A file that is no readable picture: `path`, and the `reason`."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: not a readable image ({reason})")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[PictureError], tuple[Path, str]]:
        return PictureError, (self.path, self.reason)  # a worker process sends it to the one that trains


class Picture(NamedTuple):
    """An opened picture, upright and opaque."""

    planes: list[Image.Image]
    """One "L" or "RGB" image; of deeper samples one "F" image per channel (1 or 3), values in [0, 1]."""
    more_frames: bool
    """True if the file holds more frames (or pages) than this first one."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.planes[0].size

    def map(self, change: Callable[[Image.Image], Image.Image]) -> Picture:
        """The picture with every plane changed in the same way."""
        return self._replace(planes=[change(plane) for plane in self.planes])

    def tensor(self, channels: int) -> torch.Tensor:
        """float32 (channels, H, W) in [-1, 1]."""
        if self.planes[0].mode == "F":
            pixels_chw = torch.from_numpy(np.stack([np.asarray(plane) for plane in self.planes])).clamp(0, 1) * 2 - 1
        else:
            pixels = torch.from_numpy(np.array(self.planes[0], dtype=np.float32)) / 127.5 - 1
            pixels_chw = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return pixels_chw.expand(channels, -1, -1).contiguous()


def read_image(path: str | Path, *, channels: int = 3, background: Colour = "white") -> torch.Tensor:
    """Read an image file as a viewer shows it: float32 (channels, H, W) in [-1, 1], black to white.

    - The orientation that EXIF or XMP give is applied.
    - Integers are scaled by the range of their type: 8, 16 and 32 bits. 16-bit samples that were written with fewer
      bits have the range of these: PGM and PPM by their maxval; TIFF by BitsPerSample, or by a MaxSampleValue of
      2^n - 1; PNG by sBIT of each
      channel, where samples are not scaled up as PNG demands. Of signed integers the range begins at 0.
    - Floating point is expected in [0, 1], up to the rounding of float32.
    - Alpha channels, palettes with alpha and transparent colours are composited over `background`.
    - CMYK is converted as Pillow does it. An embedded ICC profile converts 8-bit pictures to sRGB. Ignored are profiles
      that are damaged or made for other channels, profiles of deeper pictures, and PNG's gamma.
    - Colour becomes grey by ITU-R 601 (0.299 R + 0.587 G + 0.114 B), grey becomes colour with equal channels.
    - Of an animation or a file of pages the first is read, and a log line says so.

    Args:
        path: in any format that Pillow reads; the contents decide, not the suffix.
        channels: 1 (grey) or 3 (colour).
        background: what shows through transparent pixels: a name, "#rrggbb", or three integers 0..255.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no image, is damaged or cut off, or too large to be one (a "decompression bomb");
            samples that are negative, or floats outside [0, 1]; an unknown background; other channels.
    """
    if channels not in (1, 3) or isinstance(channels, bool):
        raise ValueError(f"channels: expected 1 (grey) or 3 (colour), got {channels!r}")
    picture = open_picture(Path(path), channels=channels, background=parse_colour(background))
    if picture.more_frames:
        logger.info("%s: holds more than one frame, the first is read", path)
    return picture.tensor(channels)


def parse_colour(colour: Colour) -> tuple[int, int, int]:
    """Red, green and blue, 0..255 each, of a name, "#rrggbb" or a tuple. ValueError for anything else."""
    try:
        rgb = ImageColor.getrgb(colour) if isinstance(colour, str) else tuple(colour)
    except (TypeError, ValueError):
        rgb = ()
    if len(rgb) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in rgb):
        raise ValueError(f"background: expected a colour such as 'white', '#ffffff' or (255, 255, 255), got {colour!r}")
    return rgb


def open_picture(path: Path, *, channels: int, background: tuple[int, int, int]) -> Picture:
    """Open and decode an image file, see `read_image`. Planes have one channel where `channels` is 1, and may have
    one where it is 3.

    Raises:
        FileNotFoundError: no such file.
        PictureError: anything that keeps it from being shown.
    """
    if not path.is_file():
        found = describe_file(path)
        raise FileNotFoundError(f"image file not found: {path}{'' if found == 'no file' else f': it is {found}'}")
    try:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        with _opened(path) as image:
            _check_strips(image)
            more_frames = _has_more_frames(image)
            rawmode = _rawmode(image)
            image.load()
            in_two_bytes = rawmode in _OTHER_BYTE or rawmode == "LA;16B" or _has_deep_planes(image)
            if in_two_bytes or image.mode[0] in "IF" or _is_signed(image):
                planes = _deep_planes(image, path, rawmode, channels, background)
            else:
                planes = [_eight_bit(image, rawmode, channels, background)]
            transposed = _TRANSPOSED.get(_orientation(image))
    except UnidentifiedImageError as error:
        kind = describe_file(path)
        raise PictureError(path, f"it is {kind}{', but damaged' if 'image' in kind else ''}") from error
    except Exception as error:  # each format's decoder fails in its own ways
        reason = re.sub(" <.*>$", "", " ".join(str(error).split()))  # which names an object, no file
        named = reason if type(error) is ValueError else f"{type(error).__name__}: {reason}".removesuffix(": ")
        raise PictureError(path, named) from error
    if transposed is not None:
        planes = [plane.transpose(transposed) for plane in planes]
    return Picture(planes, more_frames)


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    # Not by its name: a file that Pillow opens itself it may map into memory, and a TIFF with an orientation of 5 to 8
    # is then scrambled (Pillow 13).
    with path.open("rb") as file, Image.open(file) as image:
        yield image


def _check_strips(image: ImageFile.ImageFile) -> None:
    """Raise ValueError for a TIFF whose strips do not reach everywhere: Pillow leaves the rest black."""
    if not isinstance(image, TiffImageFile):
        return
    width, height = image.size
    covered: dict[str, int] = {}
    for tile in image.tile:
        left, top, right, bottom = tile.extents or (0, 0, width, height)
        covered[_band(tile)] = covered.get(_band(tile), 0) + (right - left) * (bottom - top)
    if any(area < width * height for area in covered.values()):
        raise ValueError(f"its strips hold less than {width}x{height} pixels")


def _band(tile: ImageFile._Tile) -> str:
    """Return Pillow's name of what a part of the file holds: channels, or the layout of samples in bytes."""
    return str(tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args)


def _has_more_frames(image: Image.Image) -> bool:
    if image.format == "MPO":  # a photograph's second frame is its depth or its other eye
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame hides the first one from nobody
        return False


def _rawmode(image: ImageFile.ImageFile) -> str:
    """Return Pillow's name of the layout of samples in the file's bytes; "" where its plugin decides that."""
    return _band(image.tile[0]) if image.tile else ""


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image: some plugins apply it themselves while loading, and then remove it."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data hides no picture
        return 1


# --- 8 bits -------------------------------------------------------------------------------------------------------


def _eight_bit(opened: Image.Image, rawmode: str, channels: int, background: tuple[int, int, int]) -> Image.Image:
    image, alpha = _split_alpha(opened, rawmode)
    profile = image.info.get("icc_profile")
    transform = _srgb_transform(profile, image.mode) if profile else None
    if transform is not None and (converted := ImageCms.applyTransform(image, transform)) is not None:
        image = converted
    if alpha is not None:
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=alpha)
        image = canvas
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image if channels == 3 or image.mode == "L" else image.convert("L")


def _split_alpha(image: Image.Image, rawmode: str) -> tuple[Image.Image, Image.Image | None]:
    """The colours, of whatever mode but palettes, and their alpha (None: opaque)."""
    key = image.info.get("transparency")
    has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or key is not None
    if not has_alpha and not (image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")):
        return (image.convert({"1": "L", "P": "RGB"}[image.mode]) if image.mode in ("1", "P") else image), None
    if key is not None and rawmode in _GREY_STEPS and key < 2 ** int(rawmode[-1]):
        # The samples were scaled to 8 bits, the transparent one was not.
        image.info["transparency"] = key * _GREY_STEPS[rawmode]
    grey = image.mode in ("1", "L", "LA", "La")
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return rgba.convert("L" if grey else "RGB"), rgba.getchannel("A")


@functools.lru_cache(maxsize=64)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where there is nothing to convert: the profile is sRGB, damaged, or made for other channels."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


# --- deeper samples -----------------------------------------------------------------------------------------------


def _deep_planes(
    image: ImageFile.ImageFile, path: Path, rawmode: str, channels: int, background: tuple[int, int, int]
) -> list[Image.Image]:
    samples_hwc = _deep_samples(image, path, rawmode)
    key, alpha_hw1 = image.info.get("transparency"), None
    if key is not None:
        alpha_hw1 = (samples_hwc != np.array(key)).any(axis=-1, keepdims=True)
    values_hwc = _scaled(samples_hwc, image, path)
    if values_hwc.shape[-1] in (2, 4):
        values_hwc, alpha_hw1 = values_hwc[..., :-1], values_hwc[..., -1:]
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values_hwc = 1 - values_hwc
    if alpha_hw1 is not None:
        values_hwc = alpha_hw1 * values_hwc + (1 - alpha_hw1) * (np.array(background) / 255)
    if channels == 1 and values_hwc.shape[-1] == 3:
        values_hwc = values_hwc @ _LUMA[:, None]
    return [Image.fromarray(np.ascontiguousarray(plane_hw, np.float32)) for plane_hw in np.moveaxis(values_hwc, -1, 0)]


def _deep_samples(image: ImageFile.ImageFile, path: Path, rawmode: str) -> np.ndarray:
    """(H, W, C) as the file has them, alpha last (C = 2 or 4)."""
    if isinstance(image, TiffImageFile) and _has_deep_planes(image):
        return _separate_planes(image, path)
    if rawmode == "LA;16B":  # as four bytes a pixel, none of which is lost
        return np.asarray(_reread(path, "RGBA")).astype(np.int64) @ np.array([[256, 0], [1, 0], [0, 256], [0, 1]])
    if rawmode in _OTHER_BYTE:
        return 256 * np.asarray(image).astype(np.int64) + np.asarray(_reread(path, _OTHER_BYTE[rawmode]))
    samples_hw = np.asarray(image)
    if image.mode == "I" and image.format == "TIFF" and not _is_signed(image):
        samples_hw = samples_hw.view(np.uint32)  # Pillow has no unsigned mode of 32 bits
    if image.mode == "L":
        samples_hw = samples_hw.view(np.int8)  # and no signed one of 8
    return samples_hw[..., None] if image.mode == "F" else samples_hw[..., None].astype(np.int64)


def _has_deep_planes(image: Image.Image) -> bool:
    """16-bit samples, each channel on its own: Pillow reads a byte of each, uncompressed ones at the wrong place."""
    if not isinstance(image, TiffImageFile) or len(image.getbands()) == 1:
        return False
    return image.tag_v2.get(_PLANAR_CONFIGURATION) == _SEPARATE and image.tag_v2[_BITS_PER_SAMPLE][0] == 16


def _separate_planes(image: TiffImageFile, path: Path) -> np.ndarray:
    """(H, W, C) of a file with `_has_deep_planes`."""
    with _opened(path) as again:
        tiles = again.tile  # decoding has emptied the one of `image`
    byte_order = image.tag_v2.prefix
    (width, height), bands = image.size, image.getbands()
    if bands[0] != "R" or any(tile.codec_name != "raw" for tile in tiles):
        raise ValueError(
            "16-bit channels, one after the other, are read only of uncompressed RGB: store pixel after pixel instead"
        )
    samples_hwc = np.empty((height, width, len(bands)), np.int64)
    contents = path.read_bytes()
    for tile in tiles:
        left, top, right, bottom = tile.extents or (0, 0, width, height)
        rows, columns = bottom - top, right - left
        values = np.frombuffer(contents, "<u2" if byte_order == b"II" else ">u2", rows * columns, tile.offset)
        samples_hwc[top:bottom, left:right, bands.index(_band(tile))] = values.reshape(rows, columns)
    return samples_hwc


def _is_signed(image: Image.Image) -> bool:
    return isinstance(image, TiffImageFile) and image.tag_v2.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED


def _reread(path: Path, rawmode: str) -> Image.Image:
    """The image with its bytes taken apart in another way."""
    with _opened(path) as image:
        image.tile = [
            tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
            for tile in image.tile
        ]
        image.load()
        return image


def _scaled(samples_hwc: np.ndarray, image: Image.Image, path: Path) -> np.ndarray:
    """float64 in [0, 1]."""
    lowest, highest = samples_hwc.min(), samples_hwc.max()
    if image.mode == "F":
        if not (lowest >= -_ROUNDING and highest <= 1 + _ROUNDING):  # NaN too
            raise ValueError(f"floating point: expected values in 0..1, got {lowest}..{highest}")
        return samples_hwc.astype(np.float64).clip(0, 1)
    if lowest < 0:
        raise ValueError(f"signed integers: expected none below 0, got {lowest}")
    bits = _declared_bits(image, path, samples_hwc.shape[-1])
    if bits is not None:
        ends = 2 ** np.array(bits)
        if (samples_hwc < ends).all() and (image.format != "PNG" or _right_aligned(samples_hwc, bits)):
            return samples_hwc / (ends - 1)
    return samples_hwc / _type_maximum(image)


def _type_maximum(image: Image.Image) -> int:
    if isinstance(image, TiffImageFile):
        return 2 ** (image.tag_v2[_BITS_PER_SAMPLE][0] - _is_signed(image)) - 1
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two are scaled to 16 bits
        return 2**31 - 1
    return 2**16 - 1


def _declared_bits(image: Image.Image, path: Path, channels: int) -> list[int] | None:
    """Return the number of bits of a sample that were used, for each channel, where the file says so."""
    if image.format == "PNG":
        bits = _significant_bits(path)
        return bits if len(bits) == channels and min(bits) < 16 else None
    if not isinstance(image, TiffImageFile):
        return None
    # The largest value in use may be a statistic, which must not change what is shown; a number of bits is not one.
    largest = list(image.tag_v2.get(_MAX_SAMPLE_VALUE, (0,)))
    if len(largest) != channels:
        largest = [max(largest)] * channels
    whole = all(isinstance(one, int) and one > 1 and one & (one + 1) == 0 for one in largest)
    return [one.bit_length() for one in largest] if whole else None


def _significant_bits(path: Path) -> list[int]:
    """Return the significant bits of each channel of a PNG of 16 bits, by its sBIT chunk, which Pillow does not read;
    empty where there is none, or one that makes no sense."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"sBIT":
                bits = list(file.read(length)[:4])
                return bits if all(0 < one <= 16 for one in bits) else []
            if kind in (b"IDAT", b"PLTE"):
                break
            file.seek(length + 4, 1)
    return []


def _right_aligned(samples_hwc: np.ndarray, bits: list[int]) -> bool:
    """Return True if 16-bit samples of `bits` significant bits, for each channel, were stored as they are.

    PNG wants them scaled up, by shifting (with or without repeated bits) or by multiplying: then a sample follows from
    its upper bits."""
    return not all(_scaled_up(samples_hwc[..., channel], count) for channel, count in enumerate(bits))


def _scaled_up(samples_hw: np.ndarray, bits: int) -> bool:
    upper = samples_hw >> (16 - bits)
    shifted = upper << (16 - bits)
    repeated = shifted
    for times in range(1, 16 // bits + 1):
        repeated = repeated | (shifted >> (times * bits))
    multiplied = np.rint(upper * (65535 / (2**bits - 1)))
    return bool(((samples_hw == shifted) | (samples_hw == repeated) | (samples_hw == multiplied)).all())
