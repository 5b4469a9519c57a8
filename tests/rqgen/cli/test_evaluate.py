"""`rqgen evaluate` and `rqgen list`: every metric that fits, by name, with its options; a metric of one's own is a
class."""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rqgen.cli.app import main
from rqgen.cli.evaluate import table
from rqgen.config import load
from rqgen.data import DataConfig, open_dataset
from rqgen.evaluation import (
    EvaluationConfig,
    ImageClassifier,
    Run,
    evaluate,
    evaluate_precision,
    evaluate_reconstruction,
    evaluate_token_prediction,
)
from rqgen.evaluation.metrics import METRICS, Metric, Row, register
from rqgen.models import RQVAE, VAR, MultiScaleVQVAE, RQTransformer
from rqgen.sampling import edit, generate

NAMES = ["classifier", "inpainting", "precision", "reconstruction", "token_prediction"]


def known(names):
    """Those of the metrics above: a new one needs no change here."""
    return [name for name in names if name in NAMES]


@pytest.fixture(scope="module")
def pair(trained, tmp_path_factory):
    """A folder with tokenizer/ and prior/."""
    folder = tmp_path_factory.mktemp("pair")
    for source, name in zip(trained, ("tokenizer", "prior"), strict=True):
        shutil.copytree(source / "model", folder / name)
    return folder


@pytest.fixture
def evaluated(rqgen, tmp_path):
    """Runs the command: what it wrote, and what it printed."""

    def run(*arguments):
        file = tmp_path / "found.json"
        code, out, err = rqgen("evaluate", *arguments, "--out", file)
        assert code == 0, err
        return json.loads(file.read_text()), out

    return run


@pytest.fixture
def refused(rqgen, tmp_path):
    """Runs the command, which must fail in one line and write nothing: that line."""

    def run(*arguments):
        code, out, err = rqgen("evaluate", *arguments, "--out", tmp_path / "refused.json")
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and not out
        assert not (tmp_path / "refused.json").exists()
        return err

    return run


def test_every_metric_that_fits_is_computed_as_its_function_says(evaluated, pair):
    settings = ["sampling.cfg_scale=0.5", "sampling.seed=3", "inpainting.count=10", "precision.precisions=[int8]"]
    found, out = evaluated(pair, "--count", 30, *settings)
    assert known(found["metrics"]) == NAMES and not known(found["not_computed"]) and found["failed"] == {}
    results = {name: metric["result"] for name, metric in found["metrics"].items()}
    vae, prior = RQVAE.from_pretrained(pair / "tokenizer"), RQTransformer.from_pretrained(pair / "prior")
    train, held_out = (open_dataset(DataConfig(), split) for split in ("train", "held_out"))
    quality = evaluate_reconstruction(vae, held_out)
    assert results["reconstruction"] == {
        "mse": pytest.approx(quality.mse, rel=1e-6),
        "codes_used": quality.codes_used,
        "perplexity": pytest.approx(quality.perplexity),
    }
    predicted = evaluate_token_prediction(prior, vae, held_out)
    assert results["token_prediction"]["loss"] == pytest.approx(predicted.loss, rel=1e-6)
    assert results["token_prediction"]["level_losses"] == pytest.approx(predicted.level_losses, rel=1e-6)
    judge, labels = ImageClassifier().fit(train.images, train.labels), torch.arange(30) % 10
    draws = {"cfg_scale": 0.5, "seed": 3}
    samples = generate(prior, vae, labels, **draws).images
    assert results["classifier"]["sample_accuracy"] == judge.accuracy(samples, labels)
    assert results["classifier"]["classifier_test_accuracy"] == judge.accuracy(held_out.images, held_out.labels)
    assert len(results["classifier"]["sample_accuracy_per_class"]) == 10
    with torch.no_grad():
        effect = evaluate_precision(prior, vae.encode(held_out.images), held_out.labels, precision="int8")
    short = generate(prior, vae, labels, precision="int8", **draws).images
    assert list(results["precision"]) == ["int8"]
    assert results["precision"]["int8"]["kl"] == pytest.approx(effect.kl)
    assert results["precision"]["int8"]["sample_accuracy"] == judge.accuracy(short, labels)
    assert results["inpainting"]["images"] == 10 and results["inpainting"]["kept_mse"] > 0
    # What the numbers depend on.
    assert found["protocol"]["split"] == "held_out" and found["protocol"]["images"] == len(held_out)
    assert found["protocol"]["sampling"]["count"] == 30 and found["protocol"]["sampling"]["cfg_scale"] == 0.5
    assert found["protocol"]["data"]["source"] == "digits" and found["seed"] == 3
    for name, folder in (("tokenizer", pair / "tokenizer"), ("prior", pair / "prior")):
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert found["models"][name]["sha256"] == digest and found["models"][name]["folder"] == str(folder)
    assert found["metrics"]["inpainting"]["options"] == {"count": 10}
    assert {"torch", "rqkernels"} <= set(found["versions"]) and found["environment"]["device"]
    # The table shows the same numbers.
    assert re.search(rf"mean squared error, images in \[-1, 1\] +{quality.mse:.4g}", out)
    for name in NAMES:
        assert f"\n{name} " in out


