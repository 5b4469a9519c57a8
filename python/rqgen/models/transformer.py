"""Causal pre-norm transformer stacks, with and without a cache through the same code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

import rqkernels
from rqgen.config import check_bounds, check_fields, one_of

from .attention import attention
from .changes import as_written

ACTIVATIONS = ("gelu", "quick_gelu")
# Limits of `rqkernels.depth_attention`: more positions, or wider heads, need tiled kernels.
_FEW_POSITIONS, _WIDEST_HEAD = 32, 256
_SHORT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class TransformerConfig:
    """One stack of causal self-attention blocks.

    Attributes:
        layers: number of blocks; 0 makes the stack the identity.
        heads: attention heads; must divide the width.
        activation: "gelu" (exact) or "quick_gelu", `x * sigmoid(1.702 x)`.
        attention_bias, mlp_bias: True if the linear layers of attention and MLP have biases.
        attention_dropout: on attention weights.
        residual_dropout: on what attention and MLP add to the residual stream.
    """

    layers: int
    heads: int
    activation: str = "gelu"
    attention_bias: bool = True
    mlp_bias: bool = True
    attention_dropout: float = 0.0
    residual_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        if self.layers < 0:
            raise ValueError(f"layers: expected a number >= 0, got {self.layers}")
        if self.heads < 1:
            raise ValueError(f"heads: expected a number >= 1, got {self.heads}")
        check_bounds(self, layers=(0, 1024), heads=(1, 2**16))
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: {one_of(ACTIVATIONS, self.activation)}")
        for name in ("attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")


class Cache(Protocol):
    """Keys and values of the positions that a stack has seen (see `rqgen.inference.kv_cache`). The stack writes behind
    `length` and moves `length` on."""

    length: int

    def write(self, layer: int, k_bhnd: Tensor, v_bhnd: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions of one layer; return its keys and values of all positions."""
        ...

    def mask(self, new: int) -> Tensor | None:
        """Mark the keys that each of `new` positions sees; None where attention is causal without an offset."""
        ...

    def advance(self, positions: int) -> None:
        """Count the positions that all layers have written."""
        ...

    def reset(self) -> None:
        """Forget every position."""
        ...


@as_written()
class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, the sigmoid approximation of GELU (Hendrycks and Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@as_written("heads")
class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before.

    Few positions without a cache, such as the stacks of codes in training, go through
    `rqkernels.depth_attention_packed`, which has no dropout and no float64; all others through `attention`.
    """

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.attention_bias)
        self.out = nn.Linear(width, width, bias=config.attention_bias)

    def forward(self, x_bnw: Tensor, cache: Cache | None, layer: int) -> Tensor:
        batch, new, width = x_bnw.shape
        qkv = self.qkv(x_bnw).view(batch, new, 3, self.heads, width // self.heads)
        dropout = self.dropout if self.training else 0.0
        few = cache is None and new <= _FEW_POSITIONS and qkv.shape[-1] <= _WIDEST_HEAD
        if few and dropout == 0 and qkv.dtype in _SHORT_TYPES:
            return self.out(rqkernels.depth_attention_packed(qkv).flatten(2))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mask = None
        if cache is not None:
            k, v = cache.write(layer, k, v)
            mask = cache.mask(new)
        # is_causal aligns the mask to the first key, so it is right only where nothing was seen before.
        y = attention(q, k, v, mask=mask, causal=mask is None and new > 1, dropout=dropout)
        return self.out(y.transpose(1, 2).reshape(batch, new, width))


@as_written()
class TransformerBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(config, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=config.mlp_bias),
            nn.GELU() if config.activation == "gelu" else QuickGELU(),
            nn.Linear(4 * width, width, bias=config.mlp_bias),
        )
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x_bnw: Tensor, cache: Cache | None, layer: int) -> Tensor:
        x_bnw = x_bnw + self.dropout(self.attention(self.attention_norm(x_bnw), cache, layer))
        return x_bnw + self.dropout(self.mlp(self.mlp_norm(x_bnw)))


@as_written("heads", "width")
class Transformer(nn.Module):
    """A stack of causal pre-norm blocks; no norm after the last one.

    Args:
        config: layers, heads, dropouts.
        width: of the residual stream; divisible by `config.heads`.
    """

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__()
        if width % config.heads:
            raise ValueError(f"heads: expected a divisor of the width, {width}, got {config.heads}")
        self.width = width
        self.heads = config.heads
        self.blocks = nn.ModuleList([TransformerBlock(config, width) for _ in range(config.layers)])

    def forward(self, x_bnw: Tensor, cache: Cache | None = None) -> Tensor:
        """Map (B, n, width) to (B, n, width). With a cache, x holds only the positions it has not seen yet."""
        for layer, block in enumerate(self.blocks):
            x_bnw = block(x_bnw, cache, layer)
        if cache is not None:
            cache.advance(x_bnw.shape[1])
        return x_bnw
