"""residual_search against the definition, the published formulation (eager, compiled) and two libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import _harness
import pytest
import torch
from _harness import QUICK, Contender, Work
from _shapes import SHAPES, Shape, codebook_at
from torch import Tensor

import rqkernels

# The float64 reference takes seconds where others take milliseconds: limits of rows * K * C * D that are checked once,
# and that are timed (its time is compared per row).
CHECKED_ELEMENTS, TIMED_ELEMENTS = (1 << 20, 1 << 12) if QUICK else (1 << 29, 1 << 26)


CASES = [
    *SHAPES,
    *(
        [Shape("tiny-training", 8, 16, 2, True, 64, 64, changes=True)]
        if QUICK
        else [
            # Encoding a data set: a shared codebook through many depths, where its PackedCodebook has most to give.
            Shape("rq-vae-16", 256, 16384, 16, True, 1024, 8192),
            # One image.
            Shape("rq-vae-64-rows", 256, 16384, 4, True, 64, 64),
            # A training step: a cached codebook of the previous step is of no use.
            Shape("rq-vae-training", 256, 16384, 4, True, 1024, 8192, changes=True),
        ]
    ),
]


def published_search(x_nc: Tensor, codebooks: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Search as published: |r|^2 + |e|^2 - 2 r.e as an N x K matrix, argmin, gather, subtract."""
    residual, total, codes = x_nc, torch.zeros_like(x_nc), []
    for d in range(depth):
        codebook = codebook_at(codebooks, d)
        squares = residual.square().sum(1, keepdim=True) + codebook.square().sum(1)
        code = torch.addmm(squares, residual, codebook.t(), alpha=-2.0).argmin(1)
        chosen = codebook[code]
        residual, total = residual - chosen, total + chosen
        codes.append(code)
    return torch.stack(codes, 1), total


