"""Calls of depth attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

import rqkernels

from ._data import DTYPES, FLOATS, INF, NAN, Small, normal, rows_and_codes
from ._types import Agreement, Call, Derivative, Function


def _inputs(
    n: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype, g: Generator
) -> list[Tensor]:
    return [torch.randn(n, heads, rows, head_dim, generator=g).to(dtype) for rows in (queries, keys, keys)]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = rqkernels.depth_attention(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def _captured(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    """Results differ from the CPU's in rounding; no gradient, which a captured graph would not replay."""
    qkv = x[:126, :16].reshape(14, 9, 1, 2, 8).expand(-1, -1, 3, -1, -1)
    backward = torch.ops.rqkernels.depth_attention_backward(*[qkv[:, :, 0]] * 4, None)
    return [rqkernels.depth_attention_packed(qkv), *backward]


def _ragged() -> Iterator[Call]:
    for dtype in DTYPES:
        close = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        for sizes in ((3, 5, 4, 4, 64), (7, 1, 3, 9, 20), (1, 2, 32, 32, 128), (0, 1, 2, 2, 8)):
            yield Call(f"{dtype}, {sizes}", partial(_inputs, *sizes, dtype), _attend, Agreement(close, close))
    yield Call("packed, and its gradient", rows_and_codes, _captured, Agreement(1e-5, 1e-5), captured=True)


RAGGED = list(_ragged())


def _typical_inputs(n: int, depth: int, heads: int, head_dim: int, generator: Generator) -> list[Tensor]:
    return [torch.randn(n, depth, 3, heads, head_dim, generator=generator).bfloat16()]


def _train(qkv: Tensor) -> list[Tensor]:
    qkv.requires_grad_()
    rqkernels.depth_attention_packed(qkv).float().sum().backward()
    rqkernels.depth_attention(*(t.contiguous() for t in qkv.permute(2, 0, 3, 1, 4))).float().sum().backward()
    return []


def typical(device: torch.device, quick: bool) -> Iterator[Call]:
    """Training of the 1.4B prior on 256 images."""
    heads, head_dim = (2, 8) if quick else (24, 64)
    for depth in (4, 8, 16):
        n = 8 if quick else 65536 // depth
        yield Call(f"N, D = {n, depth}", partial(_typical_inputs, n, depth, heads, head_dim), _train)


def _arguments(package: ModuleType) -> dict[str, Any]:
    q, k, v = Small.draw().qkv.permute(2, 0, 3, 1, 4)
    return {"q": q, "k": k, "v": v, "scale": 0.3}


def _random(rng: Random) -> dict[str, Any]:
    n, h, d, dim = rng.choice([0, 1, 3]), rng.choice([1, 2]), rng.choice([1, 4, 32]), rng.choice([1, 8, 17])
    keys, dtype = rng.choice([d, min(d + 2, 32)]), rng.choice(FLOATS)
    q, k, v = (normal(rng, n, h, rows, dim, dtype=dtype) for rows in (d, keys, keys))
    if rng.random() < 0.4:
        q.requires_grad_()
    return {"q": q, "k": k, "v": v, "scale": rng.choice([None, 0.3, 1])}


def _random_packed(rng: Random) -> dict[str, Any]:
    sizes = (rng.choice([0, 1, 3]), rng.choice([1, 4, 32]), 3, rng.choice([1, 2]), rng.choice([1, 8, 17]))
    return {"qkv": normal(rng, *sizes).requires_grad_(rng.random() < 0.4), "scale": rng.choice([None, 0.3])}


def _edges() -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for n, h, d, m, dim in ((2, 3, 4, 4, 8), (0, 2, 4, 4, 8), (2, 0, 3, 3, 8), (1, 1, 1, 1, 1), (2, 1, 2, 5, 17)):
            q, k, v = (torch.randn(n, h, size, dim).to(dtype) for size in (d, m, m))
            yield {"q": q, "k": k, "v": v}
            if d > 2 and q.numel():
                k[0, 0, 2, 1], v[0, 0, 3, 0] = NAN, INF
                yield {"q": q, "k": k, "v": v, "scale": -0.4}
                yield {"q": q, "k": k, "v": v, "scale": 0}


def _packed_edges() -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for sizes in ((2, 4, 3, 3, 8), (0, 4, 3, 2, 8), (1, 1, 3, 1, 1)):
            yield {"qkv": torch.randn(sizes).to(dtype)}


FUNCTIONS = {
    "depth_attention": Function(_arguments, _random, _edges, gradients=("q", "k", "v"), numbers=("scale",)),
    "depth_attention_packed": Function(
        lambda package: {"qkv": Small.draw().qkv, "scale": 0.3},
        _random_packed,
        _packed_edges,
        gradients=("qkv",),
        numbers=("scale",),
    ),
}

_DRAWN = Generator().manual_seed(7)
DERIVATIVES = {
    # Arguments made of one another: the derivative of each is its own.
    "attention": Derivative(
        "depth_attention",
        lambda m, v: m.depth_attention(v[:, :, 1:], 2 * v, v.square(), 0.7),
        0.4 * torch.randn(2, 2, 4, 6, generator=_DRAWN),
    ),
    "packed attention": Derivative(
        "depth_attention_packed",
        lambda m, v: m.depth_attention_packed(v),
        torch.randn(2, 3, 3, 2, 5, generator=_DRAWN),
    ),
}
