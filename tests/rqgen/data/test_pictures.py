"""Pictures in every form that a file can have, read as a viewer shows them."""

import io
import logging
import struct
import zlib

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from rqgen.data import DataConfig, open_dataset, read_image
from rqgen.data.pictures import parse_colour
from rqgen.data.sources.folder import FolderOptions

BYTE = 1 / 255  # the accuracy of 8 bits
WHITE, GREY, BLACK = (1.0,) * 3, (0.5,) * 3, (0.0,) * 3


def pillow(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def array(values, dtype, mode=None):
    image = Image.fromarray(np.array(values, dtype=dtype))
    assert mode is None or image.mode == mode
    return image


def modal(mode, pixels):
    """One row of pixels in a mode."""
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def png(width, height, depth, colour_type, rows, *chunks):
    """A PNG by hand: Pillow writes neither 16-bit colour nor these chunks."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
        + b"".join(chunk(kind, data) for kind, data in chunks)
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )


def tiff(width, data, order="<", **tags):
    """A TIFF of one row by hand; a tag is its number with its values, as tN=[...]."""
    base = {256: [width], 257: [1], 259: [1], 262: [1], 277: [1], 278: [1], 279: [len(data)]}
    entries = {**base, **{int(name[1:]): values for name, values in tags.items()}}
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries[273] = [start + sum(entries[279][:strip]) for strip in range(len(entries[279]))]
    directory, extra = b"", b""
    for tag in sorted(entries):
        values = struct.pack(f"{order}{len(entries[tag])}H", *entries[tag])
        if len(values) > 4:
            place = start + len(data) + len(extra)
            values, extra = struct.pack(f"{order}I", place), extra + values
        directory += struct.pack(f"{order}HHI", tag, 3, len(entries[tag])) + values.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + directory + bytes(4) + data + extra


def shorts(*values, order=">"):
    return struct.pack(f"{order}{len(values)}H", *values)


def in_colour(pixels):
    return [(value,) * 3 if np.isscalar(value) else value for value in pixels]


def palette_image(alphas=None):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 0] + [7] * 759)
    image.putdata([0, 1, 2])
    if alphas is not None:
        image.info["transparency"] = alphas
    return image


def alpha_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0], "RGBA")
    image.putdata([0, 1])
    return image


RAMP = [0.0, 0.5, 1.0]
# Name -> the file's bytes and what is seen of its one row, each pixel a grey or (R, G, B).
CASES = {
    "8-bit grey": (pillow(array([[0, 51, 255]], np.uint8, "L"), "PNG"), [0, 0.2, 1]),
    "8-bit colour": (pillow(modal("RGB", [(255, 0, 51)]), "PNG"), [(1, 0, 0.2)]),
    "1 bit": (pillow(modal("1", [0, 255]), "PNG"), [0, 1]),
    "1 bit, TIFF": (pillow(modal("1", [0, 255]), "TIFF", compression="group4"), [0, 1]),
    "1 bit, PBM": (b"P1 3 1\n0 1 0\n", [1, 0, 1]),
    "2 bits": (png(4, 1, 2, 0, [bytes([0b00011011])]), [0, 1 / 3, 2 / 3, 1]),
    "4 bits": (png(2, 1, 4, 0, [bytes([0x0F])]), [0, 1]),
    "palette": (pillow(palette_image(), "PNG"), [(1, 0, 0), (0, 1, 0), 0]),
    "palette, GIF": (pillow(palette_image(), "GIF"), [(1, 0, 0), (0, 1, 0), 0]),
    "palette, BMP": (pillow(palette_image(), "BMP"), [(1, 0, 0), (0, 1, 0), 0]),
    # 16 bits of grey.
    "16 bits, PNG": (pillow(array([[0, 32768, 65535, 255]], np.uint16, "I;16"), "PNG"), [0, 0.5, 1, 255 / 65535]),
    "16 bits, TIFF": (pillow(array([[0, 32768, 65535]], np.uint16), "TIFF"), RAMP),
    "16 bits, TIFF, deflated": (
        pillow(array([[0, 32768, 65535]], np.uint16), "TIFF", compression="tiff_deflate"),
        RAMP,
    ),
    "16 bits, TIFF, big-endian": (tiff(3, shorts(0, 32768, 65535), ">", t258=[16]), RAMP),
    "16 bits, TIFF, white is zero": (tiff(3, shorts(0, 16384, 65535, order="<"), t258=[16], t262=[0]), [1, 0.75, 0]),
    "16 bits, PGM": (b"P5 3 1 65535\n" + shorts(0, 32768, 65535), RAMP),
    "16 bits, JPEG 2000": (pillow(array([[0, 32768, 65535]], np.uint16), "JPEG2000"), RAMP),
    "signed 16 bits, TIFF": (tiff(3, shorts(0, 16384, 32767, order="<"), t258=[16], t339=[2]), [0, 16384 / 32767, 1]),
    "signed 8 bits, TIFF": (tiff(3, bytes([0, 64, 127]), t258=[8], t339=[2]), [0, 64 / 127, 1]),
    # 16 bits of colour.
    "16 bits, colour PNG": (png(1, 1, 16, 2, [shorts(0, 255, 65535)]), [(0, 255 / 65535, 1)]),
    "16 bits, colour PNG with alpha": (
        png(2, 1, 16, 6, [shorts(0, 255, 65535, 65535) + shorts(0, 0, 0, 32768)]),
        [(0, 255 / 65535, 1), 0.5],
    ),
    "16 bits, grey PNG with alpha": (png(3, 1, 16, 4, [shorts(255, 65535, 0, 32768, 9, 0)]), [255 / 65535, 0.5, 1]),
    "16 bits, colour TIFF": (
        tiff(1, shorts(0, 255, 65535, order="<"), t258=[16] * 3, t262=[2], t277=[3]),
        [(0, 255 / 65535, 1)],
    ),
    "16 bits, colour TIFF, big-endian": (
        tiff(1, shorts(0, 255, 65535), ">", t258=[16] * 3, t262=[2], t277=[3]),
        [(0, 255 / 65535, 1)],
    ),
    "16 bits, colour PPM": (b"P6 1 1 65535\n" + shorts(0, 13107, 65535), [(0, 0.2, 1)]),
    # Fewer bits than the type has.
    "maximum 4095, PGM": (b"P5 3 1 4095\n" + shorts(0, 819, 4095), [0, 0.2, 1]),
    "maximum 1000, PGM in text": (b"P2 3 1 1000\n0 200 1000\n", [0, 0.2, 1]),
    "maximum 15, PGM": (b"P5 3 1 15\n" + bytes([0, 3, 15]), [0, 0.2, 1]),
    "maximum 1023, PPM": (b"P6 1 1 1023\n" + shorts(0, 341, 1023), [(0, 1 / 3, 1)]),
    "12 bits, TIFF": (tiff(2, bytes([0xFF, 0xF3, 0x33]), t258=[12]), [1, 0.2]),
    "10 of 16 bits, TIFF": (tiff(3, shorts(0, 341, 1023, order="<"), t258=[16], t281=[1023]), [0, 1 / 3, 1]),
    "14 of 16 bits, TIFF": (tiff(2, shorts(5461, 16383, order="<"), t258=[16], t281=[16383]), [1 / 3, 1]),
    "12 of 16 bits, colour TIFF": (
        tiff(1, shorts(0, 819, 4095, order="<"), t258=[16] * 3, t262=[2], t277=[3], t281=[4095] * 3),
        [(0, 0.2, 1)],
    ),
    "a maximum that is a statistic, TIFF": (
        tiff(2, shorts(0, 13107, order="<"), t258=[16], t281=[13107]),
        [0, 0.2],
    ),
    "a maximum that samples exceed, TIFF": (tiff(2, shorts(13107, 65535, order="<"), t258=[16], t281=[1023]), [0.2, 1]),
    "10 of 16 bits, PNG": (png(3, 1, 16, 0, [shorts(0, 341, 1023)], (b"sBIT", b"\x0a")), [0, 1 / 3, 1]),
    "12 of 16 bits, PNG": (png(2, 1, 16, 0, [shorts(819, 4095)], (b"sBIT", b"\x0c")), [0.2, 1]),
    "12 of 16 bits, colour PNG": (png(1, 1, 16, 2, [shorts(0, 819, 4095)], (b"sBIT", b"\x0c" * 3)), [(0, 0.2, 1)]),
    "bits of each channel, PNG": (
        png(2, 1, 16, 2, [shorts(31, 63, 0, 31, 21, 4095)], (b"sBIT", b"\x05\x06\x0c")),
        [(1, 1, 0), (1, 1 / 3, 1)],
    ),
    "bits of each channel, one of them all, PNG": (
        png(1, 1, 16, 2, [shorts(31, 13107, 4095)], (b"sBIT", b"\x05\x10\x0c")),
        [(1, 0.2, 1)],
    ),
    "a maximum of each channel, TIFF": (
        tiff(1, shorts(31, 21, 4095, order="<"), t258=[16] * 3, t262=[2], t277=[3], t281=[31, 63, 4095]),
        [(1, 1 / 3, 1)],
    ),
    "an sBIT that means nothing, PNG": (png(1, 1, 16, 0, [shorts(13107)], (b"sBIT", b"\xc8")), [0.2]),
    # As PNG wants it, such samples are scaled up: a dark picture stays dark.
    "12 of 16 bits, PNG, shifted": (png(2, 1, 16, 0, [shorts(0, 3920)], (b"sBIT", b"\x0c")), [0, 3920 / 65535]),
    "12 of 16 bits, PNG, repeated": (
        png(2, 1, 16, 0, [shorts(*((v << 4 | v >> 8) for v in (100, 250)))], (b"sBIT", b"\x0c")),
        [(100 << 4) / 65535, (250 << 4) / 65535],
    ),
    "12 of 16 bits, PNG, multiplied": (
        png(2, 1, 16, 0, [shorts(*(round(v * 65535 / 4095) for v in (100, 251)))], (b"sBIT", b"\x0c")),
        [100 / 4095, 251 / 4095],
    ),
    # 32 bits.
    "32 bits, TIFF": (pillow(array([[0, 2**30, 2**31 - 1]], np.int32, "I"), "TIFF"), RAMP),
    "32 bits without a sign, TIFF": (tiff(3, struct.pack("<3I", 0, 2**31, 2**32 - 1), t258=[32]), RAMP),
    "float, TIFF": (pillow(array([[0, 0.25, 1]], np.float32, "F"), "TIFF"), [0, 0.25, 1]),
    "float, TIFF, rounded": (
        pillow(array([[-1e-8, 0.25, 1.0000001]], np.float32, "F"), "TIFF"),
        [0, 0.25, 1],
    ),
    "float, TIFF, white is zero": (tiff(2, struct.pack("<2f", 0, 0.25), t258=[32], t262=[0], t339=[3]), [1, 0.75]),
    "float, PFM": (b"Pf 3 1 -1.0\n" + struct.pack("<3f", 0, 0.25, 1), [0, 0.25, 1]),
    # Alpha, over white.
    "colour with alpha": (
        pillow(modal("RGBA", [(0, 0, 0, 255), (0, 0, 0, 0), (255, 0, 0, 51)]), "PNG"),
        [0, 1, (1, 0.8, 0.8)],
    ),
    "colour with alpha, WebP": (
        pillow(modal("RGBA", [(0, 0, 0, 255), (0, 0, 0, 0), (255, 0, 0, 51)]), "WEBP", lossless=True, exact=True),
        [0, 1, (1, 0.8, 0.8)],
    ),
    "colour with alpha, TGA": (pillow(modal("RGBA", [(0, 0, 0, 0), (0, 0, 255, 255)]), "TGA"), [1, (0, 0, 1)]),
    "grey with alpha": (pillow(modal("LA", [(0, 255), (0, 0), (0, 51)]), "PNG"), [0, 1, 0.8]),
    "grey with alpha, TIFF": (pillow(modal("LA", [(0, 255), (0, 0)]), "TIFF"), [0, 1]),
    "colour with alpha multiplied in": (
        tiff(2, bytes([51, 0, 0, 51, 51, 0, 0, 255]), t258=[8] * 4, t262=[2], t277=[4], t338=[1]),
        [(1, 0.8, 0.8), (0.2, 0, 0)],
    ),
    "palette with an alpha channel, TIFF": (
        tiff(
            3,
            bytes([0, 255, 1, 255, 1, 0]),
            **{"t258": [8, 8], "t262": [3], "t277": [2], "t338": [2], "t320": [0, 65535, *[0] * 766]},
        ),
        [0, (1, 0, 0), 1],
    ),
    "colour in planes, TIFF": (
        tiff(1, bytes([0, 128, 255]), t258=[8] * 3, t262=[2], t277=[3], t284=[2], t279=[1] * 3),
        [(0, 128 / 255, 1)],
    ),
    "16 bits, colour in planes, TIFF": (
        tiff(1, shorts(0, 255, 65535, order="<"), t258=[16] * 3, t262=[2], t277=[3], t284=[2], t279=[2] * 3),
        [(0, 255 / 65535, 1)],
    ),
    "16 bits, colour in planes, TIFF, big-endian": (
        tiff(1, shorts(0, 255, 65535), ">", t258=[16] * 3, t262=[2], t277=[3], t284=[2], t279=[2] * 3),
        [(0, 255 / 65535, 1)],
    ),
    "16 bits, colour with alpha in planes, TIFF": (
        tiff(
            2,
            shorts(0, 0, 0, 13107, 0, 0, 32768, 65535, order="<"),
            **{"t258": [16] * 4, "t262": [2], "t277": [4], "t284": [2], "t279": [4] * 4, "t338": [2]},
        ),
        [32767 / 65535, (0, 0.2, 0)],
    ),
    "a channel that is no alpha": (
        tiff(2, bytes([51, 0, 0, 51, 51, 0, 0, 255]), t258=[8] * 4, t262=[2], t277=[4], t338=[0]),
        [(0.2, 0, 0), (0.2, 0, 0)],
    ),
    "palette with alphas": (pillow(palette_image(bytes([255, 0, 51])), "PNG"), [(1, 0, 0), 1, 0.8]),
    "palette with a transparent colour": (pillow(palette_image(2), "PNG"), [(1, 0, 0), (0, 1, 0), 1]),
    "palette with a transparent colour, GIF": (pillow(palette_image(2), "GIF"), [(1, 0, 0), (0, 1, 0), 1]),
    "a transparent colour": (
        pillow(modal("RGB", [(0, 0, 51), (0, 51, 0)]), "PNG", transparency=(0, 0, 51)),
        [1, (0, 0.2, 0)],
    ),
    "a transparent colour of 16 bits": (
        png(2, 1, 16, 2, [shorts(256, 512, 769, 256, 512, 768)], (b"tRNS", shorts(256, 512, 768))),
        [(256 / 65535, 512 / 65535, 769 / 65535), 1],
    ),
    "a transparent grey": (pillow(array([[0, 51]], np.uint8), "PNG", transparency=0), [1, 0.2]),
    "a transparent grey of 1 bit": (png(2, 1, 1, 0, [bytes([0x40])], (b"tRNS", shorts(0))), [1, 1]),
    "a transparent grey of 2 bits": (png(4, 1, 2, 0, [bytes([0b00011011])], (b"tRNS", shorts(1))), [0, 1, 2 / 3, 1]),
    "a transparent grey of 4 bits": (png(2, 1, 4, 0, [bytes([0x03])], (b"tRNS", shorts(3))), [0, 1]),
    "a transparent grey of 16 bits": (
        png(3, 1, 16, 0, [shorts(1000, 1001, 65535)], (b"tRNS", shorts(1000))),
        [1, 1001 / 65535, 1],
    ),
    # Other colour spaces.
    "CMYK, TIFF": (
        pillow(modal("CMYK", [(0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 0), (0, 255, 255, 0)]), "TIFF"),
        [1, 0, (0, 1, 1), (1, 0, 0)],
    ),
    "LAB, TIFF": (pillow(modal("LAB", [(0, 128, 128), (255, 128, 128)]), "TIFF"), [0, 1]),
}
if int(PIL.__version__.split(".")[0]) >= 13:  # before, Pillow does not know these files
    CASES["grey with alpha multiplied in"] = (
        tiff(2, bytes([51, 51, 51, 255]), t258=[8, 8], t277=[2], t338=[1]),
        [1, 0.2],
    )
# Files of deeper samples of which Pillow gives 8 bits.
EIGHT_BITS = {"16 bits, JPEG 2000", "16 bits, colour PPM"}


@pytest.fixture
def write(tmp_path):
    def write(content, name="picture.png"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_read_as_a_viewer_shows_it(write, name, channels):
    content, pixels = CASES[name]
    # A file is what it holds, not what it is called.
    image = read_image(write(content, "picture.xyz"), channels=channels)
    seen = np.array(in_colour(pixels), dtype=np.float64)
    expected = seen.T if channels == 3 else (seen @ [0.299, 0.587, 0.114])[None]
    assert image.dtype == torch.float32 and image.shape == (channels, 1, len(pixels)) and image.is_contiguous()
    deep = name not in EIGHT_BITS and any(word in name for word in ("16 bits", "32 bits", "float", "12 bits", "4095"))
    tolerance = 1e-5 if deep else 1.01 * BYTE
    assert np.abs((image[:, 0].double().numpy() + 1) / 2 - expected).max() <= tolerance


@pytest.mark.parametrize("channels", [1, 3])
def test_training_reads_the_same_pictures(tmp_path, channels):
    for number, (content, pixels) in enumerate(CASES.values()):
        if len(pixels) >= 2:
            (tmp_path / f"{number:03}.png").write_bytes(content)
    config = DataConfig(source="folder", folder=tmp_path, channels=channels, resolution=1)
    dataset = open_dataset(config, "all")
    assert len(dataset) > 40
    for index, (path, _) in enumerate(dataset.files):
        whole, image = read_image(path, channels=channels), dataset.item(index, 0)[0]
        left = (whole.shape[2] - 1) // 2
        assert torch.equal(image, whole[:, :, left : left + 1])


ORIENTED = np.array([[10, 60, 110], [160, 210, 250]], dtype=np.uint8)


def stored_as(orientation, pixels):
    """Pixels that a camera in this orientation stores, so that `pixels` are shown."""
    inverse = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    turned = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).T,
        8: np.rot90,
    }[inverse](pixels)
    return Image.fromarray(np.ascontiguousarray(turned))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "TIFF, 16 bits", "PNG, alpha"])
def test_orientation(write, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = ORIENTED.repeat(16, 0).repeat(16, 1)
    image = stored_as(orientation, large.astype(np.uint16) * 257 if kind == "TIFF, 16 bits" else large)
    if kind == "PNG, alpha":
        image = image.convert("LA")
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    path = write(pillow(image, kind.split(",")[0], exif=exif, **options))
    seen = read_image(path, channels=1)
    assert seen.shape == (1, *large.shape)
    assert torch.equal(((seen[0, 8::16, 8::16] + 1) * 127.5).round(), torch.from_numpy(ORIENTED).float())


def test_orientation_behind_the_pixels_of_a_png(write):
    exif = Image.Exif()
    exif[0x0112] = 3
    content = pillow(Image.fromarray(ORIENTED), "PNG", exif=exif)
    start = content.index(b"eXIf") - 4
    chunk = content[start : start + 12 + int.from_bytes(content[start : start + 4], "big")]
    behind = content.replace(chunk, b"")
    behind = behind[:-12] + chunk + behind[-12:]  # before IEND
    seen = read_image(write(behind), channels=1)
    assert torch.equal(((seen[0] + 1) * 127.5).round(), torch.from_numpy(np.rot90(ORIENTED, 2).copy()).float())


def test_damaged_or_odd_exif_data_hides_no_picture(write):
    image = Image.fromarray(ORIENTED)
    exif = Image.Exif()
    for orientation in (0, 9, 65535):
        exif[0x0112] = orientation
        assert read_image(write(pillow(image, "PNG", exif=exif)), channels=1).shape == (1, 2, 3)
    for data in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        assert read_image(write(pillow(image, "JPEG", exif=data)), channels=1).shape == (1, 2, 3)


def test_a_crop_is_taken_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((32, 96), dtype=np.uint8)
    pixels[:, 32:64] = 255
    stored_as(6, pixels).save(tmp_path / "a.png", exif=exif)
    image, _ = open_dataset(DataConfig(source="folder", folder=tmp_path), "all").item(0, 0)
    assert torch.equal(image, torch.ones(3, 32, 32))


def test_the_background_shows_through(write, tmp_path):
    path = write(pillow(modal("LA", [(0, 0), (0, 255)]), "PNG"))
    deep = write(png(2, 1, 16, 4, [shorts(0, 0, 0, 65535)]), "deep.png")
    for background, seen in (
        ("white", (1, 1, 1)),
        ("black", (0, 0, 0)),
        ("#ff0033", (1, 0, 0.2)),
        ("#f03", (1, 0, 0.2)),
        ((255, 0, 51), (1, 0, 0.2)),
        ([255, 0, 51], (1, 0, 0.2)),
    ):
        for file in (path, deep):
            image = read_image(file, background=background)
            expected = torch.tensor([seen, (0, 0, 0)]).T * 2.0 - 1
            assert torch.allclose(image[:, 0], expected, atol=1e-6)
            grey = read_image(file, channels=1, background=background)
            luma = torch.tensor([0.299, 0.587, 0.114]) @ torch.tensor(seen, dtype=torch.float32)
            assert abs((grey[0, 0, 0] + 1) / 2 - luma) < BYTE and grey[0, 0, 1] == -1
    for background in ("black", "#ff0033"):
        config = DataConfig(
            folder=FolderOptions(tmp_path, background=background), source="folder", channels=3, resolution=1
        )
        image, _ = open_dataset(config, "all").item(1, 0)
        assert torch.equal(image, read_image(path, background=background)[:, :, :1])


@pytest.mark.parametrize(
    "background", ["whit", "", "#12", "#11223344", "white ", None, 3, (1, 2), (0, 0, 256), (0.5,) * 3]
)
def test_a_background_that_is_no_colour(write, background):
    with pytest.raises(ValueError, match="background: expected a colour such as 'white'"):
        read_image(write(CASES["8-bit grey"][0]), background=background)
    if isinstance(background, str):
        with pytest.raises(ValueError, match="background: expected a colour"):
            FolderOptions(background=background)
    assert parse_colour("Red") == (255, 0, 0)


def test_ink_under_transparency_is_seen_when_shrunk(tmp_path):
    """Colour under full transparency must not show through at the edges either."""
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[..., 0] = 255  # red, and transparent
    pixels[16:48, 16:48] = (0, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "ink.png")
    image, _ = open_dataset(DataConfig(source="folder", folder=tmp_path, channels=3, resolution=16), "all").item(0, 0)
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    assert image[0, 0, 0] == 1 and image[0, 8, 8] == -1


def test_deep_pictures_are_resized_as_shallow_ones(tmp_path):
    ramp = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8)
    folders = {}
    for name, image in (
        ("8", Image.fromarray(ramp)),
        ("16", Image.fromarray(ramp.astype(np.uint16) * 257)),
        ("32", Image.fromarray(ramp.astype(np.int32) * (2**31 // 255))),
        ("f", Image.fromarray(ramp.astype(np.float32) / 255)),
    ):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "a.tiff")
        for side in (16, 80):
            options = FolderOptions(tmp_path / name, fit="enlarge")
            config = DataConfig(source="folder", folder=options, channels=3, resolution=side)
            folders[name, side] = open_dataset(config, "all").item(0, 0)[0]
    for side in (16, 80):
        shallow = folders["8", side]
        assert shallow.shape == (3, side, side)
        for name in ("16", "32", "f"):
            assert (folders[name, side] - shallow).abs().max() < 4 * BYTE
            assert folders[name, side].abs().max() <= 1


def test_jpeg_of_inks(write):
    """Adobe's CMYK JPEGs hold inverted inks."""
    image = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    content = pillow(image, "JPEG", quality=100)
    assert torch.equal(read_image(write(content)), torch.ones(3, 16, 16))
    assert b"Adobe" in content
    black = pillow(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG", quality=100)
    assert torch.equal(read_image(write(black)), -torch.ones(3, 16, 16))


def wide_gamut():
    """An RGB profile with other primaries than sRGB's: its bytes, and what its pure red is in sRGB."""
    profile = ImageCms.createProfile("sRGB")
    data = bytearray(ImageCms.ImageCmsProfile(profile).tobytes())
    tags = struct.unpack_from(">I", data, 128)[0]
    entries = [struct.unpack_from(">4sII", data, 132 + 12 * i) for i in range(tags)]
    places = {name: place for name, *place in entries}
    # Red and green exchanged: a viewer that reads the profile shows pure red as green.
    red, green = places[b"rXYZ"][0], places[b"gXYZ"][0]
    data[red : red + 20], data[green : green + 20] = data[green : green + 20], data[red : red + 20]
    start, length = places[b"desc"]
    return bytes(
        data[:start] + data[start : start + length].replace(b"s\0R\0G\0B", b"a\0b\0c\0d") + data[start + length :]
    )


def test_colour_profiles_are_applied(write):
    profile = wide_gamut()
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        seen = read_image(write(pillow(red, kind, icc_profile=profile)))[:, 0, 0]
        assert seen[1] > 0.9 and seen[0] < -0.8, kind
    translucent = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    seen = read_image(write(pillow(translucent, "PNG", icc_profile=profile)))[:, 0, 0]
    assert seen[1] > 0.9 and abs(seen[0]) < 0.1
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 0, 0])
    assert read_image(write(pillow(palette, "PNG", icc_profile=profile)))[1, 0, 0] > 0.9
    # A profile for other channels, a damaged one and sRGB's own change nothing.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = read_image(write(pillow(red, "PNG")))
    for same in (srgb, profile[:200], b"x"):
        assert torch.equal(read_image(write(pillow(red, "PNG", icc_profile=same))), plain)
    grey = Image.new("L", (1, 1), 77)
    assert torch.equal(
        read_image(write(pillow(grey, "PNG", icc_profile=profile))), read_image(write(pillow(grey, "PNG")))
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_read_and_that_is_said(write, tmp_path, caplog, kind):
    frames = [Image.new("L", (4, 4), value) for value in (0, 255, 128)]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = write(pillow(frames[0], kind, save_all=True, append_images=frames[1:], **options), f"a.{kind.lower()}")
    write(pillow(frames[0], kind), f"b.{kind.lower()}")
    with caplog.at_level(logging.INFO):
        assert torch.equal(read_image(path), torch.full((3, 4, 4), -1.0))
        assert caplog.messages == [f"{path}: holds more than one frame, the first is read"]
        caplog.clear()
        read_image(tmp_path / f"b.{kind.lower()}")
        assert not caplog.messages
        for split in ("train", "all"):
            config = DataConfig(source="folder", folder=tmp_path, resolution=4, held_out_fraction=0)
            assert open_dataset(config, split).item(0, 0)[0].max() == -1
    assert caplog.messages == [
        f"{tmp_path}: files with several frames, of which the first is read: 1 (a.{kind.lower()})"
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"no image at all", "it is a text file"),
        (b"<!doctype html><html></html>", "it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(8), "it is a PNG image, but damaged"),
        (
            pillow(array([[0.5, 1.5]], np.float32), "TIFF"),
            r"floating point: expected values in 0\.\.1, got 0\.5\.\.1\.5",
        ),
        (pillow(array([[-0.5, 1]], np.float32), "TIFF"), r"floating point: expected values in 0\.\.1, got -0\.5\.\.1"),
        (pillow(array([[np.nan, 1]], np.float32), "TIFF"), r"floating point: expected values in 0\.\.1, got nan"),
        (pillow(array([[np.inf, 1]], np.float32), "TIFF"), r"floating point: expected values in 0\.\.1, got .*inf"),
        (pillow(array([[-7, 9]], np.int32), "TIFF"), "signed integers: expected none below 0, got -7"),
        (tiff(1, struct.pack("<h", -3), t258=[16], t339=[2]), "signed integers: expected none below 0, got -3"),
        (tiff(1, struct.pack("<b", -3), t258=[8], t339=[2]), "signed integers: expected none below 0, got -3"),
        (tiff(2, bytes(2), t258=[8], t257=[3]), "its strips hold less than 2x3 pixels"),
        (
            tiff(1, bytes(8), t258=[16] * 4, t262=[5], t277=[4], t284=[2], t279=[2] * 4),
            "16-bit channels, one after the other, are read only of uncompressed RGB",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(write, tmp_path, content, words):
    path = write(content)
    with pytest.raises(ValueError, match=rf"picture\.png: not a readable image \({words}"):
        read_image(path)
    with pytest.raises(ValueError, match=rf"picture\.png: broken image file \({words}"):
        open_dataset(DataConfig(source="folder", folder=tmp_path, resolution=1), "all")


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "TIFF, deflated", "WEBP", "PPM", "TGA", "16 bits"]
)
def test_a_file_cut_off_is_refused_or_whole(write, kind):
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if kind == "16 bits":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 251)
    kind, options = {
        "TIFF, deflated": ("TIFF", {"compression": "tiff_deflate"}),
        "16 bits": ("PNG", {}),
    }.get(kind, (kind, {}))
    content = pillow(image, kind, **options)
    whole = read_image(write(content))
    refused = 0
    for length in {*range(0, len(content), 61), len(content) - 200, len(content) - 60}:
        try:
            seen = read_image(write(content[:length]))
        except ValueError as error:
            assert str(error).startswith(str(write(b""))) and "\n" not in str(error)
            refused += 1
        else:
            assert torch.equal(seen, whole), length
    assert refused > len(content) // 61 * 0.8


