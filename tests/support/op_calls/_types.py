"""Types that the operators' modules are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Arguments = dict[str, Any]


class Agreement(NamedTuple):
    """Tolerance between the results of two devices. The default is none; NaN equals NaN."""

    rtol: float = 0.0
    atol: float = 0.0
    scaled: bool = False  # atol is relative to the largest of a result, or to 1 where that is more
    codes: float = 0.0  # share of a result's integers that may differ

    def problem(self, ours: Tensor, expected: Tensor) -> str | None:
        """Return the difference that is too large, as text; None if there is none."""
        ours, expected = ours.detach().cpu(), expected.detach()
        if ours.shape != expected.shape or ours.dtype != expected.dtype:
            return f"{ours.dtype} {tuple(ours.shape)}, not {expected.dtype} {tuple(expected.shape)}"
        if not ours.is_floating_point():
            differ = (ours != expected).double().mean().item() if ours.numel() else 0.0
            return None if differ == 0 or differ < self.codes else f"{differ:.1%} of the codes"
        atol = self.atol * max(1.0, expected.abs().max().item()) if self.scaled and expected.numel() else self.atol
        if torch.allclose(ours, expected, rtol=self.rtol, atol=atol, equal_nan=True):
            return None
        apart = (ours - expected).abs()[~(ours.isnan() & expected.isnan())]
        return f"by up to {apart.nan_to_num(torch.inf).max().item():.2e}"


class Call(NamedTuple):
    """A call of an operator that can be made on every device."""

    where: str  # its shape and settings, for messages
    inputs: Callable[[torch.Generator], Sequence[Tensor]]  # on the CPU
    run: Callable[..., Sequence[Tensor]]  # results, of the inputs on their device
    agreement: Agreement = Agreement()
    captured: bool = False  # works in a CUDA graph: nothing waits for the device, and inputs may change in place

    def draw(self, seed: int) -> list[Tensor]:
        """Inputs, the same for the same seed."""
        return list(self.inputs(torch.Generator().manual_seed(seed)))

    def check(self, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Raise AssertionError unless results are those of the CPU."""
        for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
            problem = self.agreement.problem(a, b)
            assert problem is None, f"result {i} differs from the CPU's at {self.where}: {problem}"


class Function(NamedTuple):
    """A public function (or the class of a packed object), and how tests call it by keywords."""

    # One valid call with every argument; the same numbers for rqkernels and its reference, `package` being either.
    arguments: Callable[[ModuleType], Arguments]
    random: Callable[[Random], Arguments]  # a valid call in some shape; a Twin stands for a packed object
    edges: Callable[[], Iterator[Arguments]] | None = None  # rows that are not finite, none at all, masks, halves
    gradients: tuple[str, ...] = ()  # arguments that have one
    # Against the reference: to the bit; codes that fall otherwise within rounding of a boundary; products whose kernels
    # round activations or add in another order; rounding alone.
    results: Literal["exact", "drawn", "products", "rounded"] = "rounded"
    integers: Mapping[str, tuple[int, int | None]] = {}  # arguments, each with its least value and bits
    numbers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


class Derivative(NamedTuple):
    """`call(package, leaf)` is a tensor, with `package` either rqkernels or its reference."""

    op: str
    call: Callable[[ModuleType, Tensor], Tensor]
    leaf: Tensor
    twice: bool = True  # the gradient may be differentiated again


class Twin(NamedTuple):
    """A packed object and the reference's of the same weights."""

    kernel: Any
    reference: Any
