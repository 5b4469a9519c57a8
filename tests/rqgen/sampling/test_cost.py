"""Counted cost of sampling."""

import pytest

from rqgen.models import RQTransformerConfig, VARConfig
from rqgen.models.transformer import TransformerConfig
from rqgen.quantizers import MultiScaleConfig
from rqgen.sampling import sampling_cost


def config(spatial, depth, shape, **settings):
    stacks = {"spatial": TransformerConfig(spatial, 1), "depth": TransformerConfig(depth, 1)}
    return RQTransformerConfig(shape, codebook_size=7, code_dim=3, embed_dim=2, **stacks, **settings)


def test_a_small_prior_counted_by_hand():
    """Two layers over three positions and a start symbol, one over two codes each, width 2, K = 7, C = 3."""
    cost = sampling_cost(config(2, 1, (1, 3, 2)), batch=5)
    layer = 12 * 2 * 2
    assert cost.spatial.weights == 3 * 2 * layer + 2 * (3 * 2)
    assert cost.spatial.products == 2 * 5 * cost.spatial.weights
    # Three tokens are fed (the last position's stack is not): 1 + 2 + 3 keys and as many values are read, 3 written.
    assert cost.spatial.states == 5 * 2 * 2 * 2 * (6 + 3)
    assert cost.spatial.attention == 5 * 2 * 4 * 2 * 6
    assert cost.depth.weights == 3 * (2 * (layer + 7 * 2) + 3 * 2)
    assert cost.depth.products == 2 * 5 * cost.depth.weights
    assert cost.depth.attention == 5 * 3 * 4 * 2 * (1 + 2)


def test_tables_are_looked_up():
    tables = {"spatial_embedding": "table", "depth_embedding": "table"}
    cost = sampling_cost(config(2, 1, (1, 3, 2), **tables), batch=1)
    assert cost.spatial.weights == 3 * 2 * 48 and cost.depth.weights == 3 * 2 * (48 + 14)


@pytest.mark.parametrize(("batch", "floor_ms"), [(1, 84), (100, 1.02), (200, 0.60), (500, 0.41)])
def test_floors_of_the_largest_prior(batch, floor_ms):
    """1.4B, 8x8x4, in bfloat16 on a card that copies 3.0 TB/s and multiplies 790 TFLOP/s."""
    prior = RQTransformerConfig.preset("1.4B", code_shape=(8, 8, 4), codebook_size=16384, code_dim=256)
    seconds = sum(
        max(2 * (stack.weights + stack.states) / 3.0e12, (stack.products + stack.attention) / 790e12)
        for stack in sampling_cost(prior, batch)
    )
    assert 1e3 * seconds / batch == pytest.approx(floor_ms, rel=0.01)


def test_the_law_of_the_stacked_prior():
    """Attention grows as N_s T^2 + N_d T D^2, over all codes one by one as N T^2 D^2."""

    def attention(layers, shape):
        return sum(stack.attention for stack in sampling_cost(config(*layers, shape), 1))

    assert attention((12, 4), (32, 32, 4)) == pytest.approx(2 * 2 * (12 * 1024**2 + 4 * 1024 * 4 * 5), rel=0.01)
    ratio = attention((16, 0), (32, 128, 1)) / attention((12, 4), (32, 32, 4))
    assert ratio == pytest.approx(16 * 4**2 / 12, rel=0.02)


def var_config(**settings):
    quantizer = MultiScaleConfig(codebook_size=7, scales=[1, [1, 2], 2])
    return VARConfig(quantizer=quantizer, code_dim=3, embed_dim=2, layers=2, heads=1, **settings)


@pytest.mark.parametrize(("shared", "modulations"), [(False, 2), (True, 1)])
def test_a_small_var_counted_by_hand(shared, modulations):
    """Two layers over scales of 1, 2 and 4 tokens, width 2, K = 7, C = 3."""
    per_token, embedding = 2 * 12 * 2 * 2 + 7 * 2, 3 * 2
    modulation = (6 * modulations + 2) * 2 * 2
    first, second, third = sampling_cost(var_config(shared_adaptive_norm=shared), batch=5)
    assert first.weights == per_token + modulation and second.weights == third.weights == per_token + embedding
    assert first.products == 2 * 5 * first.weights and third.products == 2 * 5 * 4 * third.weights
    # Of two layers, keys and values of width 2: those written, and all so far, which are read.
    assert [cost.states for cost in (first, second, third)] == [5 * 2 * 2 * 2 * n for n in (1 + 1, 2 + 3, 4 + 7)]
    assert [cost.attention for cost in (first, second, third)] == [5 * 2 * 4 * 2 * n for n in (1, 2 * 3, 4 * 7)]
    assert sum(sampling_cost(var_config(mlp_ratio=2), 1)[0]) < sum(sampling_cost(var_config(), 1)[0])


def test_a_var_reads_its_weights_seldom_and_multiplies_much():
    """The published 256x256 scales next to as many layers over 16x16 codes one by one."""
    scales = sampling_cost(VARConfig(quantizer=MultiScaleConfig(), embed_dim=512, layers=16, heads=8), 1)
    flat = RQTransformerConfig(
        (16, 16, 1), 4096, 32, embed_dim=512, spatial=TransformerConfig(16, 8), depth=TransformerConfig(0, 8)
    )
    stacks = sampling_cost(flat, 1)
    reads = sum(stack.weights for stack in stacks) / sum(scale.weights for scale in scales)
    assert reads == pytest.approx(256 / 10, rel=0.06)  # but for the adaptive norms
    products = sum(scale.products for scale in scales) / sum(stack.products for stack in stacks)
    assert products == pytest.approx(680 / 256, rel=0.01)
