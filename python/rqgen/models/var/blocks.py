"""Blocks of a VAR: attention over scales, and adaptive norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import attention
from ..transformer import Cache
from .config import VARConfig

_MAX_LOG_SCALE = math.log(100.0)


class Modulation(NamedTuple):
    """Effect of a condition on the transformer, computed once for all scales."""

    start: Tensor  # (B, 1, W): the condition's embedding, which comes before the first scale
    blocks: list[Tensor]  # per block (B, 1, 6, W): gates, scales and shifts of attention and MLP
    head: Tensor  # (B, 1, 2, W): scale and shift before the classifier


class ScaleAttention(nn.Module):
    """Multi-head attention in which a token sees the scales before its own, and all of its own.

    The queries of each scale are multiplied with the keys up to its end: no mask of L x L is needed, and nothing is
    computed that a mask would hide.
    """

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # A bias of the keys would shift all scores of a query by the same amount.
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = None
        self.scale = 0.25 / math.sqrt(width // config.heads)
        if config.normalize_attention:
            self.log_scale = nn.Parameter(torch.full((config.heads, 1, 1), math.log(4.0)))
            self.scale = 1.0
        self.out = nn.Linear(width, width)

    def forward(self, x_blw: Tensor, ends: Sequence[int], cache: Cache | None, layer: int) -> Tensor:
        batch, length, width = x_blw.shape
        # The layer is called, instead of using its weight: adapters and hooks on it count.
        qkv = self.qkv(x_blw)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        qkv = (qkv + bias).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.log_scale is not None:
            q = F.normalize(q, dim=-1) * self.log_scale.clamp(max=_MAX_LOG_SCALE).exp()
            k = F.normalize(k, dim=-1)
            q, k = q.to(v.dtype), k.to(v.dtype)
        seen = 0
        if cache is not None:
            seen = cache.length
            k, v = cache.write(layer, k, v)
        parts, begin = [], 0
        for end in ends:
            parts.append(
                attention(
                    q[:, :, begin:end],
                    k[:, :, : seen + end],
                    v[:, :, : seen + end],
                    dropout=self.dropout if self.training else 0.0,
                    scale=self.scale,
                )
            )
            begin = end
        y_bhle = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return self.out(y_bhle.transpose(1, 2).reshape(batch, length, width))


class AdaptiveBlock(nn.Module):
    """`x + gate1 attention(norm(x) (1 + scale1) + shift1)`, then the same with the MLP; the condition gives the six
    vectors (adaptive LayerNorm, Peebles and Xie 2023)."""

    def __init__(self, config: VARConfig, drop_path: float) -> None:
        super().__init__()
        width, hidden = config.embed_dim, round(config.embed_dim * config.mlp_ratio)
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(width, eps=config.norm_epsilon, elementwise_affine=False)
        self.attention = ScaleAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(config.dropout)
        self.modulation: nn.Parameter | nn.Linear
        if config.shared_adaptive_norm:
            self.modulation = nn.Parameter(torch.randn(6, width) / math.sqrt(width))
        else:
            self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, x_blw: Tensor, modulation: Tensor, ends: Sequence[int], cache: Cache | None, layer: int
    ) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        y = self.attention(self.norm(x_blw) * (1 + scale1) + shift1, ends, cache, layer)
        x_blw = x_blw + self._dropped(self.dropout(y) * gate1)
        y = self.mlp(self.norm(x_blw) * (1 + scale2) + shift2)
        return x_blw + self._dropped(self.dropout(y) * gate2)

    def _dropped(self, y: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return y
        kept = torch.rand(y.shape[0], 1, 1, device=y.device, dtype=torch.float32) >= self.drop_path
        return y * (kept / (1 - self.drop_path)).to(y.dtype)