def test_bombs_missing_files_and_folders(write, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ValueError, match=r"large\.png: not a readable image \(DecompressionBombError: "):
        read_image(write(pillow(Image.new("L", (9, 1)), "PNG"), "large.png"))
    with pytest.raises(FileNotFoundError, match=r"image file not found: .*none\.png$"):
        read_image(tmp_path / "none.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FileNotFoundError, match=r"image file not found: .*folder\.png: it is a folder"):
        read_image(tmp_path / "folder.png")
    for channels in (2, 4, 0, "3"):
        with pytest.raises(ValueError, match="channels: expected 1"):
            read_image(tmp_path / "none.png", channels=channels)
    assert read_image(str(write(CASES["16 bits, PNG"][0]))).shape == (3, 1, 4)


def test_the_plain_case_is_what_pillow_gives(write):
    """Eight bits of colour without anything else: no detour."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    content = pillow(Image.fromarray(noise), "JPEG")
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    for channels, mode in ((3, "RGB"), (1, "L")):
        pixels = torch.from_numpy(np.array(shown.convert(mode), dtype=np.float32).reshape(16, 16, channels))
        assert torch.equal(read_image(write(content), channels=channels), pixels.permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("channels", [True, 2, "3", None])
def test_other_channels_are_refused(tmp_path, channels):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"channels: expected 1 \(grey\) or 3 \(colour\), got"):
        read_image(tmp_path / "a.png", channels=channels)
