"""sample_logits against the published sampler and the best chains of torch's own operators, eager and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import _harness
import pytest
import torch
from _harness import QUICK, Contender, Work
from torch import Tensor

import rqkernels

# The float64 reference takes milliseconds per row: number of codes that are timed.
TIMED_CODES = 1 << 10 if QUICK else 1 << 18


class Case(NamedTuple):
    name: str
    codes: int
    top_k: int | None
    top_p: float | None
    rows_cpu: int
    rows_cuda: int


# top_k and top_p of the first are the published settings of a 16384-code prior; VAR samples a scale's tokens at once.
CASES = (
    [
        Case("tiny", 64, 16, 0.9, 8, 8),
        Case("tiny, top-p", 64, None, 0.9, 8, 8),
        Case("tiny, plain", 64, None, None, 8, 8),
    ]
    if QUICK
    else [
        *(Case(f"published, {n} rows", 16384, 2048, 0.95, n, m) for n, m in ((1, 1), (16, 64), (64, 512))),
        *(Case(f"plain, {n} rows", 16384, None, None, n, m) for n, m in ((1, 1), (16, 64), (64, 512))),
        *(Case(f"top-p, {n} rows", 16384, None, 0.95, n, m) for n, m in ((1, 1), (16, 64))),
        *(Case(f"top-k, {n} rows", 16384, 2048, None, n, m) for n, m in ((1, 1), (16, 64))),
        Case("var, last scale of two images", 4096, 900, 0.96, 512, 16384),
    ]
)


def published(logits_nk: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Sample as published: mask logits below the k-th largest, check for NaN, softmax, sort, mask, multinomial."""
    if top_k is not None:
        smallest = torch.topk(logits_nk, top_k)[0][:, -1:]
        logits_nk = logits_nk.clone().masked_fill_(logits_nk < smallest, -torch.inf)
    if torch.isnan(logits_nk).sum():
        raise ValueError("NaN")
    mass = torch.softmax(logits_nk, -1)
    if top_p is not None:
        ordered, order = torch.sort(mass, -1, descending=True)
        drop = torch.cumsum(ordered, -1) >= top_p
        drop[:, 1:] = drop[:, :-1].clone()
        drop[:, 0] = False
        mass = mass.masked_fill(drop.scatter(-1, order, drop), 0.0)
        mass = mass / mass.sum(-1, keepdim=True)
    return torch.multinomial(mass, 1)[:, 0]


def cut(logits_nk: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor | None]:
    """Return the mass of each candidate code and the candidates (None: all, in order)."""
    if top_k is not None:
        ordered, order = torch.topk(logits_nk, top_k)
    elif top_p is not None:
        ordered, order = torch.sort(logits_nk, -1, descending=True)
    else:
        return torch.softmax(logits_nk, -1), None
    mass = torch.softmax(ordered, -1)
    if top_p is not None:
        mass = mass.masked_fill(mass.cumsum(-1) - mass >= top_p, 0.0)
    return mass, order


def with_multinomial(logits_nk: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Sample without needless work: the result of topk is not sorted again, and nothing is scattered back."""
    mass, order = cut(logits_nk, top_k, top_p)
    drawn = torch.multinomial(mass, 1)
    return (drawn if order is None else order.gather(-1, drawn))[:, 0]


def with_searchsorted(logits_nk: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Sample with one uniform per row, where multinomial takes one per code; float32 sums."""
    mass, order = cut(logits_nk, top_k, top_p)
    cumulative = mass.cumsum(-1)
    drawn = torch.searchsorted(cumulative, torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:], right=True)
    drawn = drawn.clamp_max(mass.shape[-1] - 1)
    return (drawn if order is None else order.gather(-1, drawn))[:, 0]


def run_case(case: Case, device: torch.device, benchmark: Any = None) -> dict[str, Any]:
    rows = case.rows_cuda if device.type == "cuda" else case.rows_cpu
    # These logits spread their mass over hundreds of codes, like those of a trained prior.
    logits = 2 * torch.randn(rows, case.codes, generator=torch.Generator(device).manual_seed(0), device=device)
    timed_rows = max(1, min(rows, TIMED_CODES // case.codes))
    settings = {"top_k": case.top_k, "top_p": case.top_p}

    def chain(draw: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return functools.partial(draw, logits, case.top_k, case.top_p)

    contenders = [
        Contender("rqkernels", lambda: rqkernels.sample_logits(logits, seed=1, **settings), rows),
        Contender("published", chain(published), rows),
        Contender("softmax + multinomial", chain(with_multinomial), rows),
        Contender("softmax + searchsorted", chain(with_searchsorted), rows),
        Contender(
            "reference (float64)",
            lambda: rqkernels.reference.sample_logits(logits[:timed_rows], seed=1, **settings),
            timed_rows,
        ),
    ]
    if not QUICK:
        torch.compiler.reset()  # its cache holds few shapes; else later cases would run eagerly
        compiled = torch.compile(with_searchsorted, mode="max-autotune", fullgraph=True, dynamic=False)
        contenders.append(Contender("softmax + searchsorted, torch.compile", chain(compiled), rows))

    def check(results: Mapping[str, Tensor]) -> dict[str, float]:
        # The peers draw other numbers from the same distribution: what they draw must be what may stay. Their float32
        # sums may keep another last code.
        ordered = logits.double().sort(-1, descending=True).values[:, : case.top_k]
        mass = ordered.softmax(-1)
        stays = mass.cumsum(-1) - mass < (case.top_p or 1.0)
        smallest = ordered.gather(-1, stays.sum(-1, keepdim=True).clamp_max(mass.shape[-1] - 1))
        agreement = {}
        for name, codes in results.items():
            n = codes.shape[0]
            drawn = logits[:n].double().gather(-1, codes[:, None])
            assert (drawn >= smallest[:n]).all(), f"{name} drew a code that does not stay"
            agreement[name] = (codes == results["rqkernels"][:n]).double().mean().item()
        assert agreement["reference (float64)"] == 1, "our codes differ from the definition"
        return agreement

    work = Work(bytes=rows * (4 * case.codes + 8), operations=2 * rows * case.codes)
    shape = {"N": rows, "K": case.codes, "top_k": case.top_k, "top_p": case.top_p}
    with torch.no_grad():
        return _harness.compare(case.name, shape, device, contenders, work, check, benchmark)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sample_logits(run: _harness.Run, case: Case, benchmark: Any) -> None:
    run.cases.append(run_case(case, run.device, benchmark))


if __name__ == "__main__":
    _harness.main("sample_logits", CASES, run_case)
