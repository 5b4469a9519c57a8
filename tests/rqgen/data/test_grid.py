"""Sheets of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from rqgen.data import image_grid, read_image, save_image, to_uint8
from rqgen.data.grid import check_image_name, grid_size


def test_bytes_of_the_range():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_what_is_no_number_is_no_colour():
    for images in (torch.tensor([0.0, torch.nan]), torch.tensor([torch.nan]).half()):
        with pytest.raises(ValueError, match=r"images: expected numbers in \[-1, 1\], got NaN"):
            to_uint8(images)
    with pytest.raises(ValueError, match=r"images: expected numbers in \[-1, 1\], got infinity"):
        to_uint8(torch.tensor([0.0, torch.inf]))
    with pytest.raises(ValueError, match="images: expected a tensor with values, got one on the meta device"):
        to_uint8(torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="got NaN"):
        image_grid(torch.full((2, 1, 3, 3), torch.nan), columns=2)


def test_grid_places_images_row_by_row():
    images = torch.stack([torch.full((1, 2, 3), value) for value in (-1.0, 0.0, 1.0)])
    sheet = image_grid(images, columns=2, gap=1)
    assert sheet.shape == (1, 1 + 2 * 3, 1 + 2 * 4)
    assert (sheet[0, 1:3, 1:4] == 0).all() and (sheet[0, 1:3, 5:8] == 128).all()
    assert (sheet[0, 0] == 255).all() and (sheet[0, 4:6, 5:8] == 255).all()


def test_saved_sheet_reads_back_enlarged(tmp_path):
    sheet = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2) * 20
    save_image(sheet, tmp_path / "deep" / "sheet.png", scale=3)
    pixels = np.asarray(Image.open(tmp_path / "deep" / "sheet.png"))
    assert pixels.shape == (6, 6, 3)
    assert torch.equal(torch.from_numpy(pixels[::3, ::3].copy()).permute(2, 0, 1), sheet)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["sheet.png"]


def test_row_labels_stand_at_the_left():
    images = torch.rand(4, 3, 16, 8) * 2 - 1
    plain = image_grid(images, columns=2)
    for labels in (["circle", "square"], ["a", "a name\nthat is far too long for a sheet"], ["7", "Käse"]):
        sheet = image_grid(images, columns=2, row_labels=labels)
        height, width = grid_size(4, 2, (16, 8), row_labels=labels)
        assert sheet.shape == (3, height, width) and sheet.dtype == torch.uint8
        column = sheet[:, :, : -plain.shape[2]]
        assert torch.equal(sheet[:, :, -plain.shape[2] :], plain)
        assert torch.equal(column[0], column[1]) and torch.equal(column[0], column[2])
        rows = column[0, 2:18], column[0, 20:36]
        assert all(row.min() < 60 for row in rows)  # something is written in both, and nothing between
        assert (column[:, :2] == 255).all() and (column[:, 18:20] == 255).all() and (column[:, 36:] == 255).all()
        assert column.shape[2] < 200
    same = image_grid(images, columns=2, row_labels=["circle", "circle"])
    assert torch.equal(same[:, 2:18, :-24], same[:, 20:36, :-24])
    other = image_grid(images, columns=2, row_labels=["circle", "square"])
    assert not torch.equal(other[:, 2:18, :-24], other[:, 20:36, :-24])
    assert image_grid(images[:, :1, :4], columns=2, row_labels=["x", "y"]).shape[0] == 1  # hardly room for a letter
    for labels in (["x"], ["x", "y", "z"]):
        with pytest.raises(ValueError, match="row_labels: expected one for each of 2 rows"):
            image_grid(images, columns=2, row_labels=labels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("a.png", "PNG"), ("a.PNG", "PNG"), ("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")),
        *(("a.tif", "TIFF"), ("a.tiff", "TIFF"), ("a.bmp", "BMP"), ("a.b.jpg", "JPEG")),
    ],
)
def test_the_name_says_the_format(tmp_path, name, kind, channels):
    sheet = torch.arange(12 * channels, dtype=torch.uint8).reshape(channels, 3, 4) * 7
    save_image(sheet, tmp_path / name, scale=8)
    with Image.open(tmp_path / name) as image:
        assert image.format == kind and image.size == (32, 24)
    seen = ((read_image(tmp_path / name, channels=channels)[:, 4::8, 4::8] + 1) * 127.5).round()
    assert (seen - sheet.float()).abs().max() <= (6 if kind == "JPEG" else 0)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a", "a.npz", "a.pdf", "a.png.txt", ".png", "a.gif", "a.jpg "])
def test_other_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"path: expected a file name that ends in .*\.png.*, got '.*{name}'"):
        save_image(torch.zeros(1, 2, 2, dtype=torch.uint8), tmp_path / "deep" / name)
    assert not list(tmp_path.iterdir())


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    for name, kind, side in (("a.jpg", "JPEG", 65501), ("a.webp", "WEBP", 16384)):
        with pytest.raises(ValueError, match=f"path: a {kind} holds at most {side - 1} pixels a side, .* {side}x1: "):
            save_image(torch.zeros(1, 1, side, dtype=torch.uint8), tmp_path / name)
        check_image_name(tmp_path / name, size=(1, side - 1))
    assert not list(tmp_path.iterdir())


def test_bad_sheets(tmp_path):
    with pytest.raises(ValueError, match="images: expected"):
        image_grid(torch.zeros(0, 1, 2, 2), 2)
    with pytest.raises(ValueError, match="columns"):
        image_grid(torch.zeros(1, 1, 2, 2), 0)
    with pytest.raises(ValueError, match="sheet: expected uint8"):
        save_image(torch.zeros(1, 2, 2), tmp_path / "x.png")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_bytes_are_not_read_as_numbers_between_minus_one_and_one(dtype):
    images = torch.ones(2, 3, 4, 4).to(dtype)
    for function in (to_uint8, lambda given: image_grid(given, columns=2)):
        with pytest.raises(TypeError, match=rf"images: expected floating-point numbers in \[-1, 1\], got {dtype}"):
            function(images)


def test_the_path_of_an_image_may_be_text(tmp_path):
    path = str(tmp_path / "a.png")
    save_image(torch.full((1, 2, 2), 7, dtype=torch.uint8), path, scale=2)
    assert np.asarray(Image.open(path)).tolist() == [[7] * 4] * 4
    for scale, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="scale: expected an integer"):
            save_image(torch.zeros(1, 2, 2, dtype=torch.uint8), path, scale=scale)
