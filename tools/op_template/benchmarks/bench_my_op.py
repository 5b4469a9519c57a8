"""my_op against PyTorch's own multiplication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import _harness
import pytest
import torch
from _harness import QUICK, Contender, Work
from _shapes import SHAPES, Shape

import rqkernels


# TODO(my_op): the strongest peers, and the work that no implementation can avoid.
def run_case(case: Shape, device: torch.device, benchmark: Any = None) -> dict[str, Any]:
    rows = case.rows(device)
    x = torch.randn(rows, case.channels, generator=torch.Generator().manual_seed(0)).to(device)

    contenders = [
        Contender("rqkernels", lambda: rqkernels.my_op(x, 0.7), rows),
        Contender("eager", lambda: x * 0.7, rows),
        Contender("reference", lambda: rqkernels.reference.my_op(x, 0.7), rows),
    ]
    if not QUICK:
        torch.compiler.reset()
        compiled = torch.compile(lambda x: x * 0.7, mode="max-autotune", fullgraph=True, dynamic=False)
        contenders.append(Contender("torch.compile", lambda: compiled(x), rows))

    def check(results: Mapping[str, Any]) -> dict[str, float]:
        truth = results["reference"]
        assert torch.equal(results["rqkernels"], truth), "our result differs from the definition"
        for name, result in results.items():
            torch.testing.assert_close(result, truth, msg=lambda m, name=name: f"{name}: {m}")
        return {name: (result == truth).all(1).double().mean().item() for name, result in results.items()}

    work = Work(bytes=8 * x.numel(), operations=x.numel())
    shape = {"N": rows, "C": case.channels}
    with torch.no_grad():
        return _harness.compare(case.name, shape, device, contenders, work, check, benchmark)


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_my_op(run: _harness.Run, case: Shape, benchmark: Any) -> None:
    run.cases.append(run_case(case, run.device, benchmark))


if __name__ == "__main__":
    _harness.main("my_op", SHAPES, run_case)
