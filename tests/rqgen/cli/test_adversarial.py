"""`rqgen train tokenizer` with a perceptual distance and a discriminator, both systems."""

from __future__ import annotations

import csv
import hashlib
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from rqgen.cli.settings import RECIPES
from rqgen.config import load
from rqgen.systems.var import VARTokenizerRun

SMALL = [
    "model.base_channels=8",
    "model.channel_multipliers=[1,1,1,1]",
    "model.z_channels=8",
    "model.quantizer.codebook_size=16",
    "loop.batch_size=16",
    "loop.optimizer.warmup_steps=2",
    "loop.checkpoint_every=2",
    "loop.log_every=1",
    "loop.steps=4",
    "loop.tensorboard=false",
]
DISCRIMINATOR = ["adversarial.base_channels=4", "adversarial.layers=1", "adversarial.start_step=1"]
TERMS = {"perceptual", "adversarial", "adaptive_weight", "discriminator", "real_logits", "fake_logits"}

Command = Callable[..., tuple[Any, str, str]]


def export(path: Path, *, seed: int = 0) -> Path:
    """A network of random convolutions for grey images of 32 pixels, by torch.export."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2)).eval()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    torch.export.save(torch.export.export(network, (torch.zeros(2, 1, 32, 32),), dynamic_shapes=shapes), path)
    return path


def read_history(folder: Path) -> list[dict[str, str]]:
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("system", ["rq", "var"])
def test_a_tokenizer_trains_against_a_discriminator_and_resumes(
    system: str, rqgen: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    network, out, cut = export(tmp_path / "net.pt2"), tmp_path / "whole", tmp_path / "cut"
    settings = [*SMALL, *DISCRIMINATOR, f"perceptual.features={network}", "perceptual.weight=0.5"]
    code, printed, err = rqgen("train", "tokenizer", "--system", system, "--out", out, *settings)
    assert code == 0, err
    assert "logits " in printed
    assert f"perceptual.features: SHA-256 {hashlib.sha256(network.read_bytes()).hexdigest()}" in caplog.messages
    history = read_history(out)
    assert [{name for name in TERMS if row[name]} for row in history] == [{"perceptual"}, TERMS, TERMS, TERMS]
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["adversarial"]["start_step"] == 1 and written["adversarial"]["weight"] == 0.75
    assert written["perceptual"]["features"] == str(network)

    # Resumed, with the network in another place.
    shutil.copytree(out / "checkpoints" / "step-00000002", cut / "checkpoints" / "step-00000002")
    moved = network.rename(tmp_path / "moved.pt2")
    code, _, err = rqgen("train", "tokenizer", "--out", cut, "--resume")
    assert code == 1 and f"there is no file {network}" in err and "perceptual.features=PATH" in err
    code, _, err = rqgen("train", "tokenizer", "--out", cut, "--resume", f"perceptual.features={moved}")
    assert code == 0, err
    for file in ("config.json", "model.safetensors"):
        assert (cut / "model" / file).read_bytes() == (out / "model" / file).read_bytes()
    assert read_history(cut) == history


def test_another_network_or_section_is_another_run(rqgen: Command, tmp_path: Path) -> None:
    network, other = export(tmp_path / "net.pt2"), export(tmp_path / "other.pt2", seed=1)
    for name, settings, change, words in (
        ("features", [f"perceptual.features={network}"], f"perceptual.features={other}", "'perceptual_files.features'"),
        ("plain", [], "adversarial.weight=0.5", "'adversarial' was None"),
        ("adversarial", DISCRIMINATOR, "adversarial.weight=0.5", "'adversarial.weight' was 0.75"),
    ):
        out = tmp_path / name
        code, _, err = rqgen("train", "tokenizer", "--out", out, *SMALL, *settings, "loop.steps=2")
        assert code == 0, err
        code, _, err = rqgen("train", "tokenizer", "--out", out, "--resume", "loop.steps=4", change)
        assert code == 1 and "cannot resume" in err and words in err, err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["perceptual.weight=0.5"], "perceptual.vgg: expected the path of torchvision's VGG16 (usually vgg16-397923af"),
        (["perceptual.vgg=no.pth"], "there is no file "),
        (["perceptual.features=no.pt2"], "(usually NAME.pt2)"),
        (["adversarial.layers=4"], "adversarial.layers: expected at most 3 for images of 32 pixels"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    settings: list[str], words: str, rqgen: Command, tmp_path: Path
) -> None:
    code, _, err = rqgen("train", "tokenizer", "--out", tmp_path / "out", *SMALL, *settings)
    assert code == 1 and words in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "losses.md"
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "photos_var.yaml"
    path.write_text(text)
    run = load(VARTokenizerRun, path, [], recipes=RECIPES)
    assert run.perceptual is not None and run.adversarial is not None
    assert run.adversarial.optimizer.learning_rate == 1e-4 and run.adversarial.optimizer.beta1 == 0.5


def test_config_shows_the_sections(rqgen: Command, tmp_path: Path) -> None:
    for system in ("rq", "var"):
        code, out, err = rqgen("config", "train", "tokenizer", "--system", system)
        assert code == 0, err
        content = yaml.safe_load(out)
        assert content["adversarial"] is None and content["perceptual"] is None
        for line in ("#   weight: 0.75", "#   loss: hinge", "#     beta1: 0.5", "#   vgg: null"):
            assert f"\n{line}\n" in out
    _, out, _ = rqgen("config", "train", "tokenizer", "adversarial.start_step=7")
    assert yaml.safe_load(out)["adversarial"]["optimizer"]["beta2"] == 0.9 and "\n  start_step: 7\n" in out
    # Its lines without the marks of comments are the section.
    _, out, _ = rqgen("config", "train", "tokenizer")
    head, _, section = out.partition("\nadversarial: null\n")
    path = tmp_path / "mine.yaml"
    path.write_text(head + "\nadversarial:\n" + "\n".join(line[2:] for line in section.splitlines()))
    code, again, err = rqgen("config", "train", "tokenizer", "--config", path)
    assert code == 0, err
    assert yaml.safe_load(again)["adversarial"]["weight"] == 0.75
