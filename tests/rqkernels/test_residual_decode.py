"""Codes back to vectors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rqkernels as rqk


@pytest.mark.parametrize("n", [0, 1, 129])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("depth", [None, 1, 3])
def test_equals_the_definition(n: int, shared: bool, depth: int | None, device: torch.device) -> None:
    for k, c in ((1, 1), (257, 17), (257, 256)):
        e = torch.randn(*(() if shared else (4,)), k, c, device=device)
        codes = torch.randint(0, k, (n, 4), device=device)
        assert torch.equal(rqk.residual_decode(codes, e, depth), rqk.reference.residual_decode(codes, e, depth))


# Vectors of 4, 8 and 16 channels, alone and in eights, and what is left of them; rows in fours and alone.
@pytest.mark.parametrize("c", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 20, 31, 32, 33, 47, 64, 129, 200])
@pytest.mark.parametrize("k", [9, 3000])  # codebooks within a core's cache, and beyond it
def test_every_width_of_a_row(c: int, k: int, device: torch.device) -> None:
    for d in (1, 5):
        e, codes = torch.randn(d, k, c, device=device), torch.randint(0, k, (23, d), device=device)
        e[:, 0] = -0.0
        codes[4] = 0
        decoded = rqk.residual_decode(codes, e)
        assert torch.equal(decoded, rqk.reference.residual_decode(codes, e))
        assert not (decoded.signbit() & (decoded == 0)).any()  # a sum from zero
        codes[[1, 6, 22], [0, -1, 0]] = torch.tensor([k, -1, 2**62], device=device)
        bad = rqk.residual_decode(codes, e, check=False)
        assert bad[[1, 6, 22]].isnan().all()
        rest = [row for row in range(23) if row not in (1, 6, 22)]
        assert torch.equal(bad[rest], decoded[rest])


# From 32 MiB on a CPU writes past its caches, where a row is a whole number of vectors.
@pytest.mark.parametrize("c", [8, 12, 16, 160])
def test_more_than_the_caches_hold(c: int, device: torch.device) -> None:
    n = 2**23 // c + 5
    e, codes = torch.randn(2, 7, c, device=device), torch.randint(0, 7, (n, 2), device=device)
    codes[n // 2, 1] = 9
    decoded = rqk.residual_decode(codes, e, check=False)
    assert decoded[n // 2].isnan().all()
    codes[n // 2, 1] = 0
    expected = 0.0 + e[0][codes[:, 0]] + e[1][codes[:, 1]]
    decoded[n // 2] = expected[n // 2]
    assert torch.equal(decoded, expected)


def test_every_instruction_set_gives_the_same_bits() -> None:
    levels = ["default", "avx2", "avx512"]
    code = """
import hashlib, torch, rqkernels as rqk
torch.manual_seed(1)
digest = hashlib.sha256()
for n, k, c in ((23, 9, 1), (23, 9, 8), (23, 3000, 17), (23, 20, 48), (23, 3000, 200), (2**18, 9, 32)):
    decoded = rqk.residual_decode(torch.randint(0, k, (n, 5)), torch.randn(5, k, c))
    digest.update(decoded.numpy().tobytes())
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


def test_flushing_denormals_changes_nothing() -> None:
    e, codes = torch.randn(9, 20) * 1e-41, torch.randint(0, 9, (5, 3))
    expected = rqk.residual_decode(codes, e)
    assert (expected != 0).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        decoded = rqk.residual_decode(codes, e)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_of_a_search(dtype: torch.dtype, device: torch.device) -> None:
    x, e = torch.randn(3, 5, 16, device=device).to(dtype), torch.randn(64, 16, device=device).to(dtype)
    found = rqk.residual_search(x, e, 4)
    decoded = rqk.residual_decode(found.codes, e)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, found.quantized)


def test_fewer_codes_than_codebooks(device: torch.device) -> None:
    e = torch.randn(4, 10, 6, device=device)
    codes = torch.randint(0, 10, (7, 2), device=device)
    assert torch.equal(rqk.residual_decode(codes, e), rqk.residual_decode(codes, e[:2]))


