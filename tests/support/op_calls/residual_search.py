"""Calls of the residual search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

import rqkernels

from ._data import D, Small, codebooks, leading, normal, rows_and_codes, search_edges
from ._shapes import RAGGED_SHAPES, Shape, shapes
from ._types import Call, Derivative, Function


def _inputs(n: int, k: int, c: int, books: tuple[int, ...], generator: Generator) -> tuple[Tensor, Tensor]:
    x, codebooks = torch.randn(n, c, generator=generator), torch.randn(*books, k, c, generator=generator)
    if n > 3:
        x[2] = torch.nan
    return x, codebooks


def _search(depth: int, x: Tensor, codebooks: Tensor) -> list[Tensor]:
    found = rqkernels.residual_search(x, codebooks, depth, return_residuals=True, return_statistics=True)
    return [*found[:4], *found.statistics]


def _packed(depth: int, x: Tensor, codebook: Tensor) -> Sequence[Tensor]:
    return rqkernels.residual_search(x, rqkernels.PackedCodebook(codebook), depth)[:3]


def _shared(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    return _search(D, x, codebooks[0])


def _by_depth(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    found = rqkernels.residual_search(x, codebooks, return_statistics=True)
    return [*found[:3], *found.statistics]


def _ragged() -> Iterator[Call]:
    for n, k, c, d in RAGGED_SHAPES:
        where = f"N, K, C, D = {n, k, c, d}"
        yield Call(f"{where}, shared", partial(_inputs, n, k, c, ()), partial(_search, d))
        yield Call(f"{where}, by depth", partial(_inputs, n, k, c, (d,)), partial(_search, d))
        yield Call(f"{where}, packed", partial(_inputs, n, k, c, ()), partial(_packed, d))
    yield Call("shared", rows_and_codes, _shared, captured=True)
    yield Call("by depth", rows_and_codes, _by_depth, captured=True)


RAGGED = list(_ragged())


def _typical_inputs(shape: Shape, rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, shape.channels, generator=generator), shape.codebooks(generator)


def typical(device: torch.device, quick: bool) -> Iterator[Call]:
    for shape in shapes(quick)[:3]:
        inputs = partial(_typical_inputs, shape, shape.rows(device))
        yield Call(shape.name, inputs, partial(_search, shape.depth))
        if shape.shared:
            yield Call(f"{shape.name}, packed", inputs, partial(_packed, shape.depth))


def _arguments(package: ModuleType) -> dict[str, Any]:
    flags = {"return_residuals": True, "return_statistics": True}
    small = Small.draw()
    return {"x": small.x, "codebooks": small.codebook, "depth": 3, **flags}


def _random(rng: Random) -> dict[str, Any]:
    books, channels, _ = codebooks(rng)
    if books["codebooks"].dim() == 2 and rng.random() < 0.3:
        books["codebooks"] = rqkernels.PackedCodebook(books["codebooks"])
    flags = {name: rng.random() < 0.5 for name in ("return_residuals", "return_statistics")}
    return {"x": normal(rng, *leading(rng), channels), **books, **flags}


FUNCTIONS = {
    "residual_search": Function(
        _arguments,
        _random,
        lambda: search_edges({"return_residuals": True, "return_statistics": True}),
        results="exact",
        integers={"depth": (1, 31)},
        flags=("return_residuals", "return_statistics"),
    ),
    "PackedCodebook": Function(
        lambda package: {"codebook": Small.draw().codebook},
        lambda rng: {"codebook": normal(rng, rng.choice([1, 9, 200]), rng.choice([1, 17, 40]))},
    ),
}
DERIVATIVES: dict[str, Derivative] = {}
