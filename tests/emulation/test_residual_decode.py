"""The CUDA kernel of the decode, on the CPU, against the definition: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rqkernels import reference

from .harness import Emulation, ragged_grid

ROWS = {"plain": 129, "asan": 129, "race": 17}


def check(emulation: Emulation, codes_nd: np.ndarray, codebooks_dkc: np.ndarray, depth: int) -> int:
    """Compare the kernel's sums with the definition's, and return its flag."""
    decoded, any_bad = emulation.run("residual_decode", codes=codes_nd, codebooks=codebooks_dkc, depth=depth)
    codebooks = torch.from_numpy(codebooks_dkc)
    expected = reference.residual_decode(
        torch.from_numpy(codes_nd), codebooks[0] if len(codebooks) == 1 else codebooks, depth, check=False
    )
    np.testing.assert_array_equal(decoded, expected.numpy())
    return int(any_bad[0])


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def some_codes(k: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, k, shape)


@pytest.mark.parametrize(("n", "k", "c", "d"), ragged_grid(N=(0, 1, 129), K=(1, 257), C=(1, 17, 256), D=(1, 4)))
def test_shapes(emulation: Emulation, n: int, k: int, c: int, d: int) -> None:
    assert check(emulation, some_codes(k, min(n, ROWS[emulation.build]), d), normal(1, k, c), d) == 0


def test_one_codebook_per_depth(emulation: Emulation) -> None:
    assert check(emulation, some_codes(31, 5, 3), normal(3, 31, 20), 3) == 0


def test_only_the_first_depths(emulation: Emulation) -> None:
    codes = some_codes(31, 5, 4)
    codes[:, 2:] = -1  # not looked at
    assert check(emulation, codes, normal(1, 31, 20), 2) == 0


@pytest.mark.parametrize("bad", [-1, 31, 2**40, -(2**63)])
def test_a_bad_code_makes_its_row_nan_and_raises_the_flag(emulation: Emulation, bad: int) -> None:
    codes = some_codes(31, 20, 3)
    codes[4, 2] = codes[17, 0] = bad
    assert check(emulation, codes, normal(1, 31, 20), 3) == 1
