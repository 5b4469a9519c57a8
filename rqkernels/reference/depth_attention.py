"""Causal attention over the depths of one position (Lee et al. 2022, section 3.2.2), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import (
    REFERENCE_DTYPES,
    check_device,
    check_elements,
    check_scale,
    check_tensor,
    differ,
    is_below,
    shape_of,
)

MOST_DEPTHS, MOST_HEAD_DIM = 32, 256
_INSTEAD = "; larger ones are for torch.nn.functional.scaled_dot_product_attention"


def _check_sizes(op: str, name: str, tensor: Tensor, layout: str, depths: int, head_dim: int) -> None:
    for label, size, most in (("D", depths, MOST_DEPTHS), ("head_dim", head_dim, MOST_HEAD_DIM)):
        if isinstance(size, int) and not 1 <= size <= most:
            raise ValueError(
                f"{op}: {name} must be {layout} with 1 <= {label} <= {most}, got {shape_of(tensor)}{_INSTEAD}"
            )
    check_elements(op, name, tensor)


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check shapes, dtypes and devices with the messages of op.cpp."""
    layout = "(N, H, D, head_dim)"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must be {layout}, got {shape_of(tensor)}")
        _check_sizes(op, name, tensor, layout, tensor.shape[2], tensor.shape[3])
        check_device(op, name, tensor, "q", q)
        if tensor.dtype != q.dtype:
            raise ValueError(f"{op}: {name} and q must have the same dtype")
        if any(differ(tensor.shape[d], q.shape[d]) for d in (0, 1, 3)):
            raise ValueError(
                f"{op}: q, k and v must agree in N, H and head_dim, got q {shape_of(q)} and {name} {shape_of(tensor)}"
            )
    if differ(v.shape[2], k.shape[2]):
        raise ValueError(f"{op}: k and v must have the same number of depths, got k {shape_of(k)} and v {shape_of(v)}")
    if isinstance(q.shape[2], int) and is_below(k.shape[2], q.shape[2]):
        raise ValueError(
            f"{op}: k must have at least the depths of q (a query sees its own key), "
            f"got q {shape_of(q)} and k {shape_of(k)}"
        )


def check_packed(op: str, qkv: Tensor) -> None:
    layout = "(N, D, 3, H, head_dim)"
    if qkv.dim() != 5 or differ(qkv.shape[2], 3):
        raise ValueError(f"{op}: qkv must be {layout}, got {shape_of(qkv)}")
    _check_sizes(op, "qkv", qkv, layout, qkv.shape[1], qkv.shape[4])


def depth_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Compute `softmax_j(scale <q_i, k_j>) v_j` over the keys j <= i + m - n (Vaswani et al. 2017, equation 1).

    Args:
        q: (N, H, n, head_dim), float32, float16 or bfloat16, computed in float32 and rounded once; or float64, computed
            in float64.
        k, v: (N, H, m, head_dim), m >= n: the keys of the n queries are the last n.
        scale: None for `head_dim ** -0.5`.

    Returns:
        (N, H, n, head_dim). Keys and values that a query does not see do not affect its result, even if they are NaN.
    """
    op = "depth_attention"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, tensor, REFERENCE_DTYPES)
    scale = check_scale(op, scale)
    check_heads(op, q, k, v)
    return _attention(q, k, v, scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return _plain_attention(q, k, v, scale)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    dtype = q.dtype
    q, k, v = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    rows = []
    for i in range(queries):
        seen = i + keys - queries + 1
        scores = scale * (q[:, :, i, None] * k[:, :, :seen]).sum(-1)
        rows.append((scores.softmax(-1)[..., None] * v[:, :, :seen]).sum(2))
    return torch.stack(rows, 2).to(dtype)


def depth_attention_packed(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Compute `depth_attention` of qkv (N, D, 3, H, head_dim); returns (N, D, H, head_dim)."""
    op = "depth_attention_packed"
    check_tensor(op, "qkv", qkv, REFERENCE_DTYPES)
    scale = check_scale(op, scale)
    check_packed(op, qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return _attention(q, k, v, scale).transpose(1, 2)
