"""Tests of the README: it is short, its examples run and print the promised shapes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch

import rqkernels

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text()
BLOCKS = {
    re.search(r"^import (rq\w+)$", block, re.MULTILINE)[1]: block
    for block in re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def promised(block: str) -> list[str]:
    """Return the outputs that comments behind `print` promise, up to a colon, a comma or the end."""
    return re.findall(r"^print\(.*\)\s+# (torch\.Size\(\[[\d, ]+\]\))", block, re.MULTILINE)


@pytest.fixture
def demo_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write untrained models of the demo's shapes where the demo puts them, and go there."""
    vae = tiny.rqvae(
        resolution=32,
        channel_multipliers=[1, 1, 1, 1],
        z_channels=8,
        embed_dim=8,
        code_shape=[4, 4, 4],
        quantizer={"codebook_size": 32, "init": "random"},
        class_names=DIGITS,
    )
    prior = tiny.rq_prior(vae, num_classes=10, class_names=DIGITS)  # with a null condition, as the demo's prior has one
    vae.save_pretrained(tmp_path / "runs" / "demo" / "tokenizer")
    prior.save_pretrained(tmp_path / "runs" / "demo" / "prior")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("demo_models")
@pytest.mark.parametrize("package", ["rqgen", "rqkernels"])
def test_the_example_runs(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    block = BLOCKS[package]
    exec(compile(block, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert promised(block)
    for text in promised(block):
        assert text in printed


def test_every_python_block_is_run() -> None:
    assert TEXT.count("```python") == len(BLOCKS) == 2


def test_codes_of_the_example_are_certified() -> None:
    """The claim under the example of the operators: the reference finds the same codes."""
    namespace: dict[str, object] = {}
    exec(compile(BLOCKS["rqkernels"], str(README), "exec"), namespace)
    x, codebook, found = namespace["x"], namespace["codebook"], namespace["found"]
    assert torch.equal(rqkernels.reference.residual_search(x, codebook, 4).codes, found.codes)


def test_the_first_screen_is_short() -> None:
    assert len(TEXT.splitlines()) <= 120
