"""`rqgen scaling`, with sizes and steps that take seconds."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from rqgen.cli import scaling
from rqgen.cli.app import main
from rqgen.cli.scaling import load_scaling
from rqgen.config import to_dict
from rqgen.data import DataConfig, open_dataset
from rqgen.evaluation import evaluate_token_prediction, fit_power_law
from rqgen.models import VAR, MultiScaleVQVAE

SMALL = [
    "depths=[3,1,2]",
    "tokenizer.model.base_channels=8",
    "tokenizer.model.channel_multipliers=[1,1,1,1]",
    "tokenizer.model.z_channels=8",
    "tokenizer.model.quantizer.codebook_size=16",
    "tokenizer.model.quantizer.scales=[1,4]",
    "tokenizer.model.quantizer.refinements=1",
    "tokenizer.loop.batch_size=16",
    "tokenizer.loop.steps=3",
    "prior.loop.batch_size=8",
    "prior.loop.steps=3",
    "prior.loop.optimizer.warmup_steps=2",
]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    out = tmp_path_factory.mktemp("scaling") / "out"
    with pytest.raises(SystemExit) as left:
        main(["scaling", "--out", str(out), *SMALL])
    assert not left.value.code
    return out, json.loads((out / "scaling.json").read_text())


def test_every_size_is_trained_on_the_same_tokens(family):
    out, result = family
    assert [member["depth"] for member in result["members"]] == [1, 2, 3]
    vae = MultiScaleVQVAE.from_pretrained(out / "tokenizer" / "model")
    held_out = open_dataset(DataConfig(), "held_out")
    assert result["held_out_images"] == len(held_out) and result["tokens_per_image"] == 17
    for depth, member in zip((1, 2, 3), result["members"], strict=True):
        prior = VAR.from_pretrained(out / f"d{depth}" / "model")
        config = prior.config
        assert (config.layers, config.heads, config.embed_dim) == (depth, depth, 64 * depth)
        assert config.drop_path == pytest.approx(0.1 * depth / 24)
        assert torch.equal(prior.quantizer.codebook, vae.codebooks)
        assert member["width"] == 64 * depth and member["training_tokens"] == 3 * 8 * 17
        assert member["learning_rate"] == pytest.approx(4e-3 / depth)
        assert member["block_parameters"] == pytest.approx(73_728 * depth**3, rel=0.02)
        assert member["block_parameters"] < member["parameters"] and member["seconds"] > 0
        expected = evaluate_token_prediction(prior, vae, held_out)
        for name in scaling.CURVES:
            assert member[name] == pytest.approx(getattr(expected, name), rel=1e-6)
        assert 0 < member["training_loss"] < 2 * math.log(16)
    assert len({member["loss"] for member in result["members"]}) == 3


def test_the_laws_the_table_and_the_figure(family):
    out, result = family
    members = result["members"]
    assert [law["name"] for law in result["laws"]] == list(scaling.CURVES)
    for law in result["laws"]:
        expected = fit_power_law([m["block_parameters"] for m in members], [m[law["name"]] for m in members])
        assert (law["alpha"], law["log_beta"]) == (expected.alpha, expected.log_beta)
        assert law["correlation"] == expected.correlation
    with open(out / "scaling.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == members
    assert np.asarray(Image.open(out / "scaling.png")).std() > 1
    assert {"device", "versions", "commit", "threads"} <= set(result["environment"])
    assert result["config"]["prior"]["loop"]["steps"] == 3 and result["tokenizer_seconds"] > 0
    names = {"scaling.csv", "scaling.json", "scaling.png", "run.json", "tokenizer", "d1", "d2", "d3"}
    assert {path.name for path in out.iterdir()} == names


def test_what_is_finished_is_not_trained_again(rqgen, family, monkeypatch):
    out, result = family
    trained = []
    fit = scaling.fit_prior
    monkeypatch.setattr(
        scaling, "fit_prior", lambda run, *a, **k: trained.append(run.prior.preset) or fit(run, *a, **k)
    )
    monkeypatch.setattr(scaling, "fit_tokenizer", None)
    (out / "scaling.csv").unlink()
    (out / "d1" / "metrics.json").unlink()
    code, text, err = rqgen("scaling", "--out", out, "--resume", *SMALL)
    assert code == 0, err
    assert trained == ["d1"] and (out / "scaling.csv").exists()
    again = json.loads((out / "scaling.json").read_text())
    assert again["laws"] == result["laws"]
    law = result["laws"][0]
    assert f"N)^{law['alpha']:.4f}, correlation {law['correlation']:.4f}" in text
    assert "table and figure of 3 sizes" in text
    # Sizes may be added.
    code, _, err = rqgen("scaling", "--out", out, "--resume", *SMALL, "depths=[1,2,3,4]")
    assert code == 0 and trained == ["d1", "d4"], err
    code, _, err = rqgen("scaling", "--out", out, *SMALL)
    assert code == 1 and "is not empty: --resume resumes a run there" in err
    code, _, err = rqgen("scaling", "--out", out, "--resume", *SMALL, "prior.loop.steps=4")
    assert code == 1 and "'config.prior.loop.steps' was 3 there and is 4 now" in err
    assert trained == ["d1", "d4"]


def test_a_trained_tokenizer_is_taken_and_another_one_noticed(rqgen, family, tmp_path, monkeypatch):
    out, result = family
    trained = []
    fit = scaling.fit_prior
    monkeypatch.setattr(
        scaling, "fit_prior", lambda run, *a, **k: trained.append(run.prior.preset) or fit(run, *a, **k)
    )
    folder = tmp_path / "tokenizer"
    vae = MultiScaleVQVAE.from_pretrained(out / "tokenizer" / "model")
    vae.save_pretrained(folder)
    other = tmp_path / "other"
    code, _, err = rqgen("scaling", "--out", other, "--tokenizer", folder, *SMALL)
    assert code == 0, err
    assert sorted(trained) == ["d1", "d2", "d3"] and not (other / "tokenizer").exists()
    again = json.loads((other / "scaling.json").read_text())
    assert again["laws"] == result["laws"] and again["tokenizer_seconds"] is None
    with torch.no_grad():
        vae.quantizer.codebook.add_(0.1)
    vae.save_pretrained(folder)
    code, _, err = rqgen("scaling", "--out", other, "--tokenizer", folder, "--resume", *SMALL)
    assert code == 1 and "d1: trained on the tokens of another tokenizer" in err
    code, _, err = rqgen("scaling", "--out", other, "--resume", *SMALL)
    assert code == 1 and "'tokenizer' was " in err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.json", "{", "not valid JSON"),
        ("run.json", "{}", "'config' was None there"),
        ("run.json", '{"config": 3, "tokenizer": null}', "'config' was 3 there"),
        ("d2/metrics.json", "[]", "expected a JSON object, got list"),
        ("d2/metrics.json", "{}", "'block_parameters' is missing"),
        ("tokenizer/metrics.json", '{"seconds": "x"}', "seconds: expected a number, got 'x'"),
        ("tokenizer/metrics.json", '{"seconds": 1, "more": 2}', "'more' is unknown"),
    ],
)
def test_damaged_files_of_a_family_are_named(rqgen, family, name, text, words):
    path = family[0] / name
    whole = path.read_bytes()
    path.write_text(text)
    code, _, err = rqgen("scaling", "--out", family[0], "--resume", *SMALL)
    path.write_bytes(whole)
    assert code == 1 and str(path) in err and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["depths=[2,3]"], "depths: a fit needs at least three sizes, got [2, 3]"),
        (["depths=[2,3,3]"], "depths: expected each size once, got [2, 3, 3]"),
        (["depths=[0,1,2]"], "depths: expected numbers of layers, got [0, 1, 2]"),
        (["prior.prior.layers=2"], "prior.prior.layers: depths decide it, but it is set to 2"),
        (["prior.prior.preset=d2"], "prior.prior.preset: depths decide it"),
        (["prior.codes=some.safetensors"], "prior.codes: a family learns from prior.data"),
        (["prior.data.held_out_fraction=0"], "held_out_fraction: 0 leaves no images to test on"),
        (["prior.data.split_seed=4"], "one split for both"),
        (["prior.data.resolution=16"], "data.resolution: 16, but the tokenizer is for images of 32x32"),
        (["--tokenizer", "no/such/folder"], "no/such/folder"),
        (["--resume"], "--resume: no run in"),
        (["depth=[1,2,3]"], "did you mean 'depths'"),
    ],
)
def test_mistakes(rqgen, tmp_path, arguments, words):
    code, _, err = rqgen("scaling", "--out", tmp_path / "out", *arguments)
    assert code == 1 and words in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_shipped_family():
    config = load_scaling(None)
    assert config.depths == [1, 2, 3, 4, 6] and config.tokenizer.data == config.prior.data
    loops = [config.member(depth).loop for depth in config.depths]
    assert len({(loop.steps, loop.batch_size, loop.seed) for loop in loops}) == 1
    assert config.member(6).prior.preset == "d6" and config.prior.prior.preset is None


def test_paths_to_images_mean_the_same_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = scaling.load_scaling(None, ["tokenizer.data.folder=photos"])
    found = scaling._with_absolute_images(config, None)
    assert found.tokenizer.data.folder.path == found.prior.data.folder.path == tmp_path / "photos"
    assert found.prior.tokenizer == config.prior.tokenizer  # not read
    # A run of an older version, with the path as it was given.
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(config)}))
    assert to_dict(scaling._with_absolute_images(found, tmp_path / "run.json")) == to_dict(config)


def test_a_missing_tokenizer_is_named_by_its_option(rqgen, tmp_path):
    code, _, err = rqgen("scaling", "--out", tmp_path / "out", "--tokenizer", tmp_path / "nowhere", *SMALL)
    assert code == 1 and err == f"error: --tokenizer: no folder {tmp_path / 'nowhere'}\n"
