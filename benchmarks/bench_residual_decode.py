"""residual_decode against gather-and-add, and for a shared codebook against embedding_bag."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import _harness
import pytest
import torch
from _harness import QUICK, Contender, Work
from _shapes import SHAPES, Shape, codebook_at
from torch import Tensor

import rqkernels


def gather_and_add(codes_nd: Tensor, codebooks: Tensor) -> Tensor:
    total = torch.zeros(codes_nd.shape[0], codebooks.shape[-1], device=codes_nd.device)
    for d in range(codes_nd.shape[1]):
        total = total + codebook_at(codebooks, d)[codes_nd[:, d]]
    return total


def run_case(case: Shape, device: torch.device, benchmark: Any = None) -> dict[str, Any]:
    # A decode is cheap: it takes ten times the rows of a search to fill the memory system.
    rows = 10 * case.rows(device)
    generator = torch.Generator().manual_seed(0)
    codebooks = case.codebooks(generator).to(device)
    codes = torch.randint(case.codes, (rows, case.depth), generator=generator).to(device)

    contenders = [
        Contender("rqkernels", lambda: rqkernels.residual_decode(codes, codebooks), rows),
        Contender("gather and add, eager", lambda: gather_and_add(codes, codebooks), rows),
        Contender("reference", lambda: rqkernels.reference.residual_decode(codes, codebooks), rows),
    ]
    if case.shared:
        bag = torch.nn.functional.embedding_bag
        contenders.append(Contender("embedding_bag", lambda: bag(codes, codebooks, mode="sum"), rows))
    if not QUICK:
        torch.compiler.reset()
        compiled = torch.compile(gather_and_add, mode="max-autotune", fullgraph=True, dynamic=False)
        contenders.append(Contender("gather and add, torch.compile", lambda: compiled(codes, codebooks), rows))

    def check(results: Mapping[str, Any]) -> dict[str, float]:
        truth = results["reference"]
        assert torch.equal(results["rqkernels"], truth), "our sums differ from the definition"
        for name, result in results.items():
            torch.testing.assert_close(result, truth, msg=lambda m, name=name: f"{name}: {m}")
        return {name: (result == truth).all(1).double().mean().item() for name, result in results.items()}

    read_codes = min(rows * case.depth, case.codes * (1 if case.shared else case.depth))
    work = Work(
        bytes=rows * (8 * case.depth + 4 * case.channels) + 4 * read_codes * case.channels,
        operations=rows * case.depth * case.channels,
    )
    shape = {**case.described(device), "N": rows}
    with torch.no_grad():
        return _harness.compare(case.name, shape, device, contenders, work, check, benchmark)


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_residual_decode(run: _harness.Run, case: Shape, benchmark: Any) -> None:
    run.cases.append(run_case(case, run.device, benchmark))


if __name__ == "__main__":
    _harness.main("residual_decode", SHAPES, run_case)
