"""The CUDA kernel of my_op, on the CPU, against the definition: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rqkernels import reference

from .harness import Emulation


def check(emulation: Emulation, x_n: np.ndarray, factor: float) -> None:
    (y,) = emulation.run("my_op", x=x_n, factor=factor)
    np.testing.assert_array_equal(y, reference.my_op(torch.from_numpy(x_n), factor).numpy())


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


# TODO(my_op): sizes around those of a block; ragged_grid in harness.py combines several.
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 2000])
def test_shapes(emulation: Emulation, n: int) -> None:
    check(emulation, normal(n), 0.7)


def test_what_is_not_finite(emulation: Emulation) -> None:
    x = normal(9)
    x[[2, 4, 6]] = np.nan, np.inf, -np.inf
    check(emulation, x, 2.0)
