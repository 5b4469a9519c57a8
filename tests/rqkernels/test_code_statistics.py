"""Counts and sums by code."""

from __future__ import annotations

import pytest
import torch

import rqkernels as rqk


@pytest.mark.parametrize("n", [0, 1, 129])
@pytest.mark.parametrize("k", [1, 257])
@pytest.mark.parametrize("c", [1, 17, 300])
def test_equals_the_definition(n: int, k: int, c: int, device: torch.device) -> None:
    x, codes = torch.randn(n, c, device=device), torch.randint(-1, k, (n,), device=device)
    for ours, expected in zip(
        rqk.code_statistics(x, codes, k), rqk.reference.code_statistics(x, codes, k), strict=True
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


def test_equals_a_one_hot_product(device: torch.device) -> None:
    x, codes = torch.randn(4, 50, 8, device=device), torch.randint(0, 20, (4, 50), device=device)
    one_hot = torch.nn.functional.one_hot(codes.flatten(), 20).double()
    counts, sums = rqk.code_statistics(x, codes, 20)
    assert torch.equal(counts.double(), one_hot.sum(0))
    torch.testing.assert_close(sums.double(), one_hot.T @ x.flatten(0, 1).double(), rtol=1e-6, atol=1e-6)


def test_minus_one_counts_nowhere_even_with_nan(device: torch.device) -> None:
    x = torch.ones(3, 2, device=device)
    x[1] = torch.nan
    counts, sums = rqk.code_statistics(x, torch.tensor([0, -1, 0], device=device), 2)
    assert counts.tolist() == [2, 0]
    assert sums.tolist() == [[2, 2], [0, 0]]


def test_half_and_strided_input(device: torch.device) -> None:
    x = torch.randn(8, 60, device=device).half().T
    codes = torch.randint(0, 5, (60, 2), device=device)[:, 0]
    for ours, expected in zip(
        rqk.code_statistics(x, codes, 5), rqk.reference.code_statistics(x, codes, 5), strict=True
    ):
        assert torch.equal(ours, expected)


def test_sums_do_not_depend_on_threads() -> None:
    x, codes = torch.randn(5000, 33), torch.randint(0, 40, (5000,))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = rqk.code_statistics(x, codes, 40)
        torch.set_num_threads(3)
        together = rqk.code_statistics(x, codes, 40)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[1], together[1])


def test_small_terms_survive_a_long_sum(device: torch.device) -> None:
    # Added in float32, ones would vanish behind 2^24.
    x = torch.ones(1001, 1, device=device)
    x[0] = 2.0**25
    assert rqk.code_statistics(x, torch.zeros(1001, dtype=torch.int64, device=device), 1)[1].item() == 2**25 + 1000


def test_not_differentiable(device: torch.device) -> None:
    x = torch.randn(5, 2, device=device, requires_grad=True)
    assert not rqk.code_statistics(x, torch.zeros(5, dtype=torch.int64, device=device), 1)[1].requires_grad


def test_opcheck(device: torch.device) -> None:
    op = torch.ops.rqkernels.code_statistics.default
    torch.library.opcheck(op, (torch.randn(6, 4, device=device), torch.randint(0, 3, (6,), device=device), 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.zeros(2, 4, dtype=torch.float64)), TypeError, "x must be .* got float64"),
        (dict(codes=torch.zeros(2)), TypeError, "codes must be int64, got float32"),
        (dict(codes=torch.zeros(3, dtype=torch.int64)), ValueError, r"x is \(2, 4\), codes are \(3\)"),
        (dict(codes=torch.zeros(2, 1, dtype=torch.int64)), ValueError, r"x is \(2, 4\), codes are \(2, 1\)"),
        (dict(x=torch.zeros(())), ValueError, "x must be .*, got a scalar"),
        (dict(x=torch.zeros(2, 0)), ValueError, "x must have at least one channel"),
        (dict(num_codes=0), ValueError, "num_codes must be >= 1, got 0"),
        (dict(codes=torch.tensor([0, 5])), IndexError, r"codes must be in \[-1, 5\), got 5 in row 1"),
        (dict(codes=torch.tensor([-2, 0])), IndexError, r"codes must be in \[-1, 5\), got -2 in row 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(2, 4), "codes": torch.zeros(2, dtype=torch.int64), "num_codes": 5}
    with pytest.raises(error, match=message):
        rqk.code_statistics(**{**good, **arguments})


@pytest.mark.gpu
def test_bad_codes_poison_the_result_on_a_gpu() -> None:
    counts, sums = rqk.code_statistics(torch.ones(2, 3).cuda(), torch.tensor([0, 7]).cuda(), 5)
    assert counts.isnan().all() and sums.isnan().all()
