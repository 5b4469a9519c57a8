"""Calls of my_op."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

import rqkernels

from ._data import DTYPES, ROWS, Small, leading, normal, rows, rows_and_codes
from ._shapes import RAGGED_SHAPES, shapes
from ._types import Call, Derivative, Function

# TODO(my_op): calls and arguments of the operator; ._types says what each is for.


def _inputs(n: int, c: int, generator: Generator) -> list[Tensor]:
    return [torch.randn(n, c, generator=generator)]


def _multiply(x: Tensor) -> list[Tensor]:
    return [rqkernels.my_op(x, 0.7)]


def _captured(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    return _multiply(x)


RAGGED = [
    *(Call(f"N, C = {n, c}", partial(_inputs, n, c), _multiply) for n, _, c, _ in RAGGED_SHAPES),
    Call("rows", rows_and_codes, _captured, captured=True),
]


def typical(device: torch.device, quick: bool) -> Iterator[Call]:
    for shape in shapes(quick)[:3]:
        yield Call(shape.name, partial(_inputs, shape.rows(device), shape.channels), _multiply)


def _arguments(package: ModuleType) -> dict[str, Any]:
    return {"x": Small.draw().x, "factor": 0.5}


def _random(rng: Random) -> dict[str, Any]:
    return {"x": normal(rng, *leading(rng), rng.choice([1, 4, 17])), "factor": rng.choice([0, 0.5, 2])}


def _edges() -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for sizes in ROWS:
            yield {"x": rows(*sizes, dtype=dtype), "factor": 0.5}


FUNCTIONS = {
    "my_op": Function(_arguments, _random, _edges, gradients=("x",), results="exact", numbers=("factor",)),
}
DERIVATIVES = {
    "my_op": Derivative(
        "my_op",
        lambda m, v: m.my_op(v, 0.7),
        torch.randn(3, 4, generator=Generator().manual_seed(7)),
    ),
}
