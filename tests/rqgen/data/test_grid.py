"""Sheets of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from rqgen.data import image_grid, save_png, to_uint8


def test_bytes_of_the_range():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_what_is_no_number_is_no_colour():
    for images in (torch.tensor([0.0, torch.nan]), torch.tensor([torch.nan]).half()):
        with pytest.raises(ValueError, match=r"images: expected numbers in \[-1, 1\], got NaN"):
            to_uint8(images)
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
    save_png(sheet, tmp_path / "deep" / "sheet.png", scale=3)
    pixels = np.asarray(Image.open(tmp_path / "deep" / "sheet.png"))
    assert pixels.shape == (6, 6, 3)
    assert torch.equal(torch.from_numpy(pixels[::3, ::3].copy()).permute(2, 0, 1), sheet)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["sheet.png"]


def test_bad_sheets(tmp_path):
    with pytest.raises(ValueError, match="images: expected"):
        image_grid(torch.zeros(0, 1, 2, 2), 2)
    with pytest.raises(ValueError, match="columns"):
        image_grid(torch.zeros(1, 1, 2, 2), 0)
    with pytest.raises(ValueError, match="sheet: expected uint8"):
        save_png(torch.zeros(1, 2, 2), tmp_path / "x.png")
