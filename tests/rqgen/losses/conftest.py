"""Fixtures for the tests of the losses: VGG16 and heads by a formula, and what the published code made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rqgen.losses import LPIPS

STAGE1 = Path(__file__).parents[2] / "data" / "stage1_loss"
# torchvision's index, channels before and after, of each convolution of VGG16.
CONVOLUTIONS = (
    *((0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256)),
    *((17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
HEADS = (64, 128, 256, 512, 512)


def fraction(count: int, parameter: int) -> np.ndarray:
    """Numbers in [0, 1) that a formula gives: f(i, p) = ((2654435761 i + 40503 p) mod 2^32) / 2^32."""
    index = np.arange(count, dtype=np.uint64)
    return ((index * np.uint64(2654435761) + np.uint64(parameter * 40503)) % np.uint64(2**32)) / 2.0**32


class Weights(NamedTuple):
    vgg: dict[str, Tensor]
    heads: dict[str, Tensor]


@pytest.fixture(scope="session")
def weights() -> Weights:
    vgg = {}
    for number, (index, before, after) in enumerate(CONVOLUTIONS):
        fan_in = before * 9
        weight = (2 * fraction(after * fan_in, 2 * number) - 1) * np.sqrt(6 / fan_in)
        bias = 0.01 * (2 * fraction(after, 2 * number + 1) - 1)
        vgg[f"features.{index}.weight"] = torch.from_numpy(weight).float().view(after, before, 3, 3)
        vgg[f"features.{index}.bias"] = torch.from_numpy(bias).float()
    heads = {
        f"lin{k}.model.1.weight": torch.from_numpy(fraction(channels, 1000 + k) / channels).float().view(1, -1, 1, 1)
        for k, channels in enumerate(HEADS)
    }
    return Weights(vgg, heads)


@pytest.fixture(scope="session")
def lpips(weights: Weights) -> LPIPS:
    return LPIPS(weights.vgg, weights.heads)


class Published:
    """Tensors that the published loss computed."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = json.loads((STAGE1 / "config.json").read_text())
        self.tensors = load_file(STAGE1 / "expected.safetensors")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def within(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names start with the prefix, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def close(self, name: str, got: Tensor, tolerance: float = 1e-4) -> None:
        expected = self.tensors[name]
        assert expected.numel() == got.numel(), name
        assert (expected.reshape(got.shape) - got).abs().max() <= tolerance, name


@pytest.fixture(scope="session")
def published() -> Published:
    return Published()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
