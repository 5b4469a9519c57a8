"""`rqgen encode`, `rqgen sample` and `rqgen convert`."""

import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rqgen.checks import DIGIT_NAMES
from rqgen.data import DataConfig, open_dataset, read_codes, read_image
from rqgen.data.grid import grid_size
from rqgen.models.rqtransformer import RQTransformer
from rqgen.models.rqvae import RQVAE

PUBLISHED = Path(__file__).parents[2] / "data" / "kakaobrain"


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


def test_sample_draws_a_row_per_class(rqgen, trained, tmp_path):
    models = ["--prior", trained[1] / "model", "--tokenizer", trained[0] / "model"]
    arguments = ["--class", 3, "--class", 7, "--num", 4, "--seed", 5, "--cfg-scale", 0.5, "--top-p", 0.9]
    files = ["--out", tmp_path / "s.png", "--codes", tmp_path / "s.safetensors"]
    code, out, err = rqgen("sample", *models, *arguments, *files)
    assert code == 0, err
    assert "8 images" in out
    height, width = grid_size(8, 4, (32, 32), row_labels=("three", "seven"))
    assert (height, width) == (
        2 * 34 + 2,
        4 * 34 + 2 + grid_size(2, 1, (32, 32), row_labels=("three", "seven"))[1] - 36,
    )
    assert np.asarray(Image.open(tmp_path / "s.png")).shape == (2 * height, 2 * width)
    drawn = read_codes(tmp_path / "s.safetensors")
    assert drawn.labels.tolist() == [3] * 4 + [7] * 4 and drawn.class_names == DIGIT_NAMES
    # The same seed draws the same images, however they are batched; another seed draws others.
    files = ["--out", tmp_path / "t.png", "--codes", tmp_path / "t.safetensors", "--batch-size", 3]
    assert rqgen("sample", *models, *arguments, *files)[0] == 0
    assert torch.equal(read_codes(tmp_path / "t.safetensors").codes, drawn.codes)
    # In a shorter precision hardly any code of a few images differs: these are told apart in the tests of `generate`.
    assert rqgen("sample", *models, *arguments, *files, "--precision", "int8", "--no-graphs")[0] == 0
    assert rqgen("sample", *models, *arguments, *files, "--seed", 6)[0] == 0
    assert not torch.equal(read_codes(tmp_path / "t.safetensors").codes, drawn.codes)


def test_sample_mistakes(rqgen, trained, tmp_path):
    prior, tokenizer = trained[1] / "model", trained[0] / "model"
    for arguments, words in (
        (["--prior", prior, "--tokenizer", tokenizer, "--class", 10], "--class: expected 0..9, got 10"),
        (["--prior", tokenizer, "--tokenizer", tokenizer], "holds no prior, but a rqvae"),
        (["--prior", prior, "--tokenizer", tmp_path / "nowhere"], "nowhere"),
        (
            ["--prior", prior, "--tokenizer", tokenizer, "--top-p", 1.5],
            "error: --top-p: expected a number in (0, 1], got 1.5",
        ),
        (
            ["--prior", prior, "--tokenizer", tokenizer, "--precision", "int4"],
            "error: --precision: expected one of fp32",
        ),
        # Refused before anything is read, let alone drawn.
        (["--prior", "nowhere", "--out", tmp_path / "s.npz"], "--out: expected a file name that ends in .bmp, .jpeg"),
        (["--prior", "nowhere", "--out", tmp_path / "s"], "--out: expected a file name that ends in .bmp, .jpeg"),
        (["--prior", "nowhere", "--codes", tmp_path / "c.npz"], "--codes: codes are written as safetensors"),
        (
            ["--prior", prior, "--tokenizer", tokenizer, "--num", 300, "--out", tmp_path / "s.webp"],
            "--out: a WEBP holds at most 16383 pixels a side",
        ),
    ):
        code, _, err = rqgen("sample", "--out", tmp_path / "s.png", *arguments)
        assert code == 1 and words in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    other = RQVAE.from_pretrained(tokenizer)
    other.quantizer.codebook += 1
    other.save_pretrained(tmp_path / "other")
    code, _, err = rqgen("sample", "--prior", prior, "--tokenizer", tmp_path / "other")
    assert code == 1 and "expected the codebooks that the prior was made with" in err
    code, _, err = rqgen("sample", "--prior", prior, "--tokenizer", prior)
    assert code == 1 and "--tokenizer: " in err and "holds no tokenizer, but a rqtransformer" in err
    assert rqgen("sample", "--num", 0)[0] == 2


@pytest.fixture
def published(tmp_path):
    """A published checkpoint as it would lie on disk."""

    def unpack(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in (PUBLISHED / name).iterdir():
            data = file.read_bytes()
            (folder / file.name.removesuffix(".xz")).write_bytes(
                lzma.decompress(data) if file.suffix == ".xz" else data
            )
        return folder / "model.pt"

    return unpack


def test_convert_writes_models_that_load(rqgen, published, tmp_path):
    source = published("rqvae-shared-8x8x4")
    code, out, err = rqgen("convert", "kakaobrain", source, tmp_path / "vae")
    assert code == 0, err
    assert out.startswith("rqvae: ")
    vae = RQVAE.from_pretrained(tmp_path / "vae")
    prior = published("rqtransformer-class")
    for number, tokenizer in enumerate((source, source.parent, tmp_path / "vae")):
        out = tmp_path / f"prior{number}"
        code, _, err = rqgen("convert", "kakaobrain", prior, out, "--tokenizer", tokenizer)
        assert code == 0, err
        assert torch.equal(RQTransformer.from_pretrained(out).codebooks, vae.codebooks)


def test_convert_mistakes(rqgen, tmp_path):
    code, _, err = rqgen("convert", "kakaobrain", tmp_path / "model.pt", tmp_path / "out")
    assert code == 1 and "model.pt" in err and err.count("\n") == 1
    (tmp_path / "model.pt").write_text("<!doctype html><html>Sign in to download</html>")
    code, _, err = rqgen("convert", "kakaobrain", tmp_path / "model.pt", tmp_path / "out")
    page = f"{tmp_path / 'model.pt'}: not a readable torch checkpoint: it is an HTML page"
    assert code == 1 and err == f"error: {page}\n"
    assert not (tmp_path / "out").exists()
