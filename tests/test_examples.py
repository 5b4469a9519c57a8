"""Every script of examples/ runs on small data and prints what it is about."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = {"encode_folder", "own_quantizer", "semantic_ids", "train_and_sample"}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SCRIPTS


def test_encode_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.rqvae(
        image_channels=3,
        resolution=16,
        channel_multipliers=[1, 1],
        z_channels=8,
        embed_dim=8,
        code_shape=[8, 8, 3],
        quantizer={"codebook_size": 32, "init": "random"},
    ).save_pretrained(tmp_path / "tokenizer")
    photos = tmp_path / "photos" / "sub"
    photos.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(pixels).save(photos / name)
    (photos / "notes.txt").write_text("no image")

    out = tmp_path / "out.png"
    example("encode_folder").main([str(tmp_path / "tokenizer"), str(photos.parent), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "a.png: codes" in printed and "b.jpg: codes" in printed and "notes" not in printed
    assert [line.split(":")[0] for line in printed.splitlines()[2:]] == ["depth 1", "depth 2", "depth 3"]
    with Image.open(out) as sheet:  # the images and three depths below them, two columns
        assert sheet.width >= 2 * 16 and sheet.height >= 4 * 16

    with pytest.raises(SystemExit):
        example("encode_folder").main([str(tmp_path / "tokenizer"), str(tmp_path / "tokenizer"), "--out", str(out)])
    assert "folder: expected images, found none in" in capsys.readouterr().err


def test_own_quantizer(capsys: pytest.CaptureFixture[str]) -> None:
    example("own_quantizer").main(["--rows", "300", "--codes", "64"])
    printed = capsys.readouterr().out
    assert "Quantizer: " in printed and "FastQuantizer: " in printed
    assert "100.00% of the rows have the same codes" in printed  # these few rows are not near a tie
    assert "gradients: x 1.000" in printed


def test_own_quantizer_keeps_parameters() -> None:
    script = example("own_quantizer")
    model = script.Quantizer(16, 8, depth=2)
    before = model.state_dict()
    model.__class__ = script.FastQuantizer
    assert model.state_dict().keys() == before.keys()
    quantized, loss = model(torch.randn(5, 8))
    assert quantized.shape == (5, 8)
    loss.backward()
    assert model.codebook.grad.abs().sum() > 0


def test_semantic_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "items.npy", np.random.default_rng(0).standard_normal((200, 6)))
    options = ["--embeddings", str(tmp_path / "items.npy"), "--codes", "8", "--iterations", "3"]
    example("semantic_ids").main(options)
    printed = capsys.readouterr().out.splitlines()
    left = [float(line.split()[2].rstrip("%")) for line in printed[:3]]
    assert left[0] > left[1] > left[2]
    assert "for 200 items" in printed[3]
    example("semantic_ids").main(["--items", "300", "--codes", "8", "--iterations", "2", "--depth", "2"])
    assert "for 300 items" in capsys.readouterr().out


def test_train_and_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits.png"
    example("train_and_sample").main(["--steps", "3", "--batch-size", "8", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "tokenizer 0: loss" in printed and "prior 0: loss" in printed
    with Image.open(out) as sheet:  # 40 digits of 16 pixels, four times enlarged
        assert sheet.width >= 10 * 64 and sheet.height >= 4 * 64


def test_embeddings_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(9, dtype=np.float32))
    for arguments, words in (
        (["--embeddings", str(tmp_path / "flat.npy")], "--embeddings: expected an array (N, C), got shape (9,)"),
        (["--items", "10", "--codes", "11"], "--codes: expected 1 to 10, the number of items, got 11"),
        (["--items", "10", "--codes", "0"], "--codes: expected 1 to 10, the number of items, got 0"),
    ):
        with pytest.raises(SystemExit):
            example("semantic_ids").main(arguments)
        assert words in capsys.readouterr().err
