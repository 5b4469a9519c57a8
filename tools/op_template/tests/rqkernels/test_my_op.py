"""my_op against its definition."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rqkernels as rqk

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# TODO(my_op): sizes below, at and above those that the kernels treat each in their way.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 129])
@pytest.mark.parametrize("c", [1, 17, 256])
def test_equals_the_definition(n: int, c: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(n, c, device=device).to(dtype)
    y = rqk.my_op(x, 0.7)
    assert y.dtype == dtype
    assert torch.equal(y, rqk.reference.my_op(x, 0.7))


def test_without_a_factor_nothing_changes(device: torch.device) -> None:
    x = torch.randn(2, 3, 5, device=device)
    assert torch.equal(rqk.my_op(x), x)


def test_strided_rows(device: torch.device) -> None:
    x = torch.randn(4, 5, 6, device=device).permute(2, 1, 0)[..., 1:]
    assert torch.equal(rqk.my_op(x, 3.0), rqk.my_op(x.contiguous(), 3.0))


def test_what_is_not_finite_stays_where_it_is(device: torch.device) -> None:
    x = torch.randn(9, 17, device=device)
    expected = rqk.my_op(x, 2.0)
    for at, bad in ((3, torch.nan), (5, torch.inf), (7, -torch.inf)):
        x[at, 2] = expected[at, 2] = bad
    assert torch.equal(rqk.my_op(x, 2.0).nan_to_num(7.25), expected.nan_to_num(7.25))


def test_flushing_denormals_changes_nothing() -> None:
    x = torch.randn(5, 20) * 1e-41
    expected = rqk.my_op(x, 0.5)
    assert (expected != 0).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        y = rqk.my_op(x, 0.5)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, expected)


def test_every_instruction_set_gives_the_same_bits() -> None:
    levels = ["default", "avx2", "avx512"]
    code = """
import hashlib, torch, rqkernels as rqk
torch.manual_seed(1)
digest = hashlib.sha256()
for n, c in ((23, 1), (23, 8), (5, 17), (129, 256)):
    digest.update(rqk.my_op(torch.randn(n, c), 0.7).numpy().tobytes())
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(6, 5, device=device).to(dtype).requires_grad_()
    weight = torch.randn(6, 5, device=device).to(dtype)
    (grad,) = torch.autograd.grad((rqk.my_op(x, 0.7) * weight).sum(), x)
    assert grad.dtype == dtype
    assert torch.equal(grad, rqk.reference.my_op(weight, 0.7))


def test_opcheck(device: torch.device) -> None:
    x = torch.randn(3, 4, 2, device=device)
    torch.library.opcheck(torch.ops.rqkernels.my_op.default, (x, 0.7))
    torch.library.opcheck(torch.ops.rqkernels.my_op.default, (x.requires_grad_(), 0.7))


def test_compiled(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: rqk.my_op(x, 0.7) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), rqk.my_op(x, 0.7) + 1)


# TODO(my_op): every wrong argument.
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "x must be float32, .* got int64"),
        (dict(x=torch.tensor(1.0)), ValueError, r"x must be \(\.\.\., C\), got a scalar"),
        (dict(factor="2"), TypeError, "factor must be a number, got str"),
        (dict(factor=-1.0), ValueError, "factor must be a finite number >= 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^my_op: {message}"):
        rqk.my_op(**{"x": torch.zeros(2, 3), "factor": 1.0, **arguments})
