"""`rqgen train`: folders, resuming, and mistakes in settings."""

import shutil

import pytest
import torch
import yaml
from PIL import Image

from rqgen.cli.app import main
from rqgen.cli.settings import RECIPES
from rqgen.config import load
from rqgen.models.rqtransformer import RQTransformer
from rqgen.models.rqvae import RQVAE
from rqgen.systems.rq import RQPriorRun, RQTokenizerRun


def test_a_run_leaves_model_checkpoints_logs_and_settings(trained):
    tokenizer, prior = trained
    for folder in trained:
        assert sorted(path.name for path in folder.iterdir()) == [
            "checkpoints",
            "config.yaml",
            "history.csv",
            "model",
            "tensorboard",
        ]
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
            "step-00000002",
            "step-00000003",
        ]
    assert RQVAE.from_pretrained(tokenizer / "model").codebook_size == 16
    model = RQTransformer.from_pretrained(prior / "model")
    assert model.config.condition_vocab_size == 10
    assert torch.equal(model.codebooks, RQVAE.from_pretrained(tokenizer / "model").codebooks)
    written = load(RQTokenizerRun, tokenizer / "config.yaml")
    assert written.loop.steps == 3 and written.model.base_channels == 8


def test_resume_ends_where_an_uninterrupted_run_ends(rqgen, trained, tmp_path, small_tokenizer, small_prior):
    tokenizer, prior = trained
    for name, source, more in (
        ("tokenizer", tokenizer, small_tokenizer),
        ("prior", prior, [f"tokenizer={tokenizer / 'model'}", *small_prior]),
    ):
        out = tmp_path / name
        shutil.copytree(source / "checkpoints" / "step-00000002", out / "checkpoints" / "step-00000002")
        code, _, err = rqgen("train", name, "--out", out, "--resume", *more, "loop.steps=3")
        assert code == 0, err
        for file in ("config.json", "model.safetensors"):
            assert (out / "model" / file).read_bytes() == (source / "model" / file).read_bytes()


def test_an_old_run_is_not_overwritten(rqgen, trained, small_tokenizer):
    code, _, err = rqgen("train", "tokenizer", "--out", trained[0], *small_tokenizer, "loop.steps=3")
    assert code == 1 and "already holds a run: --resume" in err and err.count("\n") == 1


def test_nothing_to_resume(rqgen, tmp_path, small_tokenizer):
    code, _, err = rqgen("train", "tokenizer", "--out", tmp_path / "new", "--resume", *small_tokenizer)
    assert code == 1 and "no checkpoint in" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tokenizer", "loop.step=3"], ["unknown key 'loop.step'", "'loop.steps'"]),
        (["tokenizer", "loop.steps=many"], ["loop.steps", "many"]),
        (["tokenizer", "loop.steps"], ["section.key=value"]),
        (["tokenizer", "--config", "digit_tokenizer"], ["did you mean 'digits_tokenizer'"]),
        (["tokenizer", "--config", "nowhere.yaml"], ["config file not found: nowhere.yaml"]),
        (["tokenizer", "data.resolution=16", "model.resolution=32"], ["data.resolution: 16", "32x32"]),
        (["tokenizer", "data.channels=3", "model.image_channels=1"], ["data.channels: 3", "1 channels"]),
        (["tokenizer", "data.classes=[0,11]"], ["unknown class '11'"]),
        (["tokenizer", "loop.batch_size=4000"], ["batch_size: expected at most"]),
        (["prior", "tokenizer=nowhere"], ["nowhere"]),
    ],
)
def test_mistakes_are_one_clear_line(rqgen, tmp_path, arguments, words):
    code, out, err = rqgen("train", *arguments, "--out", tmp_path / "run")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("RQGEN_DEBUG", "0")  # restored afterwards, whatever --debug sets
    with pytest.raises(ValueError, match=r"loop\.step"):
        main(["--debug", "train", "tokenizer", "loop.step=3", "--out", str(tmp_path)])


def test_a_folder_of_images_trains(rqgen, tmp_path, small_tokenizer):
    for name, value in (("dark", 20), ("light", 220)):
        for number in range(4):
            path = tmp_path / "images" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (32, 32), value + number).save(path)
    (tmp_path / "images" / "dark" / "broken.png").write_bytes(b"?")
    data = ["data.source=folder", f"data.folder={tmp_path / 'images'}", "loop.batch_size=4", "loop.steps=1"]
    small = [setting for setting in small_tokenizer if "batch_size" not in setting]
    code, _, err = rqgen("train", "tokenizer", "--out", tmp_path / "run", *small, *data)
    assert code == 1 and "broken.png: broken image file" in err
    code, _, err = rqgen("train", "tokenizer", "--out", tmp_path / "other", *small, *data, "data.folder.on_broken=skip")
    assert code == 0, err


def test_every_shipped_configuration_is_valid():
    for name, kind in (
        ("digits_tokenizer", RQTokenizerRun),
        ("photos_tokenizer", RQTokenizerRun),
        ("digits_prior", RQPriorRun),
    ):
        load(kind, RECIPES / f"{name}.yaml")
    assert yaml.safe_load((RECIPES / "demo.yaml").read_text())