def cdist_search(x_nc: Tensor, codebooks: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Search in the simplest way: `torch.cdist`, argmin."""
    residual, total, codes = x_nc, torch.zeros_like(x_nc), []
    for d in range(depth):
        codebook = codebook_at(codebooks, d)
        code = torch.cdist(residual, codebook).argmin(1)
        chosen = codebook[code]
        residual, total = residual - chosen, total + chosen
        codes.append(code)
    return torch.stack(codes, 1), total


def with_tf32(search: Callable[..., Any]) -> Callable[..., Any]:
    """Run a search with float32 matrix products in TF32 (10 bits of fraction), as is common in training."""

    def call(*args: Any) -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return search(*args)
        finally:
            torch.set_float32_matmul_precision(before)

    return call


def residual_vq(x_nc: Tensor, codebooks: Tensor, depth: int) -> Any:
    """Return vector-quantize-pytorch's ResidualVQ in eval mode with our codebooks."""
    from vector_quantize_pytorch import ResidualVQ

    model = ResidualVQ(
        dim=x_nc.shape[1],
        num_quantizers=depth,
        codebook_size=codebooks.shape[-2],
        shared_codebook=codebooks.dim() == 2,
    ).to(x_nc.device)
    for d, layer in enumerate(model.layers):
        # Shares memory with ours, so that it changes with them.
        layer._codebook.embed.data = codebook_at(codebooks, d)[None]
    model.eval()

    @torch.no_grad()
    def search() -> tuple[Tensor, Tensor]:
        quantized, codes, _ = model(x_nc[None])
        return codes[0], quantized[0]

    return search


class FaissSearch:
    """One IndexFlatL2 per codebook, with the residual between depths in numpy. An index copies its codebook: every call
    copies one that changes again.

    `faiss.cvar.distance_compute_blas_threshold` selects faiss's own loops or matrix products by queries times dimension
    (version 1.15: 128000, below which it may be many times slower). The faster of its default and 1 is found by trying
    both on this case.
    """

    TRIES = 3

    def __init__(self, x_nc: Tensor, codebooks: Tensor, depth: int, changes: bool) -> None:
        import faiss

        self.depth, self.changes = depth, changes
        self.x, self.tables = x_nc.numpy(), list(codebooks.view(-1, *codebooks.shape[-2:]).numpy())
        self.indexes = [faiss.IndexFlatL2(self.x.shape[1]) for _ in self.tables]
        faiss.omp_set_num_threads(torch.get_num_threads())
        self.fill()
        self.switches = faiss.cvar
        thresholds = dict.fromkeys((self.switches.distance_compute_blas_threshold, 1))
        self.threshold = min(thresholds, key=self._best_ns)

    @property
    def setting(self) -> str:
        return f"distance_compute_blas_threshold={self.threshold}"

    def _best_ns(self, threshold: int) -> int:
        self.threshold = threshold
        return min(_harness.time_ns(self, torch.device("cpu")) for _ in range(self.TRIES))

    def fill(self) -> None:
        for index, table in zip(self.indexes, self.tables, strict=True):
            index.reset()
            index.add(table)

    def __call__(self) -> tuple[Tensor, Tensor]:
        import numpy as np

        self.switches.distance_compute_blas_threshold = self.threshold
        if self.changes:
            self.fill()
        residual, total, codes = self.x, np.zeros_like(self.x), []
        for d in range(self.depth):
            index, table = self.indexes[d % len(self.indexes)], self.tables[d % len(self.tables)]
            code = index.search(residual, 1)[1][:, 0]
            chosen = table[code]
            residual, total = residual - chosen, total + chosen
            codes.append(code)
        return torch.from_numpy(np.stack(codes, 1)), torch.from_numpy(total)


def check_no_nearer(x_nc: Tensor, codebooks: Tensor, ours_nd: Tensor, theirs_nd: Tensor) -> None:
    """Assert that ours is the nearer code, in float64, at the first depth at which another contender's code differs.

    Up to that depth both chose the same codes, so they have the same residual.
    """
    residual, same = x_nc, torch.ones(x_nc.shape[0], dtype=torch.bool, device=x_nc.device)
    for d in range(ours_nd.shape[1]):
        codebook, ours, theirs = codebook_at(codebooks, d), ours_nd[:, d], theirs_nd[:, d]
        rows = (same & (ours != theirs)).nonzero()[:, 0]
        near, other = (
            (residual[rows].double() - codebook[codes[rows]].double()).square().sum(1) for codes in (ours, theirs)
        )
        # These sums have another order than the definition's: equal up to rounding is a tie.
        assert (near <= other * (1 + 1e-14)).all(), f"a contender found a nearer code at depth {d}"
        same &= ours == theirs
        residual = residual - codebook[ours]


def run_case(case: Shape, device: torch.device, benchmark: Any = None) -> dict[str, Any]:
    rows, depth = case.rows(device), case.depth
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, case.channels, generator=generator).to(device)
    codebooks = case.codebooks(generator).to(device)
    checked_rows, timed_rows = (
        max(1, min(rows, elements // (case.codes * case.channels * depth)))
        for elements in (CHECKED_ELEMENTS, TIMED_ELEMENTS)
    )

    def reference(n: int) -> tuple[Tensor, Tensor]:
        return rqkernels.reference.residual_search(x[:n], codebooks, depth)[:2]

    contenders = [
        Contender("rqkernels", lambda: rqkernels.residual_search(x, codebooks, depth)[:2], rows),
        Contender("published, eager", lambda: published_search(x, codebooks, depth), rows),
        Contender("reference (float64)", lambda: reference(timed_rows), timed_rows),
    ]
    packs = case.shared and not case.changes
    if packs:
        packed = rqkernels.PackedCodebook(codebooks)
        name = "rqkernels, PackedCodebook"
        contenders.append(Contender(name, lambda: rqkernels.residual_search(x, packed, depth)[:2], rows))
    # TF32 loses near ties: it is different work, reported too, and its codes only must not be nearer than ours.
    tf32 = []
    if device.type == "cuda":
        contenders.append(Contender("cdist, eager", lambda: cdist_search(x, codebooks, depth), rows))
        eager = with_tf32(published_search)
        tf32.append(Contender("published, eager, TF32", lambda: eager(x, codebooks, depth), rows))
    if not QUICK:
        torch.compiler.reset()  # its cache holds few shapes; else later cases would run eagerly
        options: dict[str, Any] = {"mode": "max-autotune", "fullgraph": True, "dynamic": False}
        compiled = torch.compile(published_search, **options)
        contenders.append(Contender("published, torch.compile", lambda: compiled(x, codebooks, depth), rows))
        if device.type == "cuda":
            fast = with_tf32(torch.compile(published_search, **options))
            tf32.append(Contender("published, torch.compile, TF32", lambda: fast(x, codebooks, depth), rows))
    contenders += tf32
    if importlib.util.find_spec("vector_quantize_pytorch"):
        contenders.append(Contender("vector-quantize-pytorch", residual_vq(x, codebooks, depth), rows))
    if device.type == "cpu" and importlib.util.find_spec("faiss"):
        faiss = FaissSearch(x, codebooks, depth, case.changes)
        contenders.append(Contender("faiss IndexFlatL2", faiss, rows, faiss.setting))

    def check(results: Mapping[str, Any]) -> dict[str, float]:
        ours = results["rqkernels"][0]
        truth = reference(checked_rows)[0]
        assert torch.equal(ours[:checked_rows], truth), "our codes differ from the definition"
        agreement = {}
        if packs:
            theirs = results["rqkernels, PackedCodebook"]
            assert all(torch.equal(a, b) for a, b in zip(results["rqkernels"], theirs, strict=True))
        for name, (codes, _) in results.items():
            n = codes.shape[0]
            check_no_nearer(x[:n], codebooks, ours[:n], codes)
            agreement[name] = (codes == ours[:n]).all(1).double().mean().item()
        # float32 scores may lose a near tie; more differences would mean different work.
        least = min(agreement[name] for name in agreement.keys() - {contender.name for contender in tf32})
        assert least > 0.9, f"a contender does not do the same work: {agreement}"
        return agreement

    n_codebooks = 1 if case.shared else depth
    work = Work(
        bytes=rows * (2 * 4 * case.channels + 8 * depth) + 4 * n_codebooks * case.codes * case.channels,
        operations=2 * rows * case.codes * case.channels * depth,
    )

    def change() -> None:
        codebooks.mul_(0.999)

    before_round = change if case.changes else lambda: None
    described = case.described(device)
    with torch.no_grad():
        return _harness.compare(case.name, described, device, contenders, work, check, benchmark, before_round)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_residual_search(run: _harness.Run, case: Shape, benchmark: Any) -> None:
    run.cases.append(run_case(case, run.device, benchmark))


if __name__ == "__main__":
    _harness.main("residual_search", CASES, run_case)
