"""Difference of shorter precisions from float32."""

import pytest
import torch

from rqgen.evaluation import evaluate_precision
from rqgen.inference.packed import PackedPrior
from rqgen.models import VAR, RQTransformer, RQTransformerConfig, VARConfig
from rqgen.models.transformer import TransformerConfig
from rqgen.quantizers import MultiScaleConfig, MultiScaleQuantizer

SHAPE = (2, 3, 2)


def make_prior(**settings):
    stack = TransformerConfig(layers=1, heads=2)
    config = RQTransformerConfig(SHAPE, 9, 4, embed_dim=32, spatial=stack, depth=stack, **settings)
    prior = RQTransformer(config, torch.randn(9, 4))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return prior


LAYOUTS = [
    {},
    {"condition": "class", "condition_vocab_size": 3, "condition_dropout": 0.5},
    {"condition": "tokens", "condition_vocab_size": 5, "condition_length": 3},
    {"spatial_embedding": "table", "depth_context": "previous", "shared_classifier": False},
    {"depth_embedding": "table", "shared_table": False},
]


def condition_of(prior, count):
    config = prior.config
    if config.condition == "none":
        return None
    return torch.randint(config.condition_vocab_size, (count, config.condition_length))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())) or "plain")
def test_packed_logits_are_the_prior_s(layout):
    prior = make_prior(**layout).eval()
    codes, condition = torch.randint(9, (5, *SHAPE)), condition_of(prior, 5)
    logits = PackedPrior(prior, "fp32").logits(codes, prior.condition_ids(condition, 5))
    with torch.no_grad():
        torch.testing.assert_close(logits, prior(codes, condition).logits, atol=1e-4, rtol=0)


def test_a_shorter_precision_is_further_away():
    prior = make_prior(**LAYOUTS[1])  # in training mode: dropout must not count
    codes = torch.randint(9, (50, *SHAPE))
    condition = condition_of(prior, 50)[:, 0]
    effects = [
        evaluate_precision(prior, codes, condition, precision=p, batch_size=20) for p in ("fp32", "bf16", "int8")
    ]
    assert effects[0].kl == [0.0, 0.0] and effects[0].same_likeliest == [1.0, 1.0]
    assert max(effects[0].weight_error.values()) == 0
    for effect in effects[1:]:
        assert all(0 < kl < 1e-2 for kl in effect.kl) and all(0.9 < same <= 1 for same in effect.same_likeliest)
        assert {"spatial qkv", "depth mlp_out", "depth classifier"} <= set(effect.weight_error)
    assert prior.training


def test_the_divergence_is_that_of_the_distributions():
    prior = make_prior().eval()
    codes = torch.randint(9, (4, *SHAPE))
    exact, short = (PackedPrior(prior, name).logits(codes, prior.condition_ids(None, 4)) for name in ("fp32", "int8"))
    p, q = exact.double().softmax(-1), short.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean(dim=(0, 1, 2))
    got = evaluate_precision(prior, codes, precision="int8").kl
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), expected, rtol=0.05, atol=1e-7)


def test_mistakes():
    prior = make_prior()
    with pytest.raises(ValueError, match="precision: expected one of fp32, bf16, int8, got 'fp8'"):
        evaluate_precision(prior, torch.zeros(1, *SHAPE, dtype=torch.int64), precision="fp8")
    with pytest.raises(ValueError, match="codes: expected at least one code map"):
        evaluate_precision(prior, torch.zeros(0, *SHAPE, dtype=torch.int64), precision="int8")
    with pytest.raises(IndexError, match="codes"):
        evaluate_precision(prior, torch.full((1, *SHAPE), 9), precision="int8")
    with pytest.raises(TypeError, match="prior: expected float32, float16 or bfloat16 weights"):
        evaluate_precision(make_prior().double(), torch.zeros(1, *SHAPE, dtype=torch.int64), precision="bf16")


def test_a_prior_of_another_class_has_one_precision():
    quantizer = MultiScaleConfig(codebook_size=12, scales=[1, 2], refinements=0)
    config = VARConfig(quantizer=quantizer, code_dim=4, embed_dim=16, layers=1, heads=2, num_classes=3)
    prior = VAR(config, MultiScaleQuantizer(quantizer, 4)).eval()
    codes = [torch.randint(12, (5, side, side)) for side in (1, 2)]
    effect = evaluate_precision(prior, codes, torch.arange(5) % 3, precision="fp32", batch_size=2)
    assert effect.kl == [0.0, 0.0] and effect.same_likeliest == [1.0, 1.0] and effect.weight_error == {}
    with pytest.raises(ValueError, match="precision: expected 'fp32' for a var, got 'bf16'"):
        evaluate_precision(prior, codes, precision="bf16")
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, got 0"):
        evaluate_precision(prior, codes, precision="fp32", batch_size=0)
