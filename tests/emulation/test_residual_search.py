"""The CUDA kernels of the residual search, on the CPU, against the definition: bit for bit.

Each case runs the ways that a device can make the kernels take: codes split over blocks, one launch for all depths, and
the direct search of every row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from rqkernels import reference

from .harness import Device, Emulation, ragged_grid

# The sanitized builds take the same corners with fewer rows.
ROWS = {"plain": 129, "asan": 5, "race": 3}


H100 = Device()
RTX_4090 = Device(128, 99)
WAYS = {
    "split": H100,
    "single": Device(1, 48),  # one block of 32 rows at a time fills it
    "direct": Device(132, 8),  # no room for a scan
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


class Counted(NamedTuple):
    direct_rows: int  # times depths, that a scan left to the direct search; -1: there was no scan
    evaluated_codes: int  # for the other rows


def search(
    emulation: Emulation,
    x_nc: np.ndarray,
    codebooks_dkc: np.ndarray,
    depth: int,
    device: Device,
    **options: Any,
) -> list[np.ndarray]:
    """Codes, quantized, norms, residuals, counted."""
    return emulation.run("residual_search", x=x_nc, codebooks=codebooks_dkc, depth=depth, device=device, **options)


def check(
    emulation: Emulation, x_nc: np.ndarray, codebooks_dkc: np.ndarray, depth: int, device: Device, **options: Any
) -> tuple[np.ndarray, Counted]:
    """Compare all results with the definition's; return the codes and the counters of the kernels."""
    codes, quantized, norms, residuals, counted = search(emulation, x_nc, codebooks_dkc, depth, device, **options)
    codebooks = torch.from_numpy(codebooks_dkc)
    expected = reference.residual_search(
        torch.from_numpy(x_nc), codebooks[0] if len(codebooks) == 1 else codebooks, depth, return_residuals=True
    )
    np.testing.assert_array_equal(codes, expected.codes.numpy())
    np.testing.assert_array_equal(quantized, expected.quantized.numpy())
    np.testing.assert_array_equal(norms, expected.residual_sq_norms.numpy())
    np.testing.assert_array_equal(residuals, expected.residuals.numpy())
    return codes, Counted(*counted.tolist())


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@every_way
@pytest.mark.parametrize(("n", "k", "c", "d"), ragged_grid(N=(0, 1, 129), K=(1, 257), C=(1, 17, 256), D=(1, 4)))
def test_shapes(emulation: Emulation, way: Device, n: int, k: int, c: int, d: int) -> None:
    rows = min(n, ROWS[emulation.build])
    schedules = (0, 2) if rows * k * c > 10**5 else (0, 1, 2, 3)
    _, counted = check(emulation, normal(rows, c), normal(1, k, c, seed=1), d, way, schedules=schedules)
    assert counted.direct_rows == (-1 if rows and way is WAYS["direct"] else 0)


@pytest.mark.parametrize(
    ("device", "n", "k", "c", "d"),
    [
        # 128, 64 and 32 rows to a block, twice around, so that what one leaves behind would show in the next.
        pytest.param(H100, 129, 129, 33, 2, id="128-rows-split"),
        pytest.param(Device(1, 227), 257, 129, 9, 2, id="128-rows-single"),
        pytest.param(Device(1, 50), 65, 300, 65, 2, id="64-rows-single"),
        pytest.param(H100, 64, 300, 40, 2, id="64-rows-split"),
        # What fits a block of the larger and of the smaller device.
        pytest.param(H100, 65, 129, 512, 1, id="512-channels-in-227-KiB"),
        pytest.param(RTX_4090, 65, 129, 512, 1, id="512-channels-in-99-KiB"),
        pytest.param(RTX_4090, 33, 129, 1024, 1, id="1024-channels-in-99-KiB"),
        # Several times around the ring of stages, with one chunk of channels to a tile and with three.
        pytest.param(WAYS["single"], 33, 1500, 30, 2, id="many-tiles"),
        pytest.param(WAYS["single"], 3, 900, 96, 2, id="many-chunks"),
    ],
)
def test_blocks_and_stages(emulation: Emulation, device: Device, n: int, k: int, c: int, d: int) -> None:
    _, counted = check(emulation, normal(n, c), normal(1, k, c, seed=1), d, device, schedules=(0, 2))
    assert counted.direct_rows == 0


@every_way
def test_one_codebook_per_depth(emulation: Emulation, way: Device) -> None:
    check(emulation, normal(5, 19), normal(3, 145, 19, seed=1), 3, way)


@every_way
def test_ties_go_to_the_lower_index(emulation: Emulation, way: Device) -> None:
    # Every code nine times over, in threads and tiles that are far apart.
    codebook = np.tile(normal(33, 8), (9, 1))
    codes, _ = check(emulation, codebook[[70, 3, 231]], codebook[None], 2, way)
    assert codes[:, 0].tolist() == [4, 3, 0]


@every_way
def test_a_collapsed_codebook(emulation: Emulation, way: Device) -> None:
    codes, _ = check(emulation, normal(3, 8), np.tile(normal(1, 1, 8, seed=1), (1, 300, 1)), 2, way)
    assert not codes.any()
    codes, _ = check(emulation, np.zeros((3, 8), np.float32), np.zeros((1, 300, 8), np.float32), 2, way)
    assert not codes.any()


@every_way
def test_nearly_equal_codes(emulation: Emulation, way: Device) -> None:
    codebook = 100 + 1e-5 * normal(1, 197, 16)
    check(emulation, 100 + 1e-5 * normal(4, 16, seed=2), codebook, 2, way)


