"""code_statistics against the published one-hot product, and against index_add with bincount."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import _harness
import pytest
import torch
from _harness import QUICK, Contender, Work
from torch import Tensor

import rqkernels

# The reference adds rows one by one in Python: a few thousand rows are enough.
REFERENCE_ROWS = 4096


class Case(NamedTuple):
    name: str
    channels: int
    codes: int
    rows_cpu: int
    rows_cuda: int
    first_code: float = 0.0  # share of the rows with code 0; the others are spread evenly


CASES = (
    [Case("tiny", 8, 16, 64, 64)]
    if QUICK
    else [
        Case("rq-vae", 256, 16384, 8192, 262144),
        Case("var", 32, 4096, 65536, 2_097_152),
        Case("audio-8", 8, 1024, 262144, 4_194_304),
        Case("collapsed", 256, 16384, 8192, 262144, 0.9),
    ]
)


def one_hot(x_nc: Tensor, codes_n: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Sum as published: an N x K one-hot matrix, and as much arithmetic as the search itself."""
    choice_nk = torch.zeros(x_nc.shape[0], num_codes, device=x_nc.device)
    choice_nk.scatter_(1, codes_n[:, None], 1.0)
    return choice_nk.sum(0), choice_nk.t() @ x_nc


def index_add(x_nc: Tensor, codes_n: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(codes_n, minlength=num_codes).float()
    return counts, torch.zeros(num_codes, x_nc.shape[1], device=x_nc.device).index_add_(0, codes_n, x_nc)


def run_case(case: Case, device: torch.device, benchmark: Any = None) -> dict[str, Any]:
    rows = case.rows_cuda if device.type == "cuda" else case.rows_cpu
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, case.channels, generator=generator).to(device)
    codes = torch.randint(case.codes, (rows,), generator=generator).to(device)
    codes[: int(case.first_code * rows)] = 0
    reference_rows = min(rows, REFERENCE_ROWS)
    # A one-hot matrix of all rows of the largest case would not fit: this contender gets the rows that fill 1 GiB.
    one_hot_rows = min(rows, (1 << 28) // case.codes)

    contenders = [
        Contender("rqkernels", lambda: rqkernels.code_statistics(x, codes, case.codes), rows),
        Contender("index_add and bincount", lambda: index_add(x, codes, case.codes), rows),
        Contender(
            "published one-hot",
            lambda: one_hot(x[:one_hot_rows], codes[:one_hot_rows], case.codes),
            one_hot_rows,
        ),
        Contender(
            "reference (float64)",
            lambda: rqkernels.reference.code_statistics(x[:reference_rows], codes[:reference_rows], case.codes),
            reference_rows,
        ),
    ]

    def check(results: Mapping[str, Any]) -> dict[str, float]:
        # Compared with float64 sums of each contender's rows; float32 sums may differ by their rounding.
        agreement = {}
        for contender in contenders:
            n = contender.rows
            counts, sums = results[contender.name]
            truth = torch.zeros(case.codes, case.channels, dtype=torch.float64, device=device)
            truth.index_add_(0, codes[:n], x[:n].double())
            assert torch.equal(counts, torch.bincount(codes[:n], minlength=case.codes).float()), contender.name
            scale = torch.zeros_like(truth).index_add_(0, codes[:n], x[:n].abs().double()).clamp_min(1.0)
            error = (sums.double() - truth).abs() / scale
            assert error.max() < 1e-5, f"{contender.name}: sums off by {error.max():.1e}"
            agreement[contender.name] = (sums == truth.float()).double().mean().item()
        return agreement

    work = Work(
        bytes=rows * (4 * case.channels + 8) + 4 * case.codes * (case.channels + 1),
        operations=rows * (case.channels + 1),
    )
    shape = {"N": rows, "C": case.channels, "K": case.codes}
    with torch.no_grad():
        return _harness.compare(case.name, shape, device, contenders, work, check, benchmark)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_code_statistics(run: _harness.Run, case: Case, benchmark: Any) -> None:
    run.cases.append(run_case(case, run.device, benchmark))


if __name__ == "__main__":
    _harness.main("code_statistics", CASES, run_case)
