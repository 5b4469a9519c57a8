"""Shapes of the systems that residual quantization serves, and data of those shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
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
    changes: bool = False  # the codebook is another one in every round, as in training

    def rows(self, device: torch.device) -> int:
        return self.rows_cuda if device.type == "cuda" else self.rows_cpu

    def codebooks(self, generator: torch.Generator) -> Tensor:
        """Random codes of norms between a fifth and the whole of a standard normal row's, as a trained
        codebook of all depths has them."""
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


SYSTEMS = (
    Shape("rq-vae", 256, 16384, 4, True, 1024, 8192),
    Shape("var", 32, 4096, 1, True, 8192, 131072),
    Shape("semantic-ids", 32, 256, 3, False, 100_000, 1_000_000),
    Shape("audio-128", 128, 1024, 8, False, 8192, 131072),
    Shape("audio-8", 8, 1024, 32, False, 8192, 131072),
)
TINY = (
    Shape("tiny-shared", 8, 16, 2, True, 64, 64),
    Shape("tiny-separate", 8, 16, 2, False, 64, 64),
)


def shapes(quick: bool) -> tuple[Shape, ...]:
    """Return all shapes; with `quick` tiny ones, which only show that a call runs."""
    return TINY if quick else SYSTEMS


def codebook_at(codebooks: Tensor, d: int) -> Tensor:
    return codebooks if codebooks.dim() == 2 else codebooks[d]


# N, K, C, D that fill no tile, no block and no vector.
RAGGED_SHAPES = (
    (0, 5, 4, 1),
    (1, 1, 1, 1),
    (129, 257, 17, 3),
    (70, 256, 256, 2),
    (300, 31, 8, 4),
    (1500, 1, 3, 1),
)

# N, K, C of soft labels, which all lie at one depth.
RAGGED_LABELS = ((1, 1, 1), (129, 257, 17), (70, 300, 256), (9, 40, 900))


def typical_labels(quick: bool) -> tuple[tuple[int, int, int, float], ...]:
    """N, K, C and tau of an RQ-VAE's codes and of a VAR's."""
    return ((64, 16, 8, 4.0),) if quick else ((8192, 16384, 256, 20.0), (65536, 4096, 32, 2.0))