def test_the_demo_and_evaluate_agree(rqgen, evaluated, tmp_path, small_demo, monkeypatch):
    monkeypatch.setattr("rqgen.cli.demo.INPAINTED", 10)
    code, _, err = rqgen("demo", "--out", tmp_path / "demo", *small_demo)
    assert code == 0, err
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    settings = [f"sampling.{key}={value}" for key, value in metrics["protocol"]["sampling"].items()]
    settings = [setting.replace("None", "null") for setting in settings]
    found, _ = evaluated(tmp_path / "demo", *settings, "inpainting.count=10")
    results = {name: metric["result"] for name, metric in found["metrics"].items()}
    assert metrics["reconstruction_mse"] == pytest.approx(results["reconstruction"]["mse"], rel=1e-9)
    assert metrics["sample_accuracy"] == results["classifier"]["sample_accuracy"]
    assert metrics["sample_accuracy_per_class"] == results["classifier"]["sample_accuracy_per_class"]
    assert metrics["precisions"] == results["precision"]
    assert metrics["inpainting"]["accuracy"] == results["inpainting"]["accuracy"]


def test_metrics_by_name(evaluated, refused, pair):
    found, out = evaluated(pair, "--metric", "reconstruction", "--metric", "token_prediction", "images=7")
    assert list(found["metrics"]) == ["reconstruction", "token_prediction"] and found["protocol"]["images"] == 7
    assert "not computed" not in out
    for arguments, words in (
        (["--metric", "reconstructon"], "--metric: unknown metric 'reconstructon'; did you mean 'reconstruction'?"),
        (["classifier.sides=8"], "unknown key 'classifier.sides'; did you mean 'classifier.side'?"),
        (["sampling.cfg=1"], "did you mean 'sampling.cfg_scale'?"),
        (["inpainting.count=0"], "inpainting.count: expected at least 1, got 0"),
        (["sampling.top_p=1.5"], "sampling.top_p: expected a number in (0, 1], got 1.5"),
        (["sampling.temperature=-1"], "sampling.temperature: expected a finite number >= 0, got -1.0"),
        (["precision.precisions=[fp8]"], "'precision.precisions[0]': expected one of bf16, int8, got 'fp8'"),
        (["split=test"], "wrong value at 'split': expected one of held_out, train, all, got 'test'"),
        (["data.resolution=64"], "data.resolution: 64, but the tokenizer is for images of 32x32"),
        (
            ["--metric", "classifier", "classifier.side=5"],
            "needs images whose side is a multiple of classifier.side, 5",
        ),
        (["--metric", "inpainting", "data.held_out_fraction=0"], "needs images, but split=held_out has none"),
    ):
        assert words in refused(pair, *arguments)


def test_the_file_is_json(rqgen, pair, tmp_path):
    code, _, err = rqgen("evaluate", pair, "--metric", "reconstruction", "--out", tmp_path / "found.txt")
    assert code == 1 and "--out: expected a name that ends in .json" in err and not list(tmp_path.iterdir())


