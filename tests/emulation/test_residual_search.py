"""The CUDA kernel of the residual search, on the CPU, against the definition: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rqkernels import reference

from .harness import Emulation, ragged_grid

# The sanitized builds take the same corners with fewer rows: 129 rows are 129 equal blocks.
ROWS = {"plain": 129, "asan": 5, "race": 3}


def check(emulation: Emulation, x_nc: np.ndarray, codebooks_dkc: np.ndarray, depth: int, **options) -> np.ndarray:
    """Codes of the kernel, after all results were compared with the definition's."""
    codes, quantized, norms, residuals = emulation.run("residual_search", x_nc, codebooks_dkc, depth, **options)
    codebooks = torch.from_numpy(codebooks_dkc)
    expected = reference.residual_search(
        torch.from_numpy(x_nc), codebooks[0] if len(codebooks) == 1 else codebooks, depth, return_residuals=True
    )
    np.testing.assert_array_equal(codes, expected.codes.numpy())
    np.testing.assert_array_equal(quantized, expected.quantized.numpy())
    np.testing.assert_array_equal(norms, expected.residual_norms.numpy())
    np.testing.assert_array_equal(residuals, expected.residuals.numpy())
    return codes


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize(("n", "k", "c", "d"), ragged_grid(N=(0, 1, 129), K=(1, 257), C=(1, 17, 256), D=(1, 4)))
def test_shapes(emulation: Emulation, n: int, k: int, c: int, d: int) -> None:
    rows = min(n, ROWS[emulation.build])
    schedules = (0, 2) if rows * k * c > 10**6 else (0, 1, 2, 3)
    check(emulation, normal(rows, c), normal(1, k, c, seed=1), d, schedules=schedules)


def test_one_codebook_per_depth(emulation: Emulation) -> None:
    check(emulation, normal(5, 19), normal(3, 45, 19, seed=1), 3)


def test_ties_go_to_the_lower_index(emulation: Emulation) -> None:
    # Every code four times over, in lanes, groups and rounds that are far apart.
    codebook = np.tile(normal(33, 8), (4, 1))
    codes = check(emulation, codebook[[70, 3, 131]], codebook[None], 2)
    assert codes[:, 0].tolist() == [4, 3, 32]


def test_nearly_equal_codes(emulation: Emulation) -> None:
    codebook = 100 + 1e-5 * normal(1, 97, 16)
    check(emulation, 100 + 1e-5 * normal(4, 16, seed=2), codebook, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite(emulation: Emulation, bad: float) -> None:
    x = normal(4, 17)
    x[1, 0] = x[3, 16] = bad
    codes = check(emulation, x, normal(1, 40, 17, seed=1), 3)
    assert (codes[[1, 3]] == -1).all() and (codes[[0, 2]] >= 0).all()


def test_a_residual_that_overflows(emulation: Emulation) -> None:
    codes = check(emulation, np.full((1, 4), 3e38, np.float32), np.full((1, 3, 4), -3e38, np.float32), 3)
    assert codes.tolist() == [[0, -1, -1]]


def test_a_bad_code_is_never_chosen(emulation: Emulation) -> None:
    x, codebook = normal(5, 9), normal(1, 50, 9, seed=1)
    codebook[0, [0, 20, 49], 3] = np.nan, np.inf, -np.inf
    codes, *_ = emulation.run("residual_search", x, codebook, 2)
    good = np.isfinite(codebook[0]).all(axis=1).nonzero()[0]
    expected = reference.residual_search(torch.from_numpy(x), torch.from_numpy(codebook[0, good]), 2)
    np.testing.assert_array_equal(codes, good[expected.codes.numpy()])


def test_more_channels_than_the_kernel_takes(emulation: Emulation) -> None:
    with pytest.raises(Exception, match="at most 8192 channels, got 8193"):
        emulation.run("residual_search", normal(1, 8193), normal(1, 1, 8193), 1)
