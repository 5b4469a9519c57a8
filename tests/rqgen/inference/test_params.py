"""Sampling settings: checked once, resolved for every level."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from rqgen.inference import Engine, LevelParams, SamplingParams
from rqgen.models import load_pretrained
from rqgen.sampling import generate

SAVED = Path(__file__).parents[2] / "data" / "models_v1"
PRIORS = {name: load_pretrained(SAVED / name / "prior") for name in ("rq", "var")}


def test_settings_are_frozen_plain_numbers():
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=torch.tensor([3, 4]), top_p=[0.5, None], seed=np.int64(7)
    )
    assert params == SamplingParams(temperature=0.5, top_k=(3, 4), top_p=(0.5, None), seed=7)
    assert hash(params) == hash(dataclasses.replace(params)) and type(params.seed) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": -1}, ValueError, "temperature: expected a finite number >= 0, got -1.0"),
        ({"temperature": [1.0, "hot"]}, TypeError, r"temperature\[1\]: expected a number, got 'hot'"),
        ({"top_k": 0}, ValueError, "top_k: expected an integer >= 1, got 0"),
        ({"top_p": [1.5]}, ValueError, r"top_p\[0\]: expected a number in \(0, 1\], got 1.5"),
        ({"cfg_scale": True}, TypeError, "cfg_scale: expected a number or None, got True"),
        ({"seed": -1}, ValueError, "seed: expected an integer in"),
        ({"offset": 1.0}, TypeError, "offset: expected an integer, got 1.0"),
        ({"smooth": 1}, TypeError, "smooth: expected True or False, got 1"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_where_it_is_given(settings, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**settings)
    with pytest.raises(error, match=message):
        SamplingParams.of(None, settings)


def test_keywords_replace_fields():
    params = SamplingParams(top_k=5, seed=3)
    assert SamplingParams.of(params, {"seed": 4}) == SamplingParams(top_k=5, seed=4)
    assert SamplingParams.of(params, {"top_k": None}) == SamplingParams(seed=3)
    for name, words in (
        ("topk", "did you mean 'top_k'"),
        ("guidance_scale", "cfg_scale is guidance_scale - 1"),
        ("sed", "did you mean 'seed'"),
    ):
        with pytest.raises(TypeError, match=f"{name}: unknown; {words}"):
            SamplingParams.of(params, {name: 1})


@pytest.mark.parametrize("system", PRIORS)
def test_every_level_has_an_entry(system):
    prior = PRIORS[system]
    resolved = SamplingParams(temperature=[0.5, 1, 2], top_k=4).resolve(prior, None)
    assert resolved == LevelParams((0.5, 1.0, 2.0), (4, 4, 4), (None, None, None)) and resolved.copies == 1
    axis = {"rq": "depth", "var": "scale"}[system]
    with pytest.raises(ValueError, match=rf"top_p: expected one value, or 3 \(one per {axis}\), got 2"):
        SamplingParams(top_p=[0.5, 0.5]).resolve(prior, None)
    guided = SamplingParams(cfg_scale=1.5).resolve(prior, torch.tensor([[0]]))
    assert guided.cfg_scale == {"rq": (1.5, 1.5, 1.5), "var": (0.0, 0.75, 1.5)}[system] and guided.copies == 2
    assert SamplingParams(cfg_scale=0).resolve(prior, None).cfg_scale == ()
    with pytest.raises(ValueError, match="cfg_scale: guidance needs a condition"):
        SamplingParams(cfg_scale=1).resolve(prior, None)


def test_smooth_sampling_is_of_a_var():
    assert SamplingParams(smooth=True).resolve(PRIORS["var"], None).smooth
    with pytest.raises(
        ValueError, match="smooth: expected False, as a prior of type RQTransformer has no smooth sampling, got True"
    ):
        SamplingParams(smooth=True).resolve(PRIORS["rq"], None)


@pytest.mark.parametrize("system", PRIORS)
def test_params_and_keywords_sample_the_same(system):
    prior, vae = PRIORS[system], load_pretrained(SAVED / system / "tokenizer")
    settings = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "cfg_scale": 1.0, "seed": 3, "offset": 2}
    expected = generate(prior, vae, [0, 1], **settings).images
    assert torch.equal(generate(prior, vae, [0, 1], params=SamplingParams(**settings)).images, expected)
    other = SamplingParams(**{**settings, "seed": 4})
    assert torch.equal(generate(prior, vae, [0, 1], params=other, seed=3).images, expected)
    assert not torch.equal(generate(prior, vae, [0, 1], params=other).images, expected)


def test_engines():
    assert Engine.of("bf16") == Engine("bf16") and Engine.of(Engine(use_graphs=False)).use_graphs is False
    for given in ("fp16", None, 8):
        with pytest.raises(ValueError, match="precision: expected one of fp32, bf16, int8, got"):
            Engine.of(given)
    with pytest.raises(TypeError, match="use_graphs: expected True or False, got 'no'"):
        Engine(use_graphs="no")
    with pytest.raises(ValueError, match="precision: a VAR is sampled in 'fp32', got 'int8'"):
        Engine("int8").check_prior(PRIORS["var"])
