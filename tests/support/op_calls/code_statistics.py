"""Calls of the code statistics."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

import rqkernels

from ._data import DTYPES, ROWS, K, Small, leading, normal, rows, rows_and_codes
from ._shapes import RAGGED_SHAPES, shapes
from ._types import Call, Derivative, Function


def _inputs(n: int, k: int, c: int, generator: Generator) -> tuple[Tensor, Tensor]:
    x, codes = torch.randn(n, c, generator=generator), torch.randint(k, (n,), generator=generator)
    if n > 3:
        x[2], codes[2] = torch.nan, -1
    return x, codes


def _statistics(num_codes: int, x: Tensor, codes: Tensor) -> list[Tensor]:
    return [*rqkernels.code_statistics(x, codes, num_codes)]


def _captured(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    return [*_statistics(K, x, codes[:, 0]), *_statistics(K, x, codes[:, 1])]


RAGGED = [
    *(Call(f"N, K, C = {n, k, c}", partial(_inputs, n, k, c), partial(_statistics, k)) for n, k, c, _ in RAGGED_SHAPES),
    Call("codes of two depths", rows_and_codes, _captured, captured=True),
]


def typical(device: torch.device, quick: bool) -> Iterator[Call]:
    for shape in shapes(quick)[:3]:
        inputs = partial(_inputs, shape.rows(device), shape.codes, shape.channels)
        yield Call(shape.name, inputs, partial(_statistics, shape.codes))


def _arguments(package: ModuleType) -> dict[str, Any]:
    small = Small.draw()
    return {"x": small.x, "codes": small.codes[:, 0], "num_codes": 9}


def _random(rng: Random) -> dict[str, Any]:
    some, k = leading(rng), rng.choice([1, 6, 300])
    return {"x": normal(rng, *some, rng.choice([1, 5])), "codes": torch.randint(-1, k, some), "num_codes": k}


def _edges() -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for sizes in ROWS:
            for k in (1, 300):
                x = rows(*sizes, dtype=dtype)
                yield {"x": x, "codes": torch.randint(-1, k, sizes[:-1]), "num_codes": k}


FUNCTIONS = {
    "code_statistics": Function(_arguments, _random, _edges, results="exact", integers={"num_codes": (1, 40)}),
}
DERIVATIVES: dict[str, Derivative] = {}
