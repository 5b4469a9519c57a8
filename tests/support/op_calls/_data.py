"""Data that the operators' modules share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *DTYPES)  # half of the random calls are in float32

# --- captured calls --------------------------------------------------------------------------------------

N, K, C, D = 130, 70, 17, 3


def rows_and_codes(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N, C), one codebook per depth (D, K, C), codes (N, D); a row that is not finite and codes -1 among them."""
    x, codebooks = torch.randn(N, C, generator=generator), torch.randn(D, K, C, generator=generator)
    codes = torch.randint(K, (N, D), generator=generator)
    bad = generator.initial_seed() % N
    x[bad] = torch.nan
    codes[bad] = -1
    return x, codebooks, codes


# --- one valid call --------------------------------------------------------------------------------------


class Small(NamedTuple):
    """Tensors that valid calls are made of."""

    x: Tensor  # (4, 5)
    codebook: Tensor  # (9, 5)
    codes: Tensor  # (4, 2)
    qkv: Tensor  # (2, 4, 3, 2, 8)

    @classmethod
    def draw(cls) -> Small:
        """Sample all of them from torch's global generator."""
        return cls(torch.randn(4, 5), torch.randn(9, 5), torch.randint(9, (4, 2)), torch.randn(2, 4, 3, 2, 8))


# --- random calls, from torch's global generator ---------------------------------------------------------


def normal(rng: Random, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*sizes).to(dtype or rng.choice(FLOATS))


def leading(rng: Random) -> tuple[int, ...]:
    return rng.choice([(), (1,), (5,), (2, 3), (0,), (40,), (3, 0)])


def codebooks(rng: Random) -> tuple[dict[str, Any], int, int]:
    """codebooks and depth; channels; codes"""
    k, c, d = rng.choice([1, 7, 40]), rng.choice([1, 4, 17]), rng.choice([1, 3])
    if rng.random() < 0.5:
        return {"codebooks": normal(rng, k, c), "depth": d}, c, k
    return {"codebooks": normal(rng, d, k, c), "depth": rng.choice([None, d])}, c, k


# --- edges -----------------------------------------------------------------------------------------------

ROWS = ((9, 5), (2, 4, 1), (0, 5), (5,), (3, 0, 5))  # the last is the number of channels


def rows(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, and where there is room rows of NaN, of infinity, of one infinity, zeros and the largest."""
    x = torch.randn(sizes)
    flat = x.view(-1, sizes[-1]) if x.numel() else x
    if len(flat) >= 8:
        flat[1], flat[2], flat[4, 0], flat[5] = NAN, INF, -INF, 0
        flat[6] = torch.finfo(dtype).max / 4
    return x.to(dtype)


def search_edges(more: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for sizes in ROWS:
            for k in (1, 7):
                yield {"x": rows(*sizes, dtype=dtype), "codebooks": torch.randn(k, sizes[-1]), "depth": 3, **more}
                by_depth = torch.randn(2, k, sizes[-1]).to(dtype)
                yield {"x": rows(*sizes), "codebooks": by_depth, "depth": None, **more}
