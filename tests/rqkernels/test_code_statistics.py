"""Counts and sums by code."""

from __future__ import annotations

import os
import subprocess
import sys

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


# On a CPU rows of few codes are added up directly, others after a sort, here in slices of channels too.
@pytest.mark.parametrize(("k", "c"), [(40, 16), (40, 24), (3000, 48), (400, 600), (140_000, 1)])
@pytest.mark.parametrize("rows_of_one_code", [0, 1023, 1024, 2500])
def test_codes_of_many_rows_and_of_none(k: int, c: int, rows_of_one_code: int, device: torch.device) -> None:
    x = torch.randn(rows_of_one_code + 150, c, device=device)
    x[7] = -0.0
    codes = torch.randint(-1, k, (len(x),), device=device)
    codes[100 : 100 + rows_of_one_code] = 3
    for ours, expected in zip(
        rqk.code_statistics(x, codes, k), rqk.reference.code_statistics(x, codes, k), strict=True
    ):
        assert torch.equal(ours, expected)
        assert not (ours.signbit() & (ours == 0)).any()


@pytest.mark.parametrize("by_depth", [False, True])
@pytest.mark.parametrize("k", [2, 40])  # on a CPU added up directly, and after a sort
def test_strides_of_rows_and_depths(k: int, by_depth: bool, device: torch.device) -> None:
    big, codes = torch.randn(6, 10, 7, 12, device=device), torch.randint(0, k, (6, 10, 7), device=device)
    views = {
        "whole": (big, codes),
        "some channels": (big[..., 3:9], codes),
        "some depths": (big[:, :, 1:6:2], codes[:, :, 2:5]),
        "some rows": (big[:, ::2], codes[:, 5:]),
        "one row": (big[2, 4], codes[2, 4]),
        "shared by the depths": (big[:, :, :1].expand(6, 10, 7, 12), codes),
        "turned round": (big.permute(2, 0, 1, 3), codes.permute(2, 0, 1)),
        "channels apart": (big.permute(0, 1, 3, 2)[:, :, :7, :5], codes),
    }
    for name, (x, some) in views.items():
        ours = torch.ops.rqkernels.code_statistics(x, some, k, by_depth)
        parts = [(x[..., d, :], some[..., d]) for d in range(some.shape[-1])] if by_depth else [(x, some)]
        for d, part in enumerate(parts):
            for a, b in zip(ours, rqk.reference.code_statistics(*part, k), strict=True):
                assert torch.equal(a[d] if by_depth else a, b), name


def test_no_rows_by_depth(device: torch.device) -> None:
    x, codes = torch.zeros(0, 3, 2, device=device), torch.zeros(0, 3, dtype=torch.int64, device=device)
    counts, sums = torch.ops.rqkernels.code_statistics(x, codes, 4, True)
    assert counts.shape == (3, 4) and sums.shape == (3, 4, 2)
    assert not counts.any() and not sums.any()


def test_strided_rows_are_not_copied() -> None:
    residuals, codes = torch.randn(2**16, 4, 32), torch.randint(0, 50, (2**16, 4))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        rqk.code_statistics(residuals[:, 1], codes[:, 1], 50)
        torch.ops.rqkernels.code_statistics(residuals, codes, 50, True)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    # A copy of a depth takes 8 MiB; accumulators and results a tenth of one.
    assert 0 < allocated < 2**22


def test_every_instruction_set_gives_the_same_bits() -> None:
    levels = ["default", "avx2", "avx512"]
    code = """
import hashlib, torch, rqkernels as rqk
torch.manual_seed(1)
digest = hashlib.sha256()
for n, k, c in ((3000, 2, 17), (500, 100, 48), (3000, 3000, 61), (300, 2000, 600)):
    for tensor in rqk.code_statistics(torch.randn(n, c), torch.randint(-1, k, (n,)), k):
        digest.update(tensor.numpy().tobytes())
print(rqk.info()["cpu_capability"], digest.hexdigest())
"""
    digests = set()
    for level in levels[: levels.index(rqk.info()["cpu_capability"]) + 1]:
        environment = {**os.environ, "RQK_CPU_CAPABILITY": level}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        used, digest = run.stdout.split()
        assert used == level
        digests.add(digest)
    assert len(digests) == 1


@pytest.mark.parametrize("k", [2, 40_000])  # added up directly, and after a sort
def test_flushing_denormals_changes_nothing(k: int) -> None:
    x, codes = torch.randn(50, 4) * 1e-41, torch.randint(0, 2, (50,))
    expected = rqk.code_statistics(x, codes, k)[1]
    assert (expected != 0).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        ours = rqk.code_statistics(x, codes, k)[1]
    finally:
        torch.set_flush_denormal(False)
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


@pytest.mark.parametrize("by_depth", [False, True])
@pytest.mark.parametrize("k", [40, 3000])
def test_sums_do_not_depend_on_threads(k: int, by_depth: bool) -> None:
    x, codes = torch.randn(1000, 5, 53), torch.randint(0, k, (1000, 5))
    codes[:, 2] = 1
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(torch.ops.rqkernels.code_statistics(x, codes, k, by_depth))
    finally:
        torch.set_num_threads(threads)
    for counts, sums in results[1:]:
        assert torch.equal(counts, results[0][0]) and torch.equal(sums, results[0][1])


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
    codes = torch.randint(0, 3, (5, 6), device=device)
    torch.library.opcheck(op, (torch.randn(5, 6, 4, device=device), codes, 3, True))


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
