"""Scaled dot-product attention that can be differentiated twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rqgen.quantizers.state import without_autocast


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Return `F.scaled_dot_product_attention(q, k, v, ...)`, with all derivatives.

        softmax(scale q k^T + mask) v

    torch's fast kernels know a first derivative alone. Where a backward pass is itself to be differentiated
    (`create_graph=True`, as gradient penalties and Hessians need), it computes this again in plain products, whose
    attention weights are materialised; so does the whole call in forward mode and inside `torch.func`. Every other pass
    runs torch's kernels. With dropout, and in a compiled graph, torch alone decides if there is a second derivative.

    Args:
        q, k, v: (..., n, e), (..., m, e), (..., m, e).
        mask: bool (n, m) or broadcast to it: True where a query sees a key.
        causal: query i sees keys 0 .. i.
        dropout: probability of dropping an attention weight.
        scale: None is 1 / sqrt(e).
    """
    if torch.compiler.is_compiling() or dropout > 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, scale=scale)
    if torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)
    ):
        return _in_products(q, k, v, mask, causal, scale)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return _TwiceDifferentiable.apply(y, q, k, v, mask, causal, scale) if y.requires_grad else y


def _in_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


class _TwiceDifferentiable(torch.autograd.Function):
    """Identity of y = attention(q, k, v). Its gradient goes to y, whose kernel has the derivative; where that is to be
    differentiated again, to q, k and v instead."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.causal, ctx.scale = causal, scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad, None, None, None, None, None, None
        *inputs, mask = ctx.saved_tensors
        # Views: one input may have been computed from another, and that path is not to be differentiated here. Under
        # autocast y has another dtype than they.
        own = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        with without_autocast(grad.device):
            q, k, v = (x.to(grad.dtype) for x in own)
            y = _in_products(q, k, v, mask, ctx.causal, ctx.scale)
        return None, *torch.autograd.grad(y, own, grad, create_graph=True), None, None, None