def test_strided_codes(device: torch.device) -> None:
    e = torch.randn(10, 6, device=device)
    codes = torch.randint(0, 10, (4, 5, 6), device=device).permute(2, 1, 0)
    assert torch.equal(rqk.residual_decode(codes, e), rqk.residual_decode(codes.contiguous(), e))


def test_bad_codes(device: torch.device) -> None:
    e = torch.randn(10, 6, device=device)
    codes = torch.randint(0, 10, (4, 3), device=device)
    for bad in (-1, 10):
        codes[2, 1] = bad
        with pytest.raises(IndexError, match=rf"codes must be in \[0, 10\), got {bad} in row 2, depth 1"):
            rqk.residual_decode(codes, e)
        # A depth that is not used is not looked at.
        assert rqk.residual_decode(codes, e, 1).isfinite().all()
        unchecked = rqk.residual_decode(codes, e, check=False)
        assert unchecked[2].isnan().all()
        assert unchecked[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("depth", [None, 2])
def test_gradient_of_the_codebooks(shared: bool, depth: int | None, device: torch.device) -> None:
    e = torch.randn(*(() if shared else (3,)), 12, 5, device=device, requires_grad=True)
    codes = torch.randint(0, 12, (2, 20, 3), device=device)
    weight = torch.randn(2, 20, 5, device=device)
    (grad,) = torch.autograd.grad((rqk.residual_decode(codes, e, depth) * weight).sum(), e)
    (expected,) = torch.autograd.grad((rqk.reference.residual_decode(codes, e, depth) * weight).sum(), e)
    torch.testing.assert_close(grad, expected)


def test_gradient_of_half_codebooks_and_strided_codes(device: torch.device) -> None:
    e = torch.randn(2, 6, 8, device=device).bfloat16().requires_grad_()
    codes = torch.randint(0, 6, (2, 5, 4), device=device).transpose(0, 2)  # (4, 5, 2)
    (grad,) = torch.autograd.grad(rqk.residual_decode(codes, e).sum(), e)
    expected = torch.stack([torch.bincount(codes[..., d].flatten(), minlength=6) for d in range(2)])
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, expected[..., None].expand(2, 6, 8).bfloat16())


def test_gradient_skips_bad_codes(device: torch.device) -> None:
    e = torch.randn(4, 2, device=device, requires_grad=True)
    codes = torch.tensor([[0], [9]], device=device)
    (grad,) = torch.autograd.grad(rqk.residual_decode(codes, e, check=False)[:1].sum(), e)
    assert grad.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]


def test_opcheck(device: torch.device) -> None:
    op = torch.ops.rqkernels.residual_decode.default
    codes = torch.randint(0, 8, (3, 4, 2), device=device)
    torch.library.opcheck(op, (codes, torch.randn(8, 6, device=device, requires_grad=True), None, True))
    torch.library.opcheck(op, (codes, torch.randn(2, 8, 6, device=device, requires_grad=True), 1, False))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(codes=torch.zeros(2, 3)), TypeError, "codes must be int64, got float32"),
        (dict(codes=torch.zeros(2, 3, dtype=torch.int32)), TypeError, "codes must be int64, got int32"),
        (dict(codebooks=torch.zeros(8, 4, dtype=torch.float64)), TypeError, "codebooks must be .* got float64"),
        (dict(codes=torch.tensor(0)), ValueError, "codes must be .*, got a scalar"),
        (dict(codes=torch.zeros(2, 0, dtype=torch.int64)), ValueError, "codes must have at least one depth"),
        (dict(codebooks=torch.zeros(8)), ValueError, r"codebooks must be \(K, C\)"),
        (dict(codebooks=torch.zeros(0, 4)), ValueError, "codebooks must not be empty"),
        (dict(codebooks=torch.zeros(2, 8, 4)), ValueError, r"codes \(2, 3\) have 3 depths, codebooks .* only 2"),
        (dict(depth=0), ValueError, r"depth must be in \[1, 3\], got 0"),
        (dict(depth=4), ValueError, r"depth must be in \[1, 3\], got 4"),
        (dict(depth="2"), TypeError, "depth must be an integer or None, got str"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"codes": torch.zeros(2, 3, dtype=torch.int64), "codebooks": torch.zeros(8, 4), "depth": None}
    with pytest.raises(error, match=message):
        rqk.residual_decode(**{**good, **arguments})
