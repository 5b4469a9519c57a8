"""`rqgen encode`."""

import pytest
import torch
from PIL import Image

from rqgen.checks import DIGIT_NAMES
from rqgen.data import DataConfig, open_dataset, read_codes, read_image
from rqgen.models.rqtransformer import RQTransformer
from rqgen.models.rqvae import RQVAE


def test_encode_writes_the_codes_of_every_image(rqgen, trained, tmp_path):
    tokenizer = trained[0] / "model"
    file = tmp_path / "codes.safetensors"
    code, out, err = rqgen("encode", "--tokenizer", tokenizer, "--out", file, "--split", "held_out")
    assert code == 0, err
    encoded, images = read_codes(file), open_dataset(DataConfig(), "held_out")
    assert torch.equal(encoded.codes[:70], RQVAE.from_pretrained(tokenizer).encode(images.images[:70]))
    assert torch.equal(encoded.labels, images.labels) and encoded.class_names == DIGIT_NAMES
    assert encoded.info["split"] == "held_out" and f"{len(images)} images as 4x4x4 codes" in out


def test_a_prior_learns_from_codes_on_disk(rqgen, trained, tmp_path, small_prior):
    tokenizer = trained[0] / "model"
    file = tmp_path / "codes.safetensors"
    assert rqgen("encode", "--tokenizer", tokenizer, "--out", file, "--split", "train")[0] == 0
    arguments = ["--out", tmp_path / "prior", f"tokenizer={tokenizer}", f"codes={file}", *small_prior, "loop.steps=2"]
    code, _, err = rqgen("train", "prior", *arguments)
    assert code == 1 and "prior.soft_labels=false" in err
    hard = ["prior.soft_labels=false", "prior.stochastic_codes=false"]
    code, _, err = rqgen("train", "prior", *arguments, *hard, "--out", tmp_path / "hard")
    assert code == 0, err
    assert RQTransformer.from_pretrained(tmp_path / "hard" / "model").config.condition_vocab_size == 10


def test_encode_mistakes(rqgen, trained, tmp_path):
    tokenizer = trained[0] / "model"
    for more, words in (
        (["--split", "test"], "error: --split: expected one of train, held_out, all, got 'test'"),
        (["resolution=64"], "error: resolution: 64, but the tokenizer is for images of 32x32"),
        (["sourc=digits"], "did you mean 'source'"),
        (["source=folder"], "folder: expected a path"),
        (["--tokenizer", trained[1] / "model"], "holds no tokenizer, but a rqtransformer"),
        (["--out", tmp_path / "x.npz", "--tokenizer", "nowhere"], "--out: codes are written as safetensors"),
        (["folder.background=whit"], "folder.background: expected a colour"),
    ):
        code, _, err = rqgen("encode", "--tokenizer", tokenizer, "--out", tmp_path / "x", *more)
        assert code == 1 and words in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_picture_is_one_line(rqgen, trained, tmp_path, recwarn):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("L", (32, 32)).save(pictures / "whole.tif", compression="tiff_deflate")
    content = (pictures / "whole.tif").read_bytes()
    (pictures / "cut.tif").write_bytes(content[:-7])  # Pillow warns about this, without a name
    with pytest.warns(UserWarning, match="PIL|EXIF|Truncated"), pytest.raises(ValueError, match=r"cut\.tif"):
        read_image(pictures / "cut.tif")
    recwarn.clear()
    arguments = ["--tokenizer", trained[0] / "model", "source=folder", f"folder={pictures}"]
    code, _, err = rqgen("encode", *arguments, "--out", tmp_path / "codes.safetensors")
    assert code == 1 and err.count("\n") == 1 and "cut.tif: broken image file (" in err
    code, _, err = rqgen("encode", *arguments, "folder.on_broken=skip", "--out", tmp_path / "codes.safetensors")
    assert code == 0, err
    assert len(read_codes(tmp_path / "codes.safetensors").labels) == 1
    assert not list(recwarn)
