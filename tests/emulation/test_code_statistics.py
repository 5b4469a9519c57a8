"""The CUDA kernel of the code statistics, on the CPU, against the definition: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rqkernels import reference

from .harness import Emulation, ragged_grid


def check(emulation: Emulation, x_nc: np.ndarray, codes_n: np.ndarray, k: int) -> None:
    counts, sums = emulation.run("code_statistics", x_nc, codes_n, k)
    expected = reference.code_statistics(torch.from_numpy(x_nc), torch.from_numpy(codes_n), k)
    np.testing.assert_array_equal(counts, expected[0].numpy())
    np.testing.assert_array_equal(sums, expected[1].numpy())


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


# A tile is 256 rows: 300 need two, and 257 channels two passes.
@pytest.mark.parametrize(("n", "k", "c"), ragged_grid(N=(0, 1, 129, 300), K=(1, 257), C=(1, 17, 257)))
def test_shapes(emulation: Emulation, n: int, k: int, c: int) -> None:
    k = k if emulation.build == "plain" else min(k, 9)  # a code is a block, all alike
    check(emulation, normal(n, c), np.random.default_rng(1).integers(0, k, n), k)


def test_minus_one_counts_nowhere(emulation: Emulation) -> None:
    codes = np.random.default_rng(1).integers(-1, 5, 60)
    assert (codes == -1).any()
    check(emulation, normal(60, 7), codes, 5)


def test_values_of_a_row_that_is_not_finite_reach_only_its_code(emulation: Emulation) -> None:
    x = normal(9, 3)
    x[4] = np.nan, np.inf, -np.inf
    check(emulation, x, np.arange(9) % 4, 4)


@pytest.mark.parametrize("bad", [-2, 5, 2**40])
def test_a_bad_code_makes_all_nan(emulation: Emulation, bad: int) -> None:
    codes = np.arange(300) % 5
    codes[280] = bad
    counts, sums = emulation.run("code_statistics", normal(300, 4), codes, 5)
    assert np.isnan(counts).all() and np.isnan(sums).all()
