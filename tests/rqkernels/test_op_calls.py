"""Tests of op_calls: every operator has its calls, and their checks can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from op_calls import OPS, Agreement, calls_of, functions

import rqkernels as rqk

ROOT = Path(__file__).resolve().parents[2]
each_op = pytest.mark.parametrize("op", OPS)


def test_every_operator_has_a_module() -> None:
    assert sorted(path.name for path in (ROOT / "csrc" / "ops").iterdir()) == OPS


def test_every_public_function_has_arguments() -> None:
    assert set(functions()) == set(rqk.__all__) - {"BlockWeights", "ResidualCodes", "info", "reference"}


@each_op
def test_calls_are_functions_of_their_seed(op: str) -> None:
    for call in calls_of(op).RAGGED:
        inputs, same, other = call.draw(1), call.draw(1), call.draw(2)
        assert all(map(torch.equal, map(torch.nan_to_num, inputs), map(torch.nan_to_num, same)))
        assert [t.shape for t in inputs] == [t.shape for t in other]
        if call.captured:  # replayed on other inputs, with other results
            assert not all(map(torch.equal, call.run(*inputs), call.run(*other)))
        results = call.run(*inputs)
        call.check(results, call.run(*same))
        # NaN on two devices agrees, so it must come from NaN or from a code of -1.
        if all(t.isfinite().all() and (t.is_floating_point() or (t >= 0).all()) for t in inputs):
            assert all(t.isfinite().all() for t in results)


@each_op
def test_another_result_is_told(op: str) -> None:
    calls = calls_of(op).RAGGED
    assert any(call.captured for call in calls)
    for call in calls:
        expected = call.run(*call.draw(1))
        for i, result in enumerate(expected):
            if result.numel() == 0:
                continue
            ours = [t.clone() for t in expected]
            ours[i] = 1.1 * result.detach().nan_to_num() + 1 if result.is_floating_point() else result + 1
            with pytest.raises(AssertionError, match=f"^result {i} differs from the CPU's at "):
                call.check(ours, expected)


@each_op
def test_typical_calls_have_a_quick_form(op: str) -> None:
    device = torch.device("cpu")
    for call in calls_of(op).typical(device, quick=True):
        call.run(*call.draw(0))
    assert list(calls_of(op).typical(device, quick=False))


def test_how_far_results_may_be_apart() -> None:
    x, codes = torch.tensor([1.0, -200.0, torch.nan]), torch.arange(100)
    assert Agreement().problem(x.clone(), x) is None
    assert Agreement().problem(x * (1 + 2**-20), x) == "by up to 1.83e-04"
    assert Agreement(rtol=1e-5).problem(x * (1 + 2**-20), x) is None
    finite = x.nan_to_num()
    assert Agreement(atol=1e-3).problem(finite + 0.1, finite) == "by up to 1.00e-01"
    assert Agreement(atol=1e-3, scaled=True).problem(finite + 0.1, finite) is None
    assert Agreement().problem(finite, x) == "by up to inf"
    assert Agreement().problem(x.double(), x) == "torch.float64 (3,), not torch.float32 (3,)"
    assert Agreement().problem(x[:2], x) == "torch.float32 (2,), not torch.float32 (3,)"
    two_differ = codes.clone()
    two_differ[[3, 4]] = -1
    assert Agreement(codes=0.03).problem(two_differ, codes) is None
    assert Agreement(codes=0.02).problem(two_differ, codes) == "2.0% of the codes"
    assert Agreement(rtol=1.0, atol=9.0).problem(two_differ, codes) == "2.0% of the codes"
