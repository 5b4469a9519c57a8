"""Calls of the sum of codes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

import rqkernels

from ._data import DTYPES, INF, NAN, Small, codebooks, leading, rows_and_codes
from ._shapes import RAGGED_SHAPES, Shape, shapes
from ._types import Call, Derivative, Function


def _inputs(n: int, k: int, c: int, d: int, books: tuple[int, ...], generator: Generator) -> tuple[Tensor, Tensor]:
    codes, codebooks = torch.randint(k, (n, d), generator=generator), torch.randn(*books, k, c, generator=generator)
    if n > 3:
        codes[2] = -1
    return codes, codebooks


def _decode(codes: Tensor, codebooks: Tensor) -> list[Tensor]:
    return [rqkernels.residual_decode(codes, codebooks, check=False)]


def _captured(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    return [*_decode(codes, codebooks), *_decode(codes, codebooks[0])]


def _ragged() -> Iterator[Call]:
    for n, k, c, d in RAGGED_SHAPES:
        for books in ((), (d,)):
            how = "by depth" if books else "shared"
            yield Call(f"N, K, C, D = {n, k, c, d}, {how}", partial(_inputs, n, k, c, d, books), _decode)
    yield Call("by depth and shared", rows_and_codes, _captured, captured=True)


RAGGED = list(_ragged())


def _typical_inputs(shape: Shape, rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randint(shape.codes, (rows, shape.depth), generator=generator), shape.codebooks(generator)


def typical(device: torch.device, quick: bool) -> Iterator[Call]:
    for shape in shapes(quick)[:3]:
        yield Call(shape.name, partial(_typical_inputs, shape, shape.rows(device)), _decode)


def _arguments(package: ModuleType) -> dict[str, Any]:
    small = Small.draw()
    return {"codes": small.codes, "codebooks": small.codebook, "depth": 2, "check": True}


def _random(rng: Random) -> dict[str, Any]:
    books, _, num_codes = codebooks(rng)
    depth = books["depth"] or books["codebooks"].shape[0]
    codes = torch.randint(num_codes, (*leading(rng), depth))
    return {"codes": codes, "codebooks": books["codebooks"], "depth": rng.choice([None, depth, 1]), "check": True}


def _edges() -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for sizes in ((9, 3), (2, 4, 1), (0, 3), (3, 0, 2), (2,)):
            codes = torch.randint(7, sizes)
            shared, by_depth = torch.randn(7, 5).to(dtype), torch.randn(3, 7, 5).to(dtype)
            shared[2], by_depth[0, 3, 1] = NAN, INF
            yield {"codes": codes, "codebooks": shared}
            yield {"codes": codes, "codebooks": by_depth, "depth": 1}
            bad = codes.clone()
            if bad.numel():
                bad.view(-1)[0] = -1
                bad.view(-1)[-1] = 2**62
            yield {"codes": bad, "codebooks": shared, "check": False}


FUNCTIONS = {
    "residual_decode": Function(
        _arguments,
        _random,
        _edges,
        gradients=("codebooks",),
        results="exact",
        integers={"depth": (1, 63)},
        flags=("check",),
    ),
}

_DRAWN = Generator().manual_seed(7)
_CODES = torch.randint(0, 9, (4, 3), generator=_DRAWN)
DERIVATIVES = {
    "decode": Derivative(
        "residual_decode",
        lambda m, v: m.residual_decode(_CODES, v, check=False),
        torch.randn(9, 4, generator=_DRAWN),
    ),
    "decode by depth": Derivative(
        "residual_decode",
        lambda m, v: m.residual_decode(_CODES, v, 2, check=False),
        torch.randn(3, 9, 4, generator=_DRAWN),
    ),
}
