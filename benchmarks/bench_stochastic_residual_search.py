"""stochastic_residual_search against softmax and multinomial, eager and compiled, and the definition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import _harness
import pytest
import torch
from _harness import QUICK, Contender, Work
from torch import Tensor

import rqkernels

# The float64 reference takes seconds where others take milliseconds: limit of rows * K * C that are timed.
TIMED_ELEMENTS = 1 << 12 if QUICK else 1 << 26


class Case(NamedTuple):
    name: str
    channels: int
    codes: int
    tau: float  # concentrated: a few likely codes per row; spread: a thousand and more
    rows_cpu: int
    rows_cuda: int


CASES = (
    [Case("tiny", 8, 16, 1.0, 64, 64)]
    if QUICK
    else [
        Case("rq-vae, concentrated", 256, 16384, 1.0, 1024, 8192),
        Case("rq-vae, spread", 256, 16384, 8.0, 1024, 8192),
        Case("var, concentrated", 32, 4096, 0.5, 8192, 131072),
        Case("var, spread", 32, 4096, 16.0, 8192, 131072),
    ]
)


def softmax_and_multinomial(x_nc: Tensor, codebook_kc: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Search as published: distances, softmax and multinomial, each an N x K matrix."""
    squares = x_nc.square().sum(1, keepdim=True) + codebook_kc.square().sum(1)
    squared = torch.addmm(squares, x_nc, codebook_kc.t(), alpha=-2.0)
    codes = torch.multinomial(torch.softmax(squared * (-1 / tau), -1), 1)
    return codes, codebook_kc[codes[:, 0]]


def run_case(case: Case, device: torch.device, benchmark: Any = None) -> dict[str, Any]:
    rows = case.rows_cuda if device.type == "cuda" else case.rows_cpu
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, case.channels, generator=generator).to(device)
    norms = torch.rand(case.codes, 1, generator=generator) * 0.8 + 0.2
    codebook = (torch.randn(case.codes, case.channels, generator=generator) * norms).to(device)
    timed_rows = max(1, min(rows, TIMED_ELEMENTS // (case.codes * case.channels)))
    options = dict(tau=case.tau, seed=1)

    contenders = [
        Contender("rqkernels", lambda: rqkernels.stochastic_residual_search(x, codebook, 1, **options)[:2], rows),
        Contender("softmax + multinomial, eager", lambda: softmax_and_multinomial(x, codebook, case.tau), rows),
        Contender(
            "reference (float64)",
            lambda: rqkernels.reference.stochastic_residual_search(x[:timed_rows], codebook, 1, **options)[:2],
            timed_rows,
        ),
    ]
    if not QUICK:
        torch.compiler.reset()  # its cache holds few shapes; else later cases would run eagerly
        compiled = torch.compile(softmax_and_multinomial, mode="max-autotune", fullgraph=True, dynamic=False)
        name = "softmax + multinomial, torch.compile"
        contenders.append(Contender(name, lambda: compiled(x, codebook, case.tau), rows))

    def check(results: Mapping[str, Any]) -> dict[str, float]:
        # The peers sample other codes from the same distribution: on average these are equally near.
        agreement, means = {}, {}
        for name, (codes, _) in results.items():
            n = codes.shape[0]
            if n == rows:
                means[name] = (x - codebook[codes[:, 0]]).double().square().sum(1).mean().item()
            agreement[name] = (codes == results["rqkernels"][0][:n]).double().mean().item()
        assert agreement["reference (float64)"] > 0.99, "our codes differ from the definition"
        ours = means["rqkernels"]
        assert all(abs(mean - ours) < 0.1 * ours + 0.1 * case.tau for mean in means.values()), means
        return agreement

    work = Work(
        bytes=rows * (2 * 4 * case.channels + 8) + 4 * case.codes * case.channels,
        operations=2 * rows * case.codes * case.channels,
    )
    shape = {"N": rows, "C": case.channels, "K": case.codes, "tau": case.tau}
    with torch.no_grad():
        return _harness.compare(case.name, shape, device, contenders, work, check, benchmark)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stochastic_residual_search(run: _harness.Run, case: Case, benchmark: Any) -> None:
    run.cases.append(run_case(case, run.device, benchmark))


if __name__ == "__main__":
    _harness.main("stochastic_residual_search", CASES, run_case)
