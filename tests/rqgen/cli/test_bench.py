"""`rqgen bench sampling`, with priors that draw in an instant."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rqgen.cli.bench import machine, sampling
from rqgen.cli.bench.published import PublishedSampling
from rqgen.cli.bench.sampling import SamplingBench
from rqgen.models import RQTransformer, RQTransformerConfig
from rqgen.models.sampler import make_sampler
from rqgen.models.transformer import TransformerConfig

SMALL = ["--width", 16, "--heads", 2, "--spatial-layers", 2, "--depth-layers", 1, "--codebook-size", 32]


def small_prior(shape, **settings):
    stacks = {"spatial": TransformerConfig(2, 2), "depth": TransformerConfig(1, 2)}
    config = RQTransformerConfig(shape, codebook_size=11, code_dim=4, embed_dim=16, **stacks, **settings)
    prior = RQTransformer(config, torch.randn(11, 4)).eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return prior


def test_everything_is_measured_and_drawn(rqgen, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "IMAGE_SIDE", 16)
    monkeypatch.setattr(machine, "COPIED", 1 << 10)
    shapes = ["--shape", "2x2x2", "--shape", "4x4x1"]
    more = ["--batch", 1, "--batch", 3, "--precision", "fp32", "--precision", "int8", "--published", "--flat"]
    quick = ["--decoder-channels", 1, "--seconds", 0, "--device", "cpu", "--threads", 1]
    code, out, err = rqgen("bench", "sampling", *SMALL, *shapes, *more, *quick, "--out", tmp_path)
    assert code == 0, err
    assert "AR" in out and "% of the floor" in out
    result = json.loads((tmp_path / "sampling.json").read_text())
    assert result["machine"]["versions"]["torch"] and result["machine"]["threads"] == 1
    assert result["settings"]["codebook_size"] == 32 and result["peaks"]["copy_bytes_per_s"] > 0
    cases = result["cases"]
    contenders = [("rqgen", "fp32"), ("rqgen", "int8"), ("published formulation", "fp32")]
    assert [(case["contender"], case["precision"]) for case in cases] == contenders * 4
    assert [case["layers"] for case in cases[::6]] == [[2, 1], [3, 0]]  # the same budget of layers
    for case in cases:
        assert case["images_per_s"] == pytest.approx(1e3 / (case["ar_ms_per_image"] + case["decoder_ms_per_image"]))
        assert case["percent_of_floor"] == pytest.approx(100 * case["floor_ms_per_image"] / case["ar_ms_per_image"])
    stacked, one = result["cost_law"]
    assert stacked["flat_over_stacked_attention"] > 1 and stacked["measured"]["flat_ar_ms_per_image"] > 0
    assert one["flat_over_stacked"] == 1 and "measured" not in one  # it is its own flat model
    assert np.asarray(Image.open(tmp_path / "sampling.png")).std() > 1


def test_mistakes(rqgen, tmp_path):
    for arguments, words in (
        (["--shape", "8x8"], "--shape: expected three numbers like 8x8x4, got '8x8'"),
        (["--precision", "fp64"], "--precision: expected one of fp32, bf16, int8, got 'fp64'"),
        (["--preset", "2B"], "name must be one of"),
    ):
        code, _, err = rqgen("bench", "sampling", *SMALL, *arguments, "--device", "cpu", "--out", tmp_path)
        assert code == 1 and words in err and err.count("\n") == 1


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 2, 1)])
def test_the_published_formulation_draws_the_same_likeliest_codes(shape):
    condition = {"condition": "class", "condition_vocab_size": 5} if shape[2] > 1 else {}
    prior = small_prior(shape, **condition)
    condition_bl = prior.condition_ids(torch.arange(5) if condition else None, 5)
    depth = shape[2]
    settings = {"temperature": [1.0] * depth, "top_k": [1] * depth, "top_p": [None] * depth, "seed": 0}
    ours = make_sampler(prior, "fp32", True).sample(condition_bl, condition_bl.new_empty(5, 0, depth), **settings)
    assert torch.equal(PublishedSampling(prior).draw(condition_bl, top_k=1), ours)


def test_the_published_formulation_draws_from_what_is_kept():
    prior = small_prior((2, 2, 2))
    condition_bl = prior.condition_ids(None, 400)
    first = PublishedSampling(prior).draw(condition_bl, top_k=3, top_p=0.9)[:, 0, 0]
    logits = prior(torch.zeros(1, 2, 2, 2, dtype=torch.int64)).logits[0, 0, 0, 0]
    best, order = logits.topk(3)
    kept = (best.softmax(0).cumsum(0) - best.softmax(0)) < 0.9
    assert set(first.tolist()) == set(order[kept].tolist())
    with pytest.raises(ValueError, match="prior: the published formulation"):
        PublishedSampling(small_prior((2, 2, 2), depth_context="previous"))


@pytest.mark.parametrize(("preset", "layers"), [("90M", (24, 4)), ("1.4B", (42, 6))])
def test_presets_keep_their_layers_at_every_shape(preset, layers):
    settings = dict.fromkeys(SamplingBench.__dataclass_fields__)
    bench = SamplingBench(**{**settings, "precisions": [], "preset": preset, "codebook_size": 64})
    for shape, expected in (((8, 8, 4), layers), ((16, 16, 1), (sum(layers), 0))):
        config = bench.prior_config(shape)
        assert (config.spatial.layers, config.depth.layers) == expected and config.code_shape == shape
