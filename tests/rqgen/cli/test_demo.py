"""`rqgen demo`, with a budget of seconds: every file and every number is there. What it must reach is checked
where it runs in full (`make demo`)."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rqgen import Pipeline
from rqgen.checks import DIGIT_NAMES
from rqgen.cli.app import main
from rqgen.cli.demo import load_demo
from rqgen.data import DataConfig, open_dataset, read_codes
from rqgen.data.grid import grid_size
from rqgen.evaluation import evaluate_reconstruction
from rqgen.models.rqtransformer import RQTransformer
from rqgen.models.rqvae import RQVAE

FIGURES = tuple(
    f"{name}.png" for name in ("reconstructions", "coarse_to_fine", "code_usage", "losses", "samples", "edits")
)


@pytest.fixture(scope="module")
def metrics_of(tmp_path_factory, small_demo):
    def run(seed):
        out = tmp_path_factory.mktemp("demo") / "out"
        with pytest.raises(SystemExit) as left:
            main(["demo", "--seed", str(seed), "--out", str(out), *small_demo])
        assert not left.value.code
        return out, json.loads((out / "metrics.json").read_text())

    return run


@pytest.fixture(scope="module")
def demo(metrics_of):
    return metrics_of(3)


def test_every_file_is_written(demo):
    out, _ = demo
    assert {path.name for path in out.iterdir()} == {*FIGURES, "metrics.json", "tokenizer", "prior", "pipeline.json"}
    for name in FIGURES:
        assert np.asarray(Image.open(out / name)).std() > 1
    # Ten of each class: ten rows of ten images of 32 pixels, and their names before them.
    height, width = grid_size(100, 10, (32, 32), row_labels=DIGIT_NAMES)
    assert height == 10 * 34 + 2 and width > 10 * 34 + 2
    assert Image.open(out / "samples.png").size == (2 * width, 2 * height)


def test_the_folder_is_a_pipeline(demo, rqgen, tmp_path):
    out, _ = demo
    pipe = Pipeline.from_pretrained(out)
    assert pipe.class_names == DIGIT_NAMES
    sampled = pipe("seven", num=2, seed=4)
    assert len(sampled.images) == 2 and sampled.images[0].size == (32, 32)
    files = ["--out", tmp_path / "s.png", "--codes", tmp_path / "s.safetensors"]
    code, _, err = rqgen("sample", out, "--class", "seven", "--num", 2, "--seed", 4, *files)
    assert code == 0, err
    assert torch.equal(read_codes(tmp_path / "s.safetensors").codes, sampled.codes)
    code, _, err = rqgen("sample", out, "--prior", out / "prior")
    assert code == 1 and err == f"error: --prior: expected none next to RUN, {out}, got {out / 'prior'}\n"
    code, _, err = rqgen("sample", tmp_path / "nowhere")
    assert code == 1 and "nowhere" in err and err.count("\n") == 1


def test_models_are_in_our_format(demo):
    out, metrics = demo
    vae, prior = RQVAE.from_pretrained(out / "tokenizer"), RQTransformer.from_pretrained(out / "prior")
    assert vae.depth == len(metrics["codes_used"]) == 4 and prior.config.condition_vocab_size == 10


def test_metrics(demo):
    out, metrics = demo
    assert metrics["seed"] == 3 and metrics["samples"] == 100 and 290 <= metrics["held_out_images"] <= 310
    assert set(metrics["seconds"]) == {
        *("tokenizer", "prior", "sampling", "evaluation", "precisions", "inpainting", "figures", "total")
    }
    assert all(taken > 0 for taken in metrics["seconds"].values())
    assert metrics["classifier_test_accuracy"] >= 0.97
    assert 0 <= metrics["sample_accuracy"] <= 1 and len(metrics["sample_accuracy_per_class"]) == 10
    assert np.mean(metrics["sample_accuracy_per_class"]) == pytest.approx(metrics["sample_accuracy"])
    for precision in ("bf16", "int8"):
        effect = metrics["precisions"][precision]
        assert len(effect["kl"]) == len(effect["same_likeliest"]) == 4 and all(0 < kl < 1e-2 for kl in effect["kl"])
        assert 0 <= effect["sample_accuracy"] <= 1 and effect["weight_error"]["depth classifier"] > 0
    assert {"python", "torch", "rqkernels"} <= set(metrics["versions"])
    held_out = open_dataset(DataConfig(), "held_out")
    quality = evaluate_reconstruction(RQVAE.from_pretrained(out / "tokenizer"), held_out)
    assert metrics["reconstruction_mse"] == pytest.approx(quality.mse, rel=1e-4)
    assert metrics["codes_used"] == quality.codes_used


def test_the_same_seed_gives_the_same_run(demo, metrics_of):
    out, metrics = demo
    again, repeated = metrics_of(3)
    for folder in ("tokenizer", "prior"):
        first, second = ((path / folder / "model.safetensors").read_bytes() for path in (out, again))
        assert first == second
    for key in metrics.keys() - {"seconds"}:
        assert metrics[key] == repeated[key]
    other = metrics_of(4)[1]
    assert other["reconstruction_mse"] != metrics["reconstruction_mse"]


def test_the_shipped_demo_uses_soft_labels_stochastic_codes_and_one_split():
    config = load_demo(7)
    assert config.prior.prior.soft_labels and config.prior.prior.stochastic_codes
    assert config.tokenizer.data == config.prior.data and config.tokenizer.data.split_seed == 0
    assert config.tokenizer.loop.seed == config.prior.loop.seed == config.sampling.seed == 7
    assert config.sampling.count == 500 and config.tokenizer.model.code_shape == [4, 4, 4]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prior.data.split_seed=9", "one split for both"),
        ("sampling.count=50", "count: expected a multiple of 10"),
        ("sampling.cfg=1", "did you mean 'sampling.cfg_scale'"),
    ],
)
def test_mistakes(rqgen, tmp_path, override, words):
    code, _, err = rqgen("demo", "--out", tmp_path / "out", override)
    assert code == 1 and words in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
