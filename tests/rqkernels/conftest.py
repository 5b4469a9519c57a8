"""Vectors and codebooks on which a search can go wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

KINDS = [
    "gaussian", "offset", "near-duplicates", "duplicates", "collapsed", "one-channel", "huge", "tiny", "denormal",
    "integers", "copies", "power-law",
]  # fmt: skip


def _draw(kind: str, n: int, k: int, c: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (n, c) and a codebook (k, c) of a kind on which a search can go wrong."""
    x, e = torch.randn(n, c), torch.randn(k, c)
    if kind == "offset":  # a float32 expansion of the square has no digits left
        x, e = x + 1000, e + 1000
    elif kind == "near-duplicates":
        e = e[:1] + 1e-6 * e
    elif kind == "duplicates":
        e = e[torch.randint(0, max(1, k // 2), (k,))]
    elif kind == "collapsed":
        e = e[:1].expand(k, c).contiguous()
    elif kind == "one-channel":
        x[:, 0] *= 100
        e[:, 0] *= 100
    elif kind == "huge":
        x, e = x * 1e30, e * 1e30
    elif kind == "tiny":
        x, e = x * 1e-30, e * 1e-30
    elif kind == "denormal":
        x, e = x * 1e-42, e * 1e-42
    elif kind == "integers":  # exact in any arithmetic, and full of ties
        x, e = x.round(), e.round()
    elif kind == "copies":  # distances of zero
        x = e[torch.randint(0, k, (n,))].clone()
    elif kind == "power-law":
        e = e * (torch.arange(1, k + 1)[:, None].float() ** -1.0)
    return x.to(device), e.to(device)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of hard data in turn."""
    return request.param


@pytest.fixture
def draw() -> Callable[[str, int, int, int, torch.device], tuple[torch.Tensor, torch.Tensor]]:
    """draw(kind, n, k, c, device): vectors (n, c) and a codebook (k, c) of that kind."""
    return _draw
