"""The CUDA kernels of depth attention, on the CPU, against the definition in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from rqkernels import reference

from .harness import Device, Emulation, KernelError

TYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("out", "grad_q", "grad_k", "grad_v")


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor


def normal(
    stacks: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> Inputs:
    generator = torch.Generator().manual_seed(stacks + queries + head_dim)
    rows = (queries, keys, keys, queries)
    return Inputs(*(torch.randn(stacks, heads, r, head_dim, generator=generator).to(dtype) for r in rows))


def run(
    emulation: Emulation,
    given: Inputs,
    *,
    scale: float | None = None,
    swapped: bool = False,
    offset: int = 0,
    padding: int = 0,
    device: Device | None = None,
) -> list[Tensor]:
    """out and the three gradients; (n, d, h, head_dim) in memory with `swapped`, and other numbers around each row."""
    dtype, head_dim = given.q.dtype, given.q.shape[-1]
    bits = {torch.bfloat16: torch.uint16}.get(dtype, dtype)

    def lay(t: Tensor) -> np.ndarray:
        t = torch.nn.functional.pad(t, (offset, padding), value=torch.nan)
        return (t.transpose(1, 2) if swapped else t).contiguous().view(bits).numpy()

    scale = head_dim**-0.5 if scale is None else scale
    results = emulation.run(
        "depth_attention",
        **{name: lay(t) for name, t in given._asdict().items()},
        swapped=swapped,
        head_dim=head_dim,
        offset=offset,
        scale=scale,
        device=device,
    )
    seen = []
    for result in results:
        t = torch.from_numpy(result)
        # Memory comes filled with ones, NaN of any type: what lies between rows must still be that.
        around = torch.cat([t[..., :offset], t[..., offset + head_dim :]], -1).contiguous().view(torch.uint8)
        assert (around == 0xFF).all()
        t = t.view(dtype)[..., offset : offset + head_dim]
        seen.append(t.transpose(1, 2) if swapped else t)
    return seen


def truth(given: Inputs, scale: float | None = None) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in given[:3]]
    out = reference.depth_attention(*leaves, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, given.grad.double())]


def check(emulation: Emulation, given: Inputs, **how: object) -> None:
    last_place = torch.finfo(given.q.dtype).eps
    for name, ours, true in zip(NAMES, run(emulation, given, **how), truth(given, how.get("scale")), strict=True):
        assert ours.dtype == given.q.dtype
        # The error of float32 sums of numbers around one, and one rounding to the dtype.
        rtol = 0.501 * last_place if last_place > 1e-6 else 0.0
        torch.testing.assert_close(ours.double(), true, rtol=rtol, atol=3e-6, msg=lambda m, name=name: f"{name}: {m}")


# By lanes to a head: 4 of which one works (1, 3), 4, 8, 16 and 32, with one chunk of 16 bytes to a row or several.
@pytest.mark.parametrize("head_dim", [1, 3, 8, 48, 64, 80, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (3, 8), (9, 9)], ids=str)
def test_shapes(emulation: Emulation, queries: int, keys: int, head_dim: int) -> None:
    # A block takes 128 / lanes heads: 32 of the smallest, 4 of the largest.
    stacks = 2 if head_dim > 8 or emulation.build != "plain" else 11
    check(emulation, normal(stacks, 3, queries, keys, head_dim))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_largest(emulation: Emulation, dtype: torch.dtype) -> None:
    check(emulation, normal(1, 1, 32, 32, 256 if emulation.build == "plain" else 20, dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("offset", "padding"), [(0, 0), (8, 0), (1, 2)], ids=str)
def test_dtypes_and_strides(emulation: Emulation, dtype: torch.dtype, swapped: bool, offset: int, padding: int) -> None:
    # Only the first two have every row at a multiple of 16 bytes.
    check(emulation, normal(3, 3, 4, 4, 24, dtype), swapped=swapped, offset=offset, padding=padding, scale=-0.7)


def test_more_heads_than_a_block_and_none(emulation: Emulation) -> None:
    check(emulation, normal(13, 5, 2, 2, 4))
    assert all(t.numel() == 0 for t in run(emulation, normal(0, 5, 2, 2, 4)))


def test_what_is_not_finite_stays_with_those_who_see_it(emulation: Emulation) -> None:
    given = normal(2, 3, 6, 7, 24)
    clean = run(emulation, given)
    given.k[0, 1, 3, 2], given.v[0, 2, 5, 0], given.q[1, 0, 4, 1] = torch.nan, torch.inf, torch.nan
    out, *grads = run(emulation, given)
    # Query i sees keys up to i + 1.
    hurt = torch.zeros(2, 3, 6, dtype=torch.bool)
    hurt[0, 1, 2:] = hurt[0, 2, 4:] = hurt[1, 0, 4] = True
    assert torch.equal(out.isfinite().all(-1), ~hurt)
    assert torch.equal(out[~hurt], clean[0][~hurt])
    untouched = ~hurt.any(-1)
    for ours, before in zip(grads, clean[1:], strict=True):
        assert torch.equal(ours[untouched], before[untouched])


def test_large_scores_and_equal_ones(emulation: Emulation) -> None:
    given = normal(1, 2, 4, 4, 8)
    for scale in (0.0, 300.0):
        ours, true = run(emulation, given, scale=scale), truth(given, scale)
        for a, b in zip(ours, true, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-4)


def test_shared_memory_that_several_heads_do_not_fit_into(emulation: Emulation) -> None:
    given = normal(3, 1, 8, 8, 16)  # four lanes to a head
    usual = run(emulation, given)
    for ours, before in zip(run(emulation, given, device=Device(shared_kib=18)), usual, strict=True):
        torch.testing.assert_close(ours, before, rtol=1e-5, atol=1e-6)
    with pytest.raises((KernelError, ValueError), match="bytes of shared memory, this device has 8192; call torch"):
        run(emulation, given, device=Device(shared_kib=8))