def test_one_model_is_judged_by_what_fits(rqgen, evaluated, refused, trained, pair, tmp_path):
    for folder in (trained[0], trained[0] / "model"):
        found, out = evaluated(folder)
        assert known(found["metrics"]) == ["reconstruction"] and list(found["models"]) == ["tokenizer"]
        assert found["not_computed"]["token_prediction"] == "needs a prior"
        assert "not computed:\n  classifier: needs a tokenizer" not in out and "  classifier: needs a prior" in out
    # The training of a prior names its tokenizer; a prior by itself does not.
    for folder in (trained[1], trained[1] / "model"):
        found, _ = evaluated(folder, "--metric", "token_prediction")
        assert set(found["models"]) == {"tokenizer", "prior"}
    assert "'classifier' does not fit: needs a tokenizer" in refused(pair / "prior", "--metric", "classifier")
    found, _ = evaluated(pair / "prior", "--tokenizer", pair / "tokenizer", "--metric", "token_prediction")
    assert found["models"]["tokenizer"]["folder"] == str(pair / "tokenizer")
    assert "--tokenizer: " in refused(pair, "--tokenizer", pair / "prior")
    assert "expected tokenizer/ and prior/, as `rqgen demo` writes them" in refused(tmp_path)
    # Trainings side by side.
    both = tmp_path / "runs"
    both.mkdir()
    for name, source in zip(("tokenizer", "prior"), trained, strict=True):
        (both / name).symlink_to(source)
    assert set(evaluated(both, "--metric", "token_prediction")[0]["models"]) == {"tokenizer", "prior"}


def test_a_prior_of_another_tokenizer_is_refused(refused, pair, tmp_path):
    vae = RQVAE.from_pretrained(pair / "tokenizer")
    with torch.no_grad():
        vae.quantizer.codebooks.add_(1)
    vae.save_pretrained(tmp_path / "other")
    assert "vae: expected the codebooks that the prior was made with" in refused(
        pair, "--tokenizer", tmp_path / "other"
    )


def test_classes_of_other_images_are_no_classes_of_the_prior(evaluated, refused, pair):
    found, _ = evaluated(pair, "data.classes=[1,0]", "--metric", "reconstruction")
    assert found["protocol"]["class_names"] == ["one", "zero"]
    digits = "zero, one, two, three, four, five, six, seven, eight, nine"
    words = f"needs images of the prior's classes: expected 10 classes ({digits}), got one, zero"
    for name in ("classifier", "token_prediction", "precision", "inpainting"):
        assert f"metric '{name}' does not fit: {words}" in refused(pair, "data.classes=[1,0]", "--metric", name)


