"""Soft-label cross-entropy, forward and backward, against the published formulation (eager, compiled)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import _harness
import pytest
import torch
from _harness import QUICK, Contender, Work
from torch import Tensor

import rqkernels


class Case(NamedTuple):
    """N rows of C channels, K codes; hidden: width of a classifier that is part of the work, or None."""

    name: str
    channels: int
    codes: int
    tau: float
    rows_cpu: int
    rows_cuda: int
    hidden: int | None = None


# tau: labels have several codes, as after the paper's annealing; distances of these codes differ by some C / 2.
CASES = (
    [Case("tiny", 8, 16, 4.0, 64, 64), Case("tiny-linear", 8, 16, 4.0, 64, 64, hidden=8)]
    if QUICK
    else [
        Case("rq-vae", 256, 16384, 20.0, 2048, 16384),
        Case("rq-vae-512-rows", 256, 16384, 20.0, 512, 4096),
        Case("var", 32, 4096, 2.0, 8192, 131072),
        Case("rq-vae-linear", 256, 16384, 20.0, 4096, 16384, hidden=512),
    ]
)


def published_loss(logits_nk: Tensor, x_nc: Tensor, codebook_kc: Tensor, tau: float) -> Tensor:
    """Compute the loss as published: distances, their softmax, and the cross-entropy, N x K each."""
    squares = x_nc.square().sum(1, keepdim=True) + codebook_kc.square().sum(1)
    distances = torch.addmm(squares, x_nc, codebook_kc.t(), alpha=-2.0)
    return torch.nn.functional.cross_entropy(logits_nk, torch.softmax(-distances / tau, dim=1))


def published_linear_loss(
    hidden_nh: Tensor, weight_kh: Tensor, bias_k: Tensor, x_nc: Tensor, codebook_kc: Tensor, tau: float
) -> Tensor:
    return published_loss(torch.nn.functional.linear(hidden_nh, weight_kh, bias_k), x_nc, codebook_kc, tau)


def run_case(case: Case, device: torch.device, benchmark: Any = None) -> dict[str, Any]:
    rows = case.rows_cuda if device.type == "cuda" else case.rows_cpu
    there = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    x = torch.randn(rows, case.channels, **there)
    norms = torch.rand(case.codes, 1, **there) * 0.8 + 0.2
    codebook = torch.randn(case.codes, case.channels, **there) * norms

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, **there)).requires_grad_()

    if case.hidden is None:
        leaves = (leaf(rows, case.codes),)
        ours, published = rqkernels.soft_label_cross_entropy, published_loss
    else:
        width = case.hidden
        leaves = (leaf(rows, width), leaf(case.codes, width, scale=width**-0.5), leaf(case.codes))
        ours, published = rqkernels.fused_linear_soft_label_cross_entropy, published_linear_loss

    def both_ways(loss: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            value = loss(*leaves, x, codebook, case.tau)
            return value.detach(), *torch.autograd.grad(value, leaves)

        return call

    contenders = [
        Contender("rqkernels", both_ways(ours), rows),
        Contender("published, eager", both_ways(published), rows),
    ]
    if case.hidden is None:
        # The gradient overwrites the logits: each call works on the result of the last one, the same work on other
        # values.
        scratch = leaves[0].detach().clone()

        def in_place() -> tuple[Tensor, Tensor]:
            logits = scratch.requires_grad_().view_as(scratch)  # no leaf, but the same memory
            value = rqkernels.soft_label_cross_entropy(logits, x, codebook, case.tau, inplace=True)
            (gradient,) = torch.autograd.grad(value, scratch)
            return value.detach(), gradient

        contenders.append(Contender("rqkernels, in place", in_place, rows))
    if not QUICK:
        torch.compiler.reset()
        compiled = torch.compile(published, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
        contenders.append(Contender("published, torch.compile", both_ways(compiled), rows))

    def check(results: Mapping[str, Any]) -> dict[str, float]:
        # Compared with float64 on a few rows; all rows would take eight times the memory of these logits.
        n = min(rows, 64)
        agreement = {}
        if case.hidden is None:
            logits = leaves[0].detach()[:n].double().requires_grad_()
            true = rqkernels.reference.soft_label_cross_entropy(logits, x[:n], codebook, case.tau, reduction="none")
            (expected,) = torch.autograd.grad(true.sum() / rows, logits)
        for name, (value, gradient, *_) in results.items():
            if name == "rqkernels, in place":
                # Its input is overwritten; the tests check its first call.
                agreement[name] = 1.0
                continue
            assert abs(value - results["rqkernels"][0]) < 1e-4 * abs(value), name
            theirs = expected if case.hidden is None else results["rqkernels"][1][:n].double()
            error = (gradient[:n].double() - theirs).abs().max() / theirs.abs().max()
            assert error < 1e-3, f"{name}: gradient off by {error:.1e}"
            agreement[name] = 1.0 - error.item()
        return agreement

    elements, width = rows * case.codes, case.hidden or 0
    work = Work(
        # Logits in and their gradient out, unless they are computed on the way.
        bytes=4 * (case.codes * (case.channels + 3 * width) + rows * (case.channels + 2 * width))
        + (0 if case.hidden else 8 * elements),
        operations=2 * elements * (case.channels + 3 * width),
    )
    shape = {"N": rows, "C": case.channels, "K": case.codes, "tau": case.tau}
    if case.hidden is not None:
        shape["H"] = case.hidden
    return _harness.compare(case.name, shape, device, contenders, work, check, benchmark)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_soft_label(run: _harness.Run, case: Case, benchmark: Any) -> None:
    run.cases.append(run_case(case, run.device, benchmark))


if __name__ == "__main__":
    _harness.main("soft_label", CASES, run_case)
