"""The CUDA kernels of the code statistics, on the CPU, against the definition: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rqkernels import reference

from .harness import Emulation, ragged_grid


def statistics(
    emulation: Emulation, x: np.ndarray, codes: np.ndarray, num_codes: int, codebooks: int = 1
) -> list[np.ndarray]:
    return emulation.run("code_statistics", x=x, codes=codes, num_codes=num_codes, codebooks=codebooks)


def check(emulation: Emulation, x_nc: np.ndarray, codes_n: np.ndarray, k: int) -> None:
    counts, sums = statistics(emulation, x_nc[:, None], codes_n[:, None], k)
    expected = reference.code_statistics(torch.from_numpy(x_nc), torch.from_numpy(codes_n), k)
    np.testing.assert_array_equal(counts, expected[0][None].numpy())
    np.testing.assert_array_equal(sums, expected[1][None].numpy())


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def some_codes(k: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, k, shape)


# One digit sorts 256 codes, two sort 257. 4 channels go in one load, 17 do not.
@pytest.mark.parametrize(("n", "k", "c"), ragged_grid(N=(0, 1, 129), K=(1, 256, 257), C=(1, 4, 17)))
def test_shapes(emulation: Emulation, n: int, k: int, c: int) -> None:
    check(emulation, normal(n, c), some_codes(k, n), k)


def test_three_digits(emulation: Emulation) -> None:
    # Far fewer rows than codes, and the first and last of them taken.
    codes = some_codes(70_000, 60)
    codes[[3, 4, 5]] = 0, 69_999, 65_536
    check(emulation, normal(60, 1), codes, 70_000)


# A tile of the sort is 1024 rows, and so is a piece of a sum.
@pytest.mark.parametrize("n", [1023, 1024, 1025, 2500])
def test_rows_that_all_chose_one_code(emulation: Emulation, n: int) -> None:
    check(emulation, normal(n, 4), np.full(n, 2), 3)


# Pieces of two long codes begin in one window of 1024 sorted rows: the last of the one, the first of the other. And
# long codes that begin where a window does, and end there.
@pytest.mark.parametrize(
    "rows_of_code", [(100, 1500, 1300, 1024, 1030), (1024, 1500, 548, 2048, 1025), (2048, 0, 1026), (1, 2047, 1100)]
)
def test_long_and_short_codes_beside_one_another(emulation: Emulation, rows_of_code: tuple[int, ...]) -> None:
    codes = np.repeat(np.arange(len(rows_of_code)), rows_of_code)
    np.random.default_rng(2).shuffle(codes)
    check(emulation, normal(len(codes), 1), codes, 300)


def test_order_within_a_code_is_that_of_the_rows(emulation: Emulation) -> None:
    # Summed in another order, the small terms would vanish next to the large ones, or survive where they should not.
    codes = some_codes(2, 1500)
    x = normal(1500, 1) * np.float32(10.0) ** np.random.default_rng(3).integers(-18, 18, (1500, 1)).astype(np.float32)
    check(emulation, x, codes, 2)


def test_minus_one_counts_nowhere(emulation: Emulation) -> None:
    codes = np.random.default_rng(1).integers(-1, 5, 60)
    assert (codes == -1).any()
    check(emulation, normal(60, 7), codes, 5)
    check(emulation, normal(60, 7), np.full(60, -1), 5)


def test_values_of_a_row_that_is_not_finite_reach_only_its_code(emulation: Emulation) -> None:
    x = normal(9, 3)
    x[4] = np.nan, np.inf, -np.inf
    check(emulation, x, np.arange(9) % 4, 4)


@pytest.mark.parametrize("shared_x", [False, True])
def test_depths_each_for_themselves(emulation: Emulation, shared_x: bool) -> None:
    n, d, k, c = 150, 3, 100, 4
    x, codes = normal(n, 1 if shared_x else d, c), some_codes(k, n, d)
    codes[5, 1:] = -1
    counts, sums = statistics(emulation, x, codes, k, codebooks=d)
    for i in range(d):
        expected = reference.code_statistics(
            torch.from_numpy(x[:, 0 if shared_x else i].copy()), torch.from_numpy(codes[:, i].copy()), k
        )
        np.testing.assert_array_equal(counts[i], expected[0].numpy())
        np.testing.assert_array_equal(sums[i], expected[1].numpy())


def test_depths_together_share_rows(emulation: Emulation) -> None:
    x, codes = normal(150, 1, 4), some_codes(30, 150, 3)
    counts, sums = statistics(emulation, x, codes, 30)
    repeated = torch.from_numpy(x).expand(150, 3, 4)
    expected = reference.code_statistics(repeated, torch.from_numpy(codes), 30)
    np.testing.assert_array_equal(counts[0], expected[0].numpy())
    np.testing.assert_array_equal(sums[0], expected[1].numpy())


# In the first chunk of the sort, and in another.
@pytest.mark.parametrize("where", [280, 1500])
@pytest.mark.parametrize("bad", [-2, 5, 2**40])
def test_a_bad_code_makes_all_nan(emulation: Emulation, bad: int, where: int) -> None:
    codes = np.arange(where + 20) % 3
    codes[where] = bad
    counts, sums = statistics(emulation, normal(len(codes), 1, 1), codes[:, None], 5)
    assert np.isnan(counts).all() and np.isnan(sums).all()