def test_more_candidates_than_there_is_room_for(emulation: Emulation) -> None:
    # Two places, with a thousand codes each that bf16 cannot tell apart.
    rng = np.random.default_rng(0)
    places = normal(2, 16)[rng.integers(0, 2, 2000)]
    codebook = (places + 1e-6 * normal(2000, 16, seed=1))[None]
    x = places[:3] + 1e-6 * normal(3, 16, seed=2)
    _, counted = check(emulation, x, codebook, 1, WAYS["single"], schedules=(0, 1))
    assert counted == (3, 0)
    # Where the codes are split over blocks, there is room; and only half of them are evaluated.
    _, counted = check(emulation, x, codebook, 1, H100, schedules=(0, 1))
    assert counted.direct_rows == 0 and 2500 < counted.evaluated_codes < 3500


def test_lists_drop_what_a_better_code_rules_out(emulation: Emulation) -> None:
    # Each tile beats the one before: without that, the lists would be full long before the end.
    distance = np.linspace(3, 0.5, 3000, dtype=np.float32)
    codebook = np.zeros((1, 3000, 4), np.float32)
    codebook[0, :, 0] = distance
    codes, counted = check(emulation, np.zeros((2, 4), np.float32), codebook, 1, WAYS["single"], schedules=(0, 1))
    assert codes.tolist() == [[2999], [2999]] and counted.direct_rows == 0


@pytest.mark.parametrize("device", [H100, WAYS["single"]], ids=["split", "single"])
@pytest.mark.parametrize("offset", [0, 100, 1000])
def test_few_codes_are_evaluated(emulation: Emulation, device: Device, offset: float) -> None:
    # The second depth's residuals lie around zero, the codes do not.
    rows = {"plain": 128, "asan": 20, "race": 12}[emulation.build]
    x, codebook = offset + normal(rows, 32), offset + normal(1, 1024, 32, seed=1)
    _, counted = check(emulation, x, codebook, 2, device, schedules=(0, 2))
    assert counted.direct_rows == 0 and counted.evaluated_codes < 2 * (2 * rows)


def test_an_outlier_code_costs_little(emulation: Emulation) -> None:
    x, codebook = normal(20, 32), normal(1, 700, 32, seed=1)
    codebook[0, 200] *= 1e4
    _, counted = check(emulation, x, codebook, 1, WAYS["single"], schedules=(0, 1))
    assert counted.direct_rows == 0 and counted.evaluated_codes < 4 * 20


@every_way
def test_a_channel_that_outweighs_the_others(emulation: Emulation, way: Device) -> None:
    scale = np.where(np.arange(32) == 3, 100, 1).astype(np.float32)
    check(emulation, normal(9, 32) * scale, normal(1, 400, 32, seed=1) * scale, 2, way, schedules=(0, 1))


def test_an_mma_may_err_as_far_as_the_bound_assumes(emulation: Emulation) -> None:
    # Scores of nearly equal codes: 2^-18 of the terms is far more than lies between the nearest of them.
    base = normal(1, 48)
    x, codebook = base + 3 * normal(40, 48, seed=1), (base + 1e-3 * normal(600, 48, seed=2))[None]
    for schedule in (1, 2):
        check(emulation, x, codebook, 1, H100._replace(mma_bits=18), schedules=(schedule,))
    codes, *_ = search(emulation, x, codebook, 1, H100._replace(mma_bits=4), schedules=(1,))
    expected = reference.residual_search(torch.from_numpy(x), torch.from_numpy(codebook[0]), 1)
    assert (codes != expected.codes.numpy()).any()


@every_way
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite(emulation: Emulation, way: Device, bad: float) -> None:
    x = normal(4, 17)
    x[1, 0] = x[3, 16] = bad
    codes, _ = check(emulation, x, normal(1, 40, 17, seed=1), 3, way)
    assert (codes[[1, 3]] == -1).all() and (codes[[0, 2]] >= 0).all()


@every_way
def test_a_residual_that_overflows(emulation: Emulation, way: Device) -> None:
    codes, _ = check(emulation, np.full((1, 4), 3e38, np.float32), np.full((1, 3, 4), -3e38, np.float32), 3, way)
    assert codes.tolist() == [[0, -1, -1]]


@every_way
@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e16, 1e20])
def test_tiny_and_huge_numbers(emulation: Emulation, way: Device, scale: float) -> None:
    x, codebook = normal(3, 9).astype(np.float64) * scale, normal(1, 150, 9, seed=1).astype(np.float64) * scale
    check(emulation, x.astype(np.float32), codebook.astype(np.float32), 2, way, schedules=(0, 1))
    # Rows far from all codes, and codes far from each other.
    mixed = np.where(np.arange(150)[:, None] % 2 == 0, codebook[0], codebook[0] / scale).astype(np.float32)
    check(emulation, normal(3, 9, seed=3), mixed[None], 2, way, schedules=(0, 1))


@every_way
def test_a_bad_code_is_never_chosen(emulation: Emulation, way: Device) -> None:
    x, codebook = normal(5, 9), normal(1, 250, 9, seed=1)
    codebook[0, [0, 120, 249], 3] = np.nan, np.inf, -np.inf
    codes, *_ = search(emulation, x, codebook, 2, way)
    good = np.isfinite(codebook[0]).all(axis=1).nonzero()[0]
    expected = reference.residual_search(torch.from_numpy(x), torch.from_numpy(codebook[0, good]), 2)
    np.testing.assert_array_equal(codes, good[expected.codes.numpy()])

    codes, quantized, *_ = search(emulation, x, np.full((1, 3, 9), np.nan, np.float32), 2, way)
    assert (codes == -1).all() and np.isnan(quantized).all()


def test_more_channels_than_a_scan_takes(emulation: Emulation) -> None:
    _, counted = check(emulation, normal(2, 8193), normal(1, 5, 8193, seed=1), 2, H100, schedules=(0, 1))
    assert counted.direct_rows == -1
