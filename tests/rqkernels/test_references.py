"""Kernels and references say the same of inputs at the edges: rows that are not finite, none at all, masks, halves,
and whatever dtype is torch's default. (What both refuse, and how: test_arguments.py.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from op_calls import functions, rows
from torch import Tensor

import rqkernels as rqk
from rqkernels.reference.depth_decode import PRECISIONS, rounded_weight

Arguments = dict[str, Any]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


FUNCTIONS = functions()
CASES = {name: function.edges for name, function in FUNCTIONS.items() if function.edges is not None}


def call(package: Any, name: str, arguments: Arguments) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of what has some."""
    given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    wanted = [key for key in FUNCTIONS[name].gradients if isinstance(given[key], Tensor)]
    for key in wanted:
        given[key].requires_grad_()
    result = getattr(package, name)(**given)
    gradients = []
    if wanted:
        gradients = list(torch.autograd.grad(result, [given[key] for key in wanted], torch.full_like(result, 0.5)))
    results = [result] if isinstance(result, Tensor) else []
    for part in result if isinstance(result, tuple) else ():
        results += part if isinstance(part, tuple) else [] if part is None else [part]
    if given.get("losses_out") is not None:
        results.append(given["losses_out"])
    return [t.detach() for t in results], gradients


def tolerance(arguments: Arguments) -> float:
    dtypes = {value.dtype for value in arguments.values() if isinstance(value, Tensor)}
    return 2e-2 if torch.bfloat16 in dtypes else 3e-3 if torch.float16 in dtypes else 3e-5


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_reference(name: str) -> None:
    for number, arguments in enumerate(CASES[name]()):
        ours, theirs = (call(package, name, arguments) for package in (rqk, rqk.reference))
        for kind, a, b in zip(("result", "gradient"), ours, theirs, strict=True):
            assert len(a) == len(b)
            for mine, other in zip(a, b, strict=True):
                said = f"{kind} of case {number}: {arguments}"
                assert mine.dtype == other.dtype, said
                exact = FUNCTIONS[name].results == "exact" or not mine.is_floating_point()
                near = 0.0 if exact and kind == "result" else tolerance(arguments)
                torch.testing.assert_close(
                    mine, other, rtol=near, atol=near, equal_nan=True, msg=lambda text, said=said: f"{said}\n{text}"
                )


# --- the transformer -------------------------------------------------------------------------------------


def twin_decoders(
    precision: str = "fp32", depth: int = 3, layers: int = 1, under: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Two decoders of the same random weights, packed while `under` is torch's default dtype."""
    width, hidden = 6, 8
    shapes = (
        *((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)),
        *((width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)),
    )
    blocks = [rqk.BlockWeights(*(0.3 * torch.randn(shape) for shape in shapes)) for _ in range(layers)]
    weights = {"norm_weight": torch.ones(width), "norm_bias": torch.zeros(width)}
    weights |= {"classifier_weight": torch.randn(depth, 9, width), "classifier_bias": torch.randn(depth, 9)}
    inputs = torch.randn(depth, width), torch.randn(depth, 9, width)
    twins = []
    with default_dtype(under):
        for package in (rqk, rqk.reference):
            stack = package.PackedTransformer(blocks, 2, precision=precision, width=width)
            twins.append(package.PackedDepthDecoder(stack, *inputs, **weights))
    return twins[0], twins[1]


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_no_rows_and_few(batch: int, layers: int) -> None:
    ours, theirs = twin_decoders(layers=layers)
    context, codes = torch.randn(batch, 6), torch.randint(9, (batch, 3))
    for guidance in (0, 1.5):
        both = torch.cat([context, context.flip(1)]) if guidance else context
        drawn = [
            package.depth_decode(both, decoder, seed=5, guidance=guidance, temperature=[0, 0.5, 1.0])
            for package, decoder in ((rqk, ours), (rqk.reference, theirs))
        ]
        assert drawn[0].shape == (batch, 3)
        assert torch.equal(*drawn)
    logits = rqk.depth_logits(context, codes, ours), rqk.reference.depth_logits(context, codes, theirs)
    assert logits[0].shape == (batch, 3, 9)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for x in (context, torch.randn(batch, 2, 6), torch.randn(batch, 0, 6)):
        results = []
        for package, decoder in ((rqk, ours), (rqk.reference, theirs)):
            caches = torch.zeros(2, layers, batch, 2, 4, 3)
            y = package.transformer_step(x, decoder.transformer, *caches, 1, step=torch.tensor([1]))
            results.append((y, caches))
        for mine, other in zip(*results, strict=True):
            assert mine.shape == other.shape
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_finite_in_a_step() -> None:
    ours, theirs = twin_decoders()
    x = rows(9, 6)
    x[6] = 1
    caches = torch.zeros(2, 2, 1, 9, 2, 3, 3)
    y = rqk.transformer_step(x, ours.transformer, *caches[0], 0)
    other = rqk.reference.transformer_step(x, theirs.transformer, *caches[1], 0)
    torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert y.isnan().all(1).tolist() == [False, True, True, False, True, False, False, False, False]


# --- what lies around a call -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("package", [rqk, rqk.reference], ids=["kernel", "reference"])
def test_the_default_dtype_changes_nothing(package: Any, dtype: torch.dtype) -> None:
    for name, cases in CASES.items():
        for number, arguments in enumerate(cases()):
            if number % 7:
                continue
            before = call(package, name, arguments)
            with default_dtype(dtype):
                under = call(package, name, arguments)
            for a, b in zip((*before[0], *before[1]), (*under[0], *under[1]), strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25)), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_default_dtype_changes_no_weight(precision: str) -> None:
    """Quotients in float64 would round to other integers where they are near a half."""
    weight = torch.randn(300, 300)
    plain = rounded_weight(weight, precision)
    decoders = twin_decoders(precision)
    for dtype in (torch.float64, torch.float16):
        with default_dtype(dtype):
            assert torch.equal(rounded_weight(weight, precision), plain)
        torch.manual_seed(0)
        torch.randn(300, 300)  # as before the decoders
        again = twin_decoders(precision, under=dtype)
        assert torch.equal(again[0].transformer._blocks, decoders[0].transformer._blocks)
        assert torch.equal(again[0]._classifier, decoders[0]._classifier)
        for a, b in zip(again[1].classifier_weights, decoders[1].classifier_weights, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("package", [rqk, rqk.reference], ids=["kernel", "reference"])
def test_autocast_changes_nothing_but_the_matmuls_of_the_fused_loss(package: Any) -> None:
    for name, cases in CASES.items():
        if name == "fused_linear_soft_label_cross_entropy":
            continue
        for number, arguments in enumerate(cases()):
            if number % 11:
                continue
            given = {key: value.detach() if isinstance(value, Tensor) else value for key, value in arguments.items()}
            plain = getattr(package, name)(**given)
            with torch.autocast("cpu", torch.bfloat16):
                under = getattr(package, name)(**given)
            pairs = zip(plain, under, strict=True) if isinstance(plain, tuple) else [(plain, under)]
            for a, b in pairs:
                if isinstance(a, Tensor):
                    assert a.dtype == b.dtype
                    assert torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25)), name
