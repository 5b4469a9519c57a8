from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import rqkernels
from rqgen.inference.kv_cache import KVCache, stack_cache
from rqgen.models import transformer as transformer_module
from rqgen.models.transformer import QuickGELU, Transformer, TransformerConfig

WIDTH = 12


def stack(layers: int = 2, **settings: object) -> Transformer:
    transformer = Transformer(TransformerConfig(layers=layers, heads=3, **settings), WIDTH)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return transformer.eval()


def new_cache(transformer: Transformer, batch: int = 2, capacity: int = 7) -> KVCache:
    return stack_cache(transformer, batch, capacity, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 1, 1, 1, 1], [1, 4, 2], [7]], ids=str)
def test_a_cache_gives_what_one_pass_gives(pieces: list[int]) -> None:
    transformer, x = stack(), torch.randn(2, 7, WIDTH)
    cache = new_cache(transformer)
    outputs = torch.cat([transformer(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(outputs, transformer(x), atol=1e-5, rtol=1e-5)
    assert cache.length == 7


def test_a_position_sees_itself_and_what_came_before() -> None:
    transformer, x = stack(), torch.randn(1, 6, WIDTH)
    changed = x.clone()
    changed[:, 3] += torch.randn(WIDTH)
    before, after = transformer(x), transformer(changed)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert ((after - before).abs().amax(-1)[0, 3:] > 1e-3).all()


def test_one_block_is_attention_and_mlp_on_normed_input() -> None:
    transformer, x = stack(layers=1, activation="quick_gelu"), torch.randn(2, 5, WIDTH)
    (block,) = transformer.blocks
    q, k, v = block.attention.qkv(block.attention_norm(x)).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, WIDTH)
    middle = x + block.attention.out(mixed)
    inner = block.mlp[0](block.mlp_norm(middle))
    expected = middle + block.mlp[2](inner * torch.sigmoid(1.702 * inner))
    torch.testing.assert_close(transformer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", [4, 32, 33])
def test_few_positions_go_through_depth_attention(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def record(qkv: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(qkv.shape))
        return original(qkv)

    original = rqkernels.depth_attention_packed
    transformer, x = stack(attention_dropout=0.5), torch.randn(2, positions, WIDTH, requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(transformer_module, "_FEW_POSITIONS", 0)
        expected = transformer(x)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    monkeypatch.setattr(rqkernels, "depth_attention_packed", record)
    found = transformer(x)
    assert calls == ([(2, positions, 3, 3, 4)] * 2 if positions <= 32 else [])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


def test_dropout_a_cache_and_wide_heads_go_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(rqkernels, "depth_attention_packed")
    x = torch.randn(2, 4, WIDTH)
    stack(attention_dropout=0.5).train()(x)
    transformer = stack()
    transformer(x, new_cache(transformer))
    Transformer(TransformerConfig(layers=1, heads=1), 257)(torch.randn(2, 4, 257))
    with pytest.raises(AttributeError, match="depth_attention_packed"):
        transformer(x)


def test_activations_differ() -> None:
    x = torch.linspace(-3, 3, 50)
    assert (QuickGELU()(x) - F.gelu(x)).abs().max() > 1e-3
    assert isinstance(stack(activation="gelu").blocks[0].mlp[1], torch.nn.GELU)


def test_no_layers_is_the_identity() -> None:
    transformer, x = Transformer(TransformerConfig(layers=0, heads=1), WIDTH), torch.randn(2, 3, WIDTH)
    cache = new_cache(transformer)
    assert torch.equal(transformer(x, cache), x)
    assert cache.length == 3


@pytest.mark.parametrize("settings", [{"attention_bias": False}, {"mlp_bias": False}], ids=str)
def test_biases_can_be_left_out(settings: dict[str, bool]) -> None:
    block = stack(layers=1, **settings).blocks[0]
    attention = [block.attention.qkv.bias, block.attention.out.bias]
    mlp = [block.mlp[0].bias, block.mlp[2].bias]
    assert all((bias is None) == ("attention_bias" in settings) for bias in attention)
    assert all((bias is None) == ("mlp_bias" in settings) for bias in mlp)


@pytest.mark.parametrize("name", ["attention_dropout", "residual_dropout"])
def test_dropout_acts_in_training_alone(name: str) -> None:
    transformer = stack(**{"residual_dropout": 0.0, name: 0.5})
    x = torch.randn(2, 5, WIDTH)
    assert torch.equal(transformer(x), transformer(x))
    transformer.train()
    assert not torch.equal(transformer(x), transformer(x))


def test_a_cache_is_written_in_place_and_can_be_used_again() -> None:
    transformer = stack()
    cache = new_cache(transformer)
    memory = cache.keys.data_ptr(), cache.values.data_ptr()
    first, second = torch.randn(2, 2, 7, WIDTH)
    transformer(first, cache)
    cache.reset()
    assert cache.length == 0
    torch.testing.assert_close(transformer(second, cache), transformer(second), atol=1e-5, rtol=1e-5)
    assert memory == (cache.keys.data_ptr(), cache.values.data_ptr())


def test_a_cache_refuses_what_does_not_fit() -> None:
    transformer = stack()
    cache = new_cache(transformer, batch=2, capacity=3)
    assert cache.capacity == 3
    transformer(torch.randn(2, 2, WIDTH), cache)
    with pytest.raises(ValueError, match="expected at most 3 positions, its capacity, got 4"):
        transformer(torch.randn(2, 2, WIDTH), cache)
    with pytest.raises(ValueError, match="expected 2 rows, got 5"):
        transformer(torch.randn(5, 1, WIDTH), cache)
    assert cache.length == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": -1}, "layers: expected a number >= 0, got -1"),
        ({"heads": 0}, "heads: expected a number >= 1, got 0"),
        ({"activation": "relu"}, "activation: expected one of gelu, quick_gelu, got 'relu'"),
        ({"attention_dropout": 1.0}, "attention_dropout: expected a number in"),
        ({"residual_dropout": -0.1}, "residual_dropout: expected a number in"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{"layers": 1, "heads": 1, **settings})


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"heads: expected a divisor of the width, 12, got 5"):
        Transformer(TransformerConfig(layers=1, heads=5), WIDTH)
