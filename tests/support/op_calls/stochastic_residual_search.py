"""Calls of the stochastic residual search."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

import rqkernels

from ._data import INF, D, Small, codebooks, leading, normal, rows_and_codes, search_edges
from ._shapes import RAGGED_LABELS, typical_labels
from ._types import Agreement, Call, Derivative, Function

# A code may fall on the other side of a boundary that two devices round differently.
_DRAWN = Agreement(codes=0.02)


def _inputs(n: int, k: int, c: int, generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(n, c, generator=generator), torch.randn(k, c, generator=generator)


def _search(depth: int, tau: float, x: Tensor, codebook: Tensor) -> list[Tensor]:
    return [rqkernels.stochastic_residual_search(x, codebook, depth, tau=tau, seed=1).codes]


def _captured(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    return [*_search(D, 4.0, x, codebooks[0]), *_search(D, 4.0, x, codebooks)]


RAGGED = [
    *(
        Call(f"N, K, C = {n, k, c}", partial(_inputs, n, k, c), partial(_search, 2, c / 4), _DRAWN)
        for n, k, c in RAGGED_LABELS
    ),
    Call("shared and by depth", rows_and_codes, _captured, _DRAWN, captured=True),
]


def typical(device: torch.device, quick: bool) -> Iterator[Call]:
    for n, k, c, tau in typical_labels(quick):
        yield Call(f"N, K, C = {n, k, c}", partial(_inputs, n, k, c), partial(_search, 1, tau), _DRAWN)


def _arguments(package: ModuleType) -> dict[str, Any]:
    numbers = {"depth": 3, "tau": 0.5, "seed": 1, "offset": 0, "return_residuals": True}
    small = Small.draw()
    return {"x": small.x, "codebooks": small.codebook, **numbers}


def _random(rng: Random) -> dict[str, Any]:
    books, channels, _ = codebooks(rng)
    more = {"tau": rng.choice([0.5, 2, INF]), "seed": rng.choice([0, 5, 2**64 - 1]), "offset": rng.choice([0, 9])}
    return {"x": normal(rng, *leading(rng), channels), **books, **more, "return_residuals": rng.random() < 0.5}


FUNCTIONS = {
    "stochastic_residual_search": Function(
        _arguments,
        _random,
        lambda: search_edges({"tau": 0.5, "seed": 3, "return_residuals": True}),
        results="drawn",
        integers={"depth": (1, 31), "seed": (0, 64), "offset": (0, 63)},
        numbers=("tau",),
    ),
}
DERIVATIVES: dict[str, Derivative] = {}
