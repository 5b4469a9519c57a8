"""Causal attention over stacks of at most 32 depths, forward and backward in one kernel each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._arguments import FLOAT_DTYPES, check_scale
from .._derivatives import register_derivative, vjp
from .._library import call, check_tensor
from ..reference.depth_attention import check_heads, check_packed

_OP, _PACKED = "depth_attention", "depth_attention_packed"


def depth_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention over the few depths of each of N stacks (Lee et al. 2022, section 3.2.2).

        y_i = sum_j p_ij v_j,   p_ij = softmax_j(scale <q_i, k_j>)   over the keys j <= i + m - n

    Naively `scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)` (for m = n), whose tiles are made for
    hundreds of positions: a stack of four codes fills a thousandth of a 128 x 128 tile. Here a whole head of a stack
    stays in registers and cache (on CUDA in shared memory), every input is read once, and probabilities are never
    written to memory; the backward pass recomputes them from q and k, the only tensors that are saved.

    If m > n the first m - n keys are a prefix that every query sees: cached keys before the new positions, or a
    condition. Sums and exponentials are float32, rounded once to the dtype. The result of a head depends on its own q,
    k and v only, that of a query only on the keys and values it sees, even if others are NaN. A gradient may be NaN if
    anything in its head is not finite.

    Differentiable any number of times, also in forward mode and under `torch.func`. The kernels compute the result and
    its first gradient; a gradient that may be differentiated again (create_graph=True), tangents, and derivatives under
    `torch.func` come from `rqkernels.reference.depth_attention` in float32, rounded once. Autocast does not affect it:
    inputs are used in their own dtype.

    Args:
        q: (N, H, n, head_dim), float32, float16 or bfloat16; 1 <= n <= 32, 1 <= head_dim <= 256.
        k, v: (N, H, m, head_dim) in the dtype of q, n <= m <= 32. Any strides; a last dimension that is not contiguous
            costs a copy. For q, k and v in one tensor see `depth_attention_packed`.
        scale: None for `head_dim ** -0.5`.

    Returns:
        (N, H, n, head_dim) in the dtype of q, in memory as (N, n, H, head_dim): `.transpose(1, 2).reshape(N, n, -1)` is
        free, whatever the strides of q. Gradients have the same layout.

    Raises:
        TypeError: a wrong dtype (float64 among them), scale not a number.
        ValueError: shapes, dtypes or devices that do not match, n or m above 32, head_dim above 256, scale not finite
            in float32. On CUDA also a head that exceeds the shared memory of a block: with 99 KiB, the gradient of
            float32 with head_dim above 128 and more than 23 depths.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(_OP, name, tensor, FLOAT_DTYPES)
    return call(_OP, torch.ops.rqkernels.depth_attention, q, k, v, check_scale(_OP, scale))


def depth_attention_packed(qkv: Tensor, scale: float | None = None) -> Tensor:
    """`depth_attention` of queries, keys and values in one tensor, as a fused linear layer produces them.

    Naively `q, k, v = qkv.permute(2, 0, 3, 1, 4)`, attention and `.transpose(1, 2)`, with the same result. Here the
    gradient of qkv is written in one piece, without a copy that concatenates three gradients.

    Args:
        qkv: (N, D, 3, H, head_dim), float32, float16 or bfloat16; D <= 32, head_dim <= 256.
        scale: None for `head_dim ** -0.5`.

    Returns:
        (N, D, H, head_dim), contiguous.

    Raises:
        The errors of `depth_attention`.
    """
    check_tensor(_PACKED, "qkv", qkv, FLOAT_DTYPES)
    return call(_PACKED, torch.ops.rqkernels.depth_attention_packed, qkv, check_scale(_PACKED, scale))


def _new_heads(like: Tensor) -> Tensor:
    stacks, heads, depths, head_dim = like.shape
    return like.new_empty((stacks, depths, heads, head_dim)).transpose(1, 2)


@torch.library.register_fake("rqkernels::depth_attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    check_heads(_OP, q, k, v)
    return _new_heads(q)


@torch.library.register_fake("rqkernels::depth_attention_backward")
def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, ...]:
    return _new_heads(q), _new_heads(k), _new_heads(v)


@torch.library.register_fake("rqkernels::depth_attention_packed")
def _fake_packed(qkv: Tensor, scale: float | None) -> Tensor:
    check_packed(_PACKED, qkv)
    stacks, depths, _, heads, head_dim = qkv.shape
    return qkv.new_empty((stacks, depths, heads, head_dim))


@torch.library.register_fake("rqkernels::depth_attention_packed_backward")
def _fake_packed_backward(grad: Tensor, qkv: Tensor, scale: float | None) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    y = reference.depth_attention(q.float(), k.float(), v.float(), scale)
    # In the kernel's memory layout, which a tangent must share.
    return y.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _plain_packed(qkv: Tensor, scale: float | None) -> Tensor:
    return reference.depth_attention_packed(qkv.float(), scale).to(qkv.dtype).contiguous()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        return *vjp(lambda q, k, v: _plain(q, k, v, ctx.scale), ctx.saved_tensors, grad), None
    return *call(_OP, torch.ops.rqkernels.depth_attention_backward, grad, *ctx.saved_tensors, ctx.scale), None


def _backward_packed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        return *vjp(lambda qkv: _plain_packed(qkv, ctx.scale), ctx.saved_tensors, grad), None
    backward = torch.ops.rqkernels.depth_attention_packed_backward
    return call(_PACKED, backward, grad, *ctx.saved_tensors, ctx.scale), None


register_derivative("depth_attention", _plain, _setup_context, _backward)
register_derivative("depth_attention_packed", _plain_packed, _setup_context, _backward_packed)