def test_images_without_classes(evaluated, pair, tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.fromarray(generator.integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / f"photos/{number}.png")
    found, _ = evaluated(pair, f"data.folder={tmp_path / 'photos'}", "split=all")
    # The prior has a null condition.
    assert known(found["metrics"]) == ["inpainting", "precision", "reconstruction", "token_prediction"]
    assert found["not_computed"]["classifier"] == "needs images with labels of two or more classes, got none"
    assert "accuracy" not in found["metrics"]["inpainting"]["result"]
    assert "sample_accuracy" not in found["metrics"]["precision"]["result"]["int8"]


def test_guidance_needs_a_null_condition(evaluated, pair, tmp_path, trained, rqgen, small_prior):
    settings = [f"tokenizer={trained[0] / 'model'}", *small_prior, "prior.condition_dropout=0", "loop.steps=1"]
    code, _, err = rqgen("train", "prior", "--out", tmp_path / "prior", *settings)
    assert code == 0, err
    found, _ = evaluated(tmp_path / "prior", "sampling.cfg_scale=1", "--count", 10)
    assert known(found["metrics"]) == ["precision", "reconstruction", "token_prediction"]
    for name in ("classifier", "inpainting"):
        assert found["not_computed"][name] == "needs a prior with a null condition for sampling.cfg_scale"
    assert "sample_accuracy" not in found["metrics"]["precision"]["result"]["bf16"]


def test_models_that_do_not_know_their_images(evaluated, refused, pair, tmp_path):
    for cls, name in ((RQVAE, "tokenizer"), (RQTransformer, "prior")):
        model = cls.from_pretrained(pair / name)
        model.data = None
        model.save_pretrained(tmp_path / name)
    err = refused(tmp_path, "--metric", "reconstruction")
    assert (
        "metric 'reconstruction' does not fit: needs images: " in err
        and "does not name the images of its training; give data.folder=PATH" in err
    )
    found, _ = evaluated(tmp_path, "data.source=digits", "--metric", "reconstruction")
    assert found["protocol"]["images"] == len(open_dataset(DataConfig(), "held_out"))


def test_a_var_is_judged_too(rqgen, evaluated, tmp_path):
    small = ["model.base_channels=8", "model.channel_multipliers=[1,1,1,1]", "model.z_channels=8"]
    small += ["model.quantizer.codebook_size=16", "model.quantizer.refinements=1", "loop.batch_size=16"]
    loop = ["loop.steps=2", "loop.checkpoint_every=0"]
    prior = ["prior.embed_dim=16", "prior.layers=1", "prior.heads=2", *loop, "loop.batch_size=16"]
    for arguments in (
        ["tokenizer", "--out", tmp_path / "tokenizer", *small, *loop],
        ["prior", "--out", tmp_path / "prior", f"tokenizer={tmp_path / 'tokenizer' / 'model'}", *prior],
    ):
        with pytest.raises(SystemExit) as left:
            main(["train", *map(str, arguments), "--system", "var"])
        assert not left.value.code
    found, _ = evaluated(tmp_path, "--count", 10, "inpainting.count=2")
    assert known(found["metrics"]) == ["classifier", "inpainting", "reconstruction", "token_prediction"]
    assert "sampled in bf16, and a var cannot" in found["not_computed"]["precision"]
    vae = MultiScaleVQVAE.from_pretrained(tmp_path / "tokenizer" / "model")
    prior = VAR.from_pretrained(tmp_path / "prior" / "model")
    held_out = open_dataset(DataConfig(), "held_out")
    predicted = evaluate_token_prediction(prior, vae, held_out)
    assert found["metrics"]["token_prediction"]["result"]["level_losses"] == pytest.approx(predicted.level_losses)
    # Each number stands where its definition puts it.
    images, labels = held_out.images[:2], held_out.labels[:2]
    run = Run(EvaluationConfig(data=DataConfig()), tokenizer=vae, prior=prior, generate=generate, edit=edit)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[16:] = True
    assert torch.equal(run.edit(images, mask, labels).codes[3], edit(prior, vae, images, mask, labels).codes[3])


# --- A metric of one's own


@dataclass
class BrightnessOptions:
    """Options of metric "brightness"."""

    threshold: float = 0.0
    """Lower bound of bright pixels."""


class Brightness(Metric):
    """The share of bright pixels in samples."""

    name = "brightness"
    options = BrightnessOptions
    needs = ("samples",)

    def compute(self, run, options):
        images, labels = run.samples()
        return {"share": (images > options.threshold).double().mean().item(), "drawn": len(labels)}

    def rows(self, result):
        return [Row("bright pixels", 100 * result["share"], "%", "higher")]


class Parameters(Metric):
    """Parameters of the prior."""

    name = "parameters"
    needs = ("prior",)

    def compute(self, run, options):
        return {"millions": sum(parameter.numel() for parameter in run.prior.parameters()) / 1e6}


class Broken(Metric):
    """Fails."""

    name = "broken"
    needs = ("tokenizer",)
    value = float("nan")

    def compute(self, run, options):
        return {"value": self.value}


@pytest.fixture
def own():
    for metric in (Brightness, Parameters):
        register(metric)
    yield
    for metric in (Brightness, Parameters):
        METRICS.remove(metric.name)


def test_a_new_metric_is_found_by_the_command_line(rqgen, own, evaluated, pair, tmp_path):
    found, out = evaluated(pair, "--count", 20, "--metric", "brightness", "brightness.threshold=0.5")
    metric = found["metrics"]["brightness"]
    vae, prior = RQVAE.from_pretrained(pair / "tokenizer"), RQTransformer.from_pretrained(pair / "prior")
    share = (generate(prior, vae, torch.arange(20) % 10).images > 0.5).double().mean().item()
    assert metric["options"] == {"threshold": 0.5} and metric["result"] == {"share": share, "drawn": 20}
    assert f"brightness  bright pixels  {100 * share:.4g}" in out and "higher" in out
    # Without options and rows of its own, on a prior alone.
    found, out = evaluated(pair / "prior")
    assert not known(found["metrics"]) and re.search(r"\nparameters +millions +", out)
    code, out, err = rqgen("list", "metrics")
    assert code == 0 and "  brightness\n    The share of bright pixels in samples.\n" in out
    assert "    brightness.threshold [0.0]\n      Lower bound of bright pixels.\n" in out
    code, out, err = rqgen("config", "evaluate", "brightness.threshold=2")
    assert code == 0 and yaml.safe_load(out)["brightness"] == {"threshold": 2.0}, err
    path = tmp_path / "mine.yaml"
    path.write_text("brightness: {threshold: -2}\nsampling: {count: 10}\n")
    found, _ = evaluated(pair, "--config", path, "--metric", "brightness")
    assert found["metrics"]["brightness"]["result"] == {"share": 1.0, "drawn": 10}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "expected a result that JSON holds"),
        (torch.zeros(2), "expected a result that JSON holds"),
        (None, ""),
    ],
)
def test_a_metric_that_fails_loses_no_other(rqgen, pair, tmp_path, monkeypatch, value, words):
    monkeypatch.setattr(Broken, "value", value)
    if value is None:
        monkeypatch.setattr(Broken, "compute", lambda self, run, options: 1 / 0)
        words = "division by zero"
    register(Broken)
    try:
        out = tmp_path / "found.json"
        code, printed, err = rqgen("evaluate", pair, "--metric", "broken", "--metric", "reconstruction", "--out", out)
        with pytest.raises((ValueError, ZeroDivisionError), match=words):
            vae = RQVAE.from_pretrained(pair / "tokenizer")
            evaluate(Run(EvaluationConfig(), tokenizer=vae), ["broken"])
    finally:
        METRICS.remove("broken")
    assert code == 1 and err.count("\n") == 1 and not printed
    assert "1 of 2 metrics failed (broken: " in err and words in err and str(out) in err
    found = json.loads(out.read_text())
    assert list(found["metrics"]) == ["reconstruction"] and words in found["failed"]["broken"]


