"""Shapes of systems that use residual quantization, and random data of these shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from _harness import QUICK
from torch import Tensor


class Shape(NamedTuple):
    """N rows (by device) of C channels, D depths of K codes; one codebook for all depths, or one each."""

    name: str
    channels: int
    codes: int
    depth: int
    shared: bool
    rows_cpu: int
    rows_cuda: int
    changes: bool = False  # the codebook changes in every round, as in training

    def rows(self, device: torch.device) -> int:
        return self.rows_cuda if device.type == "cuda" else self.rows_cpu

    def codebooks(self, generator: torch.Generator) -> Tensor:
        """Return random codes with norms between 0.2 and 1 times a standard normal row's, as in a trained codebook that
        all depths share."""
        leading = () if self.shared else (self.depth,)
        norms = torch.rand(*leading, self.codes, 1, generator=generator) * 0.8 + 0.2
        return torch.randn(*leading, self.codes, self.channels, generator=generator) * norms

    def described(self, device: torch.device) -> dict[str, object]:
        return {
            "N": self.rows(device),
            "C": self.channels,
            "K": self.codes,
            "D": self.depth,
            "shared": self.shared,
            **({"changes": True} if self.changes else {}),
        }


SHAPES = (
    [
        Shape("tiny-shared", 8, 16, 2, True, 64, 64),
        Shape("tiny-separate", 8, 16, 2, False, 64, 64),
    ]
    if QUICK
    else [
        Shape("rq-vae", 256, 16384, 4, True, 1024, 8192),
        Shape("var", 32, 4096, 1, True, 8192, 131072),
        Shape("semantic-ids", 32, 256, 3, False, 100_000, 1_000_000),
        Shape("audio-128", 128, 1024, 8, False, 8192, 131072),
        Shape("audio-8", 8, 1024, 32, False, 8192, 131072),
    ]
)


def codebook_at(codebooks: Tensor, d: int) -> Tensor:
    return codebooks if codebooks.dim() == 2 else codebooks[d]
