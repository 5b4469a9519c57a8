"""The CUDA kernel of the stochastic residual search, on the CPU, against the definition.

Both weigh codes in float64, so they draw the same ones; a uniform within float64's rounding of a boundary does not
come up among these.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rqkernels import reference

from .harness import Emulation, ragged_grid

# The sanitized builds take the same corners with fewer rows.
ROWS = {"plain": 129, "asan": 5, "race": 3}


def draw(
    emulation: Emulation,
    x_nc: np.ndarray,
    codebooks_dkc: np.ndarray,
    depth: int,
    tau: float,
    seed: int,
    offset: int = 0,
) -> list[np.ndarray]:
    arguments = {"x": x_nc, "codebooks": codebooks_dkc, "depth": depth, "tau": tau, "seed": seed, "offset": offset}
    return emulation.run("stochastic_residual_search", **arguments)


def check(
    emulation: Emulation,
    x_nc: np.ndarray,
    codebooks_dkc: np.ndarray,
    depth: int,
    tau: float = 1.0,
    seed: int = 7,
    offset: int = 0,
) -> np.ndarray:
    """Compare all results with the definition's, and return the kernel's codes."""
    codes, quantized, norms, residuals = draw(emulation, x_nc, codebooks_dkc, depth, tau, seed, offset)
    codebooks = torch.from_numpy(codebooks_dkc)
    expected = reference.stochastic_residual_search(
        torch.from_numpy(x_nc),
        codebooks[0] if len(codebooks) == 1 else codebooks,
        depth,
        tau=tau,
        seed=seed,
        offset=offset,
        return_residuals=True,
    )
    np.testing.assert_array_equal(codes, expected.codes.numpy())
    np.testing.assert_array_equal(quantized, expected.quantized.numpy())
    np.testing.assert_array_equal(norms, expected.residual_sq_norms.numpy())
    np.testing.assert_array_equal(residuals, expected.residuals.numpy())
    return codes


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize(("n", "k", "c", "d"), ragged_grid(N=(0, 1, 129), K=(1, 257), C=(1, 17, 256), D=(1, 4)))
def test_shapes(emulation: Emulation, n: int, k: int, c: int, d: int) -> None:
    rows = min(n, ROWS[emulation.build])
    if rows * k * c * d > 10**7:
        rows = 9
    check(emulation, normal(rows, c), normal(1, k, c, seed=1), d, tau=0.5 * c)


@pytest.mark.parametrize("tau", [1e-30, 1e-3, 0.5, 4.0, 1e6, np.inf])
def test_temperatures(emulation: Emulation, tau: float) -> None:
    # 1100 codes: three rounds.
    codes = check(emulation, normal(ROWS[emulation.build], 6), normal(1, 1100, 6, seed=1), 2, tau=tau)
    if emulation.build == "plain":
        assert len(np.unique(codes)) > 20


def test_one_codebook_per_depth(emulation: Emulation) -> None:
    check(emulation, normal(5, 19), normal(3, 45, 19, seed=1), 3, tau=3.0)


def test_counters(emulation: Emulation) -> None:
    x, e = normal(ROWS[emulation.build], 4), normal(1, 70, 4, seed=1)
    plain = check(emulation, x, e, 2, tau=8.0)
    for seed, offset in ((2**64 - 1, 0), (2**32, 0), (7, 3), (7, 2**32 - 1), (7, 2**63 - 200)):
        codes = check(emulation, x, e, 2, tau=8.0, seed=seed, offset=offset)
        assert emulation.build != "plain" or not np.array_equal(codes, plain)
    moved = check(emulation, x[2:], e, 2, tau=8.0, offset=2)
    np.testing.assert_array_equal(moved, plain[2:])


def test_without_temperature_the_nearest_code(emulation: Emulation) -> None:
    x, e = 100 + 1e-3 * normal(9, 16, seed=2), 100 + 1e-3 * normal(1, 97, 16)
    codes = check(emulation, x, e, 2, tau=1e-30)
    nearest = reference.residual_search(torch.from_numpy(x), torch.from_numpy(e[0]), 2).codes
    np.testing.assert_array_equal(codes, nearest.numpy())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite(emulation: Emulation, bad: float) -> None:
    x = normal(4, 17)
    x[1, 0] = x[3, 16] = bad
    codes = check(emulation, x, normal(1, 40, 17, seed=1), 3)
    assert (codes[[1, 3]] == -1).all() and (codes[[0, 2]] >= 0).all()


def test_a_residual_that_overflows(emulation: Emulation) -> None:
    codes = check(emulation, np.full((1, 4), 3e38, np.float32), np.full((1, 3, 4), -3e38, np.float32), 3)
    assert codes[0, 0] >= 0 and codes[0, 1:].tolist() == [-1, -1]


def test_a_bad_code_is_never_drawn(emulation: Emulation) -> None:
    x, codebook = normal(9, 9), normal(1, 50, 9, seed=1)
    codebook[0, [0, 20, 49], 3] = np.nan, np.inf, -np.inf
    codes = draw(emulation, x, codebook, 2, 50.0, 3)[0]
    good = np.isfinite(codebook[0]).all(axis=1).nonzero()[0]
    expected = reference.stochastic_residual_search(
        torch.from_numpy(x), torch.from_numpy(codebook[0, good]), 2, tau=50.0, seed=3
    )
    np.testing.assert_array_equal(codes, good[expected.codes.numpy()])
    codebook[:] = np.nan
    assert (draw(emulation, x, codebook, 1, 50.0, 3)[0] == -1).all()


def test_more_channels_than_the_kernel_takes(emulation: Emulation) -> None:
    with pytest.raises(Exception, match="at most 8192 channels, got 8193"):
        draw(emulation, normal(1, 8193), normal(1, 1, 8193), 1, 1.0, 0)
