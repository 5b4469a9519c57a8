"""Models, images and metrics of a run, by name and by type."""

import pytest
import torch

from rqgen.data import DataConfig
from rqgen.evaluation import EvaluationConfig, Run, evaluate
from rqgen.evaluation.metrics.precision import PrecisionOptions
from rqgen.models import RQVAE, RQVAEConfig


def make_tokenizer():
    config = RQVAEConfig(image_channels=1, resolution=16, base_channels=4, channel_multipliers=[1, 1], norm_groups=2)
    config.num_res_blocks, config.attention_resolutions, config.z_channels, config.embed_dim = 1, [], 4, 4
    config.code_shape, config.quantizer.codebook_size, config.quantizer.depth = [8, 8, 2], 8, 2
    return RQVAE(config).eval()


def test_a_missing_model_is_named():
    run = Run(EvaluationConfig())
    assert run.lacks("tokenizer") == "needs a tokenizer" and run.lacks("prior") == "needs a prior"
    for name in ("tokenizer", "prior", "device"):
        with pytest.raises(ValueError, match=f"Run: expected a {name if name != 'device' else 'model'}, got none"):
            getattr(run, name)


@pytest.mark.parametrize(
    ("need", "words"), [("sample", "did you mean 'samples'"), ("s", "there are: tokenizer, prior")]
)
def test_an_unknown_requirement_is_named(need, words):
    with pytest.raises(ValueError, match=f"needs: unknown requirement '{need}'; {words}"):
        Run(EvaluationConfig()).lacks(need)


def test_models_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="settings: expected EvaluationConfig, got dict"):
        Run({})
    with pytest.raises(TypeError, match="tokenizer: expected Tokenizer, got Linear"):
        Run(EvaluationConfig(), tokenizer=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="prior: expected Prior, got RQVAE"):
        Run(EvaluationConfig(), prior=make_tokenizer())


@pytest.mark.parametrize(
    ("metrics", "error", "words"),
    [
        ([], ValueError, "metrics: expected at least one, got none"),
        ("reconstruction", TypeError, "metrics: expected a list of names, got 'reconstruction'"),
        (["reconstruction", 3], TypeError, "metrics: expected names, got 3"),
        (["reconstruction", "reconstruction"], ValueError, "metrics: expected each once, got 'reconstruction' twice"),
        (["reconstructon"], ValueError, "metric: unknown metric 'reconstructon'; did you mean 'reconstruction'"),
    ],
)
def test_names_of_metrics(metrics, error, words):
    with pytest.raises(error, match=words):
        evaluate(Run(EvaluationConfig(), tokenizer=make_tokenizer()), metrics)


def test_an_empty_split_is_one_reason():
    run = Run(EvaluationConfig(data=DataConfig(held_out_fraction=0)), tokenizer=make_tokenizer())
    reason = r"needs images, but split=held_out has none \(data.held_out_fraction=0\)"
    with pytest.raises(ValueError, match=rf"^metric 'reconstruction' does not fit: {reason}$"):
        evaluate(run, ["reconstruction"])
    with pytest.raises(ValueError, match=r"^no metric fits: ") as caught:
        evaluate(run)
    assert str(caught.value).count("needs images, but split=held_out") == 1


def test_precisions_are_at_least_one_and_each_once():
    with pytest.raises(ValueError, match="precisions: expected at least one, got none"):
        PrecisionOptions(precisions=[])
    with pytest.raises(ValueError, match="precisions: expected each once, got 'bf16' twice"):
        PrecisionOptions(precisions=["bf16", "int8", "bf16"])


def test_a_classifier_of_one_class_is_refused(monkeypatch):
    run = Run(EvaluationConfig(options={"classifier": {"training_images": 2}}))
    monkeypatch.setattr(run, "thumbnails", lambda images, side: (torch.zeros(2, 1, 8, 8), torch.tensor([3, 3])))
    with pytest.raises(ValueError, match=r"classifier\.training_images: expected images of at least two classes, got"):
        _ = run.judge