def test_no_metric_is_computed_before_all_names_are_looked_at(pair, monkeypatch):
    run = Run(EvaluationConfig(), tokenizer=RQVAE.from_pretrained(pair / "tokenizer"))
    monkeypatch.setattr(METRICS.find("reconstruction", "metric"), "compute", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match="metric 'classifier' does not fit: needs a prior"):
        evaluate(run, ["reconstruction", "classifier"])
    with pytest.raises(ValueError, match="metric: unknown metric 'fid'"):
        evaluate(run, ["reconstruction", "fid"])
    with pytest.raises(ValueError, match=r"no metric fits: .*classifier: needs images: unknown; .*precision.*: needs"):
        evaluate(Run(EvaluationConfig(), no_images="unknown"))
    assert run.lacks("samples") == "needs a prior" and run.lacks("tokenizer", "images") is None


def test_a_table_aligns():
    rows = [("one", Row("first", 0.123456, "%", "lower")), ("one", Row("second", [1, 2])), ("two", Row("x", 3.0))]
    assert table(rows) == [
        "metric  quantity  value   unit  better",
        "------  --------  ------  ----  ------",
        "one     first     0.1235  %     lower",
        "        second    1 2",
        "two     x         3",
    ]


# --- Lists


def test_lists(rqgen):
    code, out, err = rqgen("list")
    assert code == 0, err
    assert [line for line in out.splitlines() if line and line[0] != " "] == [
        "systems:",
        "sources:",
        "metrics:",
        "recipes:",
    ]
    for kind, words in (
        ("systems", ["  rq\n", "RQTransformer: Spatial transformer", "  var\n"]),
        ("sources", ["  digits\n", "    data.folder.fit [crop]\n", "    data.photos.crops_per_epoch [1024]\n"]),
        ("metrics", [f"  {name}\n" for name in NAMES] + ["    classifier.side [8]\n"]),
        ("recipes", ["  photos_tokenizer\n    An RQ-VAE for random crops"]),
    ):
        code, part, err = rqgen("list", kind)
        assert code == 0 and part in out, err
        assert all(word in part for word in words)
        assert max(map(len, part.splitlines())) <= 100
    code, _, err = rqgen("list", "source")
    assert code == 1 and "list: unknown kind 'source'; did you mean 'sources'?" in err


def test_every_module_of_the_folder_is_a_metric():
    folder = Path(__import__("rqgen.evaluation.metrics", fromlist=["x"]).__file__).parent
    assert sorted(path.stem for path in folder.glob("[!_]*.py")) == METRICS.names()
    assert known(METRICS.names()) == NAMES


def test_settings_of_an_evaluation():
    config = load(EvaluationConfig, None, ["classifier.side=4", "data.classes=[3]"])
    assert config.classifier.side == 4 and config.inpainting.count == 200 and config.data.classes == ["3"]
    with pytest.raises(ValueError, match=r"inpainting\.count: expected at most 1000000"):
        load(EvaluationConfig, None, ["inpainting.count=1e9"])
