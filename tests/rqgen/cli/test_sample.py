"""`rqgen sample`."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from rqgen.checks import DIGIT_NAMES
from rqgen.data import read_codes
from rqgen.data.grid import grid_size
from rqgen.models.rqvae import RQVAE
from rqgen.sampling import Pipeline


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
        (["--prior", prior, "--tokenizer", tokenizer, "--class", "1" * 5000], "--class: expected 0..9, got 1111"),
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


def test_sample_takes_the_folders_that_evaluate_takes(rqgen, trained, tmp_path):
    """Two trainings, one training, one model: each as RUN; the folders of trainings also by their options."""
    tokenizer, prior = trained
    both, mixed = tmp_path / "both", tmp_path / "mixed"
    for folder, parts in ((both, trained), (mixed, (tokenizer, prior / "model"))):
        folder.mkdir()
        for name, part in zip(("tokenizer", "prior"), parts, strict=True):
            (folder / name).symlink_to(part)
    last = tmp_path / "last.safetensors"
    common = ["--class", "seven", "--num", 2, "--seed", 3, "--out", tmp_path / "s.png", "--codes", last]
    code, _, err = rqgen("sample", "--prior", prior / "model", "--tokenizer", tokenizer / "model", *common)
    assert code == 0, err
    expected = read_codes(last).codes
    for arguments in (
        [both],
        [mixed],
        [prior],
        [prior / "model"],
        [both, "--tokenizer", tokenizer],
        ["--prior", prior, "--tokenizer", tokenizer],
    ):
        last.unlink()
        code, _, err = rqgen("sample", *arguments, *common)
        assert code == 0, err
        assert torch.equal(read_codes(last).codes, expected)
    assert Pipeline.from_pretrained(both).prior.num_classes == 10


def test_sample_says_which_model_is_missing(rqgen, trained, tmp_path):
    shutil.copytree(trained[1] / "model", tmp_path / "prior")
    unfinished = tmp_path / "unfinished"
    (unfinished / "tokenizer" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (unfinished / "prior").symlink_to(trained[1])
    for arguments, words in (
        ([trained[0]], f"RUN: expected a folder with a prior, but {trained[0]} holds a tokenizer alone"),
        ([tmp_path / "prior"], "--tokenizer: expected the tokenizer's folder, as "),
        ([tmp_path / "nowhere"], "RUN: "),
        ([unfinished], f"RUN: no file config.json in {unfinished / 'tokenizer'}: the training there has not ended"),
        ([unfinished / "tokenizer"], "got neither: the training there has not ended; `rqgen train` with --out "),
        ([tmp_path / "prior", "--prior", trained[1]], "--prior: expected none next to RUN"),
    ):
        code, _, err = rqgen("sample", *arguments, "--out", tmp_path / "s.png")
        assert code == 1 and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize("command", ["encode", "edit", "train"])
def test_every_command_takes_the_folder_of_a_training(rqgen, trained, tmp_path, small_prior, command):
    tokenizer, prior = trained
    if command == "encode":
        code, _, err = rqgen("encode", "--tokenizer", tokenizer, "--out", tmp_path / "c.safetensors")
    elif command == "edit":
        picture = Image.new("L", (32, 32))
        picture.paste(255, (0, 16, 32, 32))
        for name in ("image", "mask"):
            picture.save(tmp_path / f"{name}.png")
        files = ["--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--out", tmp_path / "edited.png"]
        code, _, err = rqgen("edit", "inpaint", *files, "--prior", prior, "--tokenizer", tokenizer)
    else:
        settings = [f"tokenizer={tokenizer}", *small_prior, "loop.steps=1"]
        code, _, err = rqgen("train", "prior", "--out", tmp_path / "prior", *settings)
        assert code == 0, err
        code, _, err = rqgen("sample", tmp_path / "prior", "--num", 1, "--out", tmp_path / "s.png")
    assert code == 0, err
