"""Causal attention over the depths of one position (Lee et al. 2022, section 3.2.2), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def depth_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`softmax_j(scale <q_i, k_j>) v_j` over the keys j <= i + m - n (Vaswani et al. 2017, equation 1).

    Args:
        q: (N, H, n, head_dim), any floating dtype, in which all is computed.
        k, v: (N, H, m, head_dim), m >= n: the keys of the n queries are the last.
        scale: None for `head_dim ** -0.5`.

    Returns:
        (N, H, n, head_dim). What a query does not see has no part in its result, not even where it is NaN.
    """
    queries, keys = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    rows = []
    for i in range(queries):
        seen = i + keys - queries + 1
        scores = scale * (q[:, :, i, None] * k[:, :, :seen]).sum(-1)
        rows.append((scores.softmax(-1)[..., None] * v[:, :, :seen]).sum(2))
    return torch.stack(rows, 2)


def depth_attention_packed(qkv: Tensor, scale: float | None = None) -> Tensor:
    """`depth_attention` of qkv (N, D, 3, H, head_dim); (N, D, H, head_dim)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return depth_attention(q, k, v, scale).transpose(1, 2)
