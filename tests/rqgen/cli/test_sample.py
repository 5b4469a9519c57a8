"""`rqgen sample`."""

import numpy as np
import torch
from PIL import Image

from rqgen.checks import DIGIT_NAMES
from rqgen.data import read_codes
from rqgen.data.grid import grid_size
from rqgen.models.rqvae import RQVAE


def test_sample_writes_a_row_per_class(rqgen, trained, tmp_path):
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
    sampled = read_codes(tmp_path / "s.safetensors")
    assert sampled.labels.tolist() == [3] * 4 + [7] * 4 and sampled.class_names == DIGIT_NAMES
    # The same seed samples the same images, however they are batched; another seed samples others.
    files = ["--out", tmp_path / "t.png", "--codes", tmp_path / "t.safetensors", "--batch-size", 3]
    assert rqgen("sample", *models, *arguments, *files)[0] == 0
    assert torch.equal(read_codes(tmp_path / "t.safetensors").codes, sampled.codes)
    # In a shorter precision hardly any code of a few images differs: these are told apart in the tests of `generate`.
    assert rqgen("sample", *models, *arguments, *files, "--precision", "int8", "--no-graphs")[0] == 0
    assert rqgen("sample", *models, *arguments, *files, "--seed", 6)[0] == 0
    assert not torch.equal(read_codes(tmp_path / "t.safetensors").codes, sampled.codes)


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
        # Refused before anything is read.
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
