"""Calls of sampling from logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

import rqkernels

from ._data import DTYPES, INF, leading, normal, rows_and_codes
from ._types import Call, Derivative, Function


def _inputs(n: int, k: int, generator: Generator) -> list[Tensor]:
    return [torch.randn(n, k, generator=generator)]


def _sample(settings: dict[str, Any], logits: Tensor) -> list[Tensor]:
    return [rqkernels.sample_logits(logits, seed=1, **settings)]


def _captured(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    """Counters that the kernel reads from the device."""
    logits, counter = x.nan_to_num(), codes[:1, 0].clamp_min(0)
    return [
        rqkernels.sample_logits(logits, seed=3, offset=counter, stream=counter),
        rqkernels.sample_logits(codebooks.flatten(1), seed=3, stream=counter, top_k=900, top_p=0.9),
    ]


def _ragged() -> Iterator[Call]:
    for n, k in ((0, 5), (1, 1), (129, 257), (9, 3000)):
        for settings in ({}, {"temperature": 0}, {"top_k": 1 + k // 2}, {"top_k": 1 + k // 2, "top_p": 0.9}):
            yield Call(f"N, K = {n, k}, {settings}", partial(_inputs, n, k), partial(_sample, settings))
    yield Call("counters on the device", rows_and_codes, _captured, captured=True)


RAGGED = list(_ragged())


def typical(device: torch.device, quick: bool) -> Iterator[Call]:
    n, k = (4, 32) if quick else (500, 16384)  # 500 images of the 1.4B prior
    for settings in ({}, {"top_k": k // 8, "top_p": 0.95}):
        yield Call(f"N, K = {n, k}, {settings}", partial(_inputs, n, k), partial(_sample, settings))


def _arguments(package: ModuleType) -> dict[str, Any]:
    settings = {"temperature": 0.9, "top_k": 3, "top_p": 0.8, "seed": 1, "offset": 2, "stream": 3}
    return {"logits": torch.randn(4, 9), **settings, "streams": 2}


def _random(rng: Random) -> dict[str, Any]:
    rows = leading(rng)
    number = math.prod(rows)
    place = [0, 3, torch.tensor(2), torch.tensor([4])]
    return {
        "logits": normal(rng, *rows, rng.choice([1, 7, 100])),
        "temperature": rng.choice([0, 0.7, 1.0]),
        "top_k": rng.choice([None, 1, 3, 1000]),
        "top_p": rng.choice([None, 0.5, 1.0]),
        "seed": rng.choice([0, 2**64 - 1]),
        "offset": rng.choice(place),
        "stream": rng.choice(place),
        "streams": rng.choice([s for s in (1, 2, 5) if number % s == 0]),
    }


def _edges() -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for sizes in ((40, 7), (2, 3, 1), (0, 7), (7,), (3, 0, 5)):
            logits = torch.randn(sizes).to(dtype)
            if len(logits) > 30:
                logits[:5, 2:], logits[7] = -INF, 0
            for cut in ({}, {"temperature": 0}, {"top_k": 2, "top_p": 0.5}, {"temperature": 1e-3}, {"top_k": 2**70}):
                yield {"logits": logits, "seed": 2**64 - 1, "offset": torch.tensor(3), "stream": 2**32 - 1, **cut}


FUNCTIONS = {
    "sample_logits": Function(
        _arguments,
        _random,
        _edges,
        results="drawn",
        integers={"top_k": (1, None), "seed": (0, 64), "offset": (0, 63), "stream": (0, 32), "streams": (1, 32)},
        numbers=("temperature", "top_p"),
    ),
}
DERIVATIVES: dict[str, Derivative] = {}
