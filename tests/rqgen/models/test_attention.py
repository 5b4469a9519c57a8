"""Attention that is differentiable twice: against torch's products, alone and in every model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rqgen.models import (
    RQVAE,
    VAR,
    MultiScaleVQVAE,
    MultiScaleVQVAEConfig,
    RQTransformer,
    RQTransformerConfig,
    RQVAEConfig,
    VARConfig,
)
from rqgen.models.attention import attention
from rqgen.models.transformer import TransformerConfig
from rqgen.quantizers import MultiScaleConfig, QuantizerConfig

MASK = torch.tensor([[True, False, True, True], [True, True, False, True], [True, True, True, True]])
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"causal": True},
    "masked": {"mask": MASK},
}


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, n, 4, dtype=dtype, generator=generator).requires_grad_() for n in (3, 4, 4)]


def of_torch(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    names = {"mask": "attn_mask", "causal": "is_causal", "scale": "scale"}
    return F.scaled_dot_product_attention(q, k, v, **{names[name]: value for name, value in settings.items()})


@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients_are_those_of_torch_s_kernel(name: str) -> None:
    settings = SETTINGS[name]
    found, expected = (f(*inputs(torch.float32), **settings) for f in (attention, of_torch))
    assert torch.equal(found, expected)
    gradients = []
    for f in (attention, of_torch):
        given = inputs(torch.float32)
        gradients.append(torch.autograd.grad(f(*given, **settings).square().sum(), given))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_second_derivatives(name: str) -> None:
    assert torch.autograd.gradgradcheck(lambda *qkv: attention(*qkv, **SETTINGS[name]), inputs())


def test_second_derivatives_where_some_inputs_have_none() -> None:
    q, k, v = inputs()
    assert torch.autograd.gradgradcheck(lambda k: attention(q.detach(), k, v.detach()), [k])
    # One input may come from another.
    assert torch.autograd.gradgradcheck(lambda k: attention(q, k, 2 * k), [k])


def test_forward_mode_and_functions_of_torch_func() -> None:
    q, k, v = inputs()
    assert torch.autograd.gradcheck(attention, (q, k, v), check_forward_ad=True)
    hessian = torch.func.hessian(lambda q: attention(q, k, v).square().sum())(q.detach())
    expected = torch.autograd.functional.hessian(lambda q: attention(q, k, v).square().sum(), q.detach())
    torch.testing.assert_close(hessian, expected)


def test_a_second_derivative_under_autocast() -> None:
    q, k, v = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(q, k, v)
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(y.float().square().sum(), q, create_graph=True)
    assert gradient.dtype == torch.float32
    gradient.square().sum().backward()
    assert q.grad is not None and q.grad.isfinite().all() and q.grad.any()


def tokenizers() -> tuple[RQVAE, MultiScaleVQVAE]:
    common: dict[str, Any] = {
        "image_channels": 1,
        "base_channels": 8,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "norm_groups": 4,
        "z_channels": 8,
    }
    quantizer = QuantizerConfig(codebook_size=16, depth=3, init="random")
    scales = MultiScaleConfig(codebook_size=16, scales=[1, 2, 4], init="random")
    rqvae = RQVAE(RQVAEConfig(**common, resolution=8, embed_dim=8, quantizer=quantizer))
    return rqvae.eval(), MultiScaleVQVAE(MultiScaleVQVAEConfig(**common, quantizer=scales)).eval()


def losses() -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    rqvae, multiscale = tokenizers()
    images, labels = torch.rand(2, 1, 8, 8) * 2 - 1, torch.tensor([0, 1])
    stack = TransformerConfig(layers=1, heads=2)
    # More positions than `rqkernels.depth_attention` takes.
    large = RQTransformerConfig((8, 8, 3), 16, 8, embed_dim=8, spatial=stack, depth=stack)
    rows = RQTransformer(large, rqvae.codebooks).eval()
    scales = VARConfig(quantizer=multiscale.config.quantizer, code_dim=8, embed_dim=8, layers=1, heads=2, num_classes=2)
    maps = VAR(scales, multiscale.quantizer).eval()
    codes = torch.randint(16, (2, 8, 8, 3))
    return {
        "rqvae": (rqvae, lambda: rqvae.loss(images).total),
        "multiscale_vqvae": (multiscale, lambda: multiscale.loss(images).total),
        "rqtransformer": (rows, lambda: rows.loss(codes).total),
        "var": (maps, lambda: maps.loss(multiscale.encode(images), labels).total),
    }


def second_derivative(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    first = torch.autograd.grad(loss(), weights, create_graph=True, allow_unused=True)
    norm = sum(gradient.square().sum() for gradient in first if gradient is not None)
    second = torch.autograd.grad(norm, weights, allow_unused=True)
    return [gradient for gradient in second if gradient is not None]


@pytest.mark.parametrize("name", ["rqvae", "multiscale_vqvae", "rqtransformer", "var"])
def test_a_gradient_penalty_on_every_model(name: str) -> None:
    model, loss = losses()[name]
    model.double()
    found = second_derivative(model, loss)
    with sdpa_kernel(SDPBackend.MATH):
        expected = second_derivative(model, loss)
    assert len(found) > 10
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
