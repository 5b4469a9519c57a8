"""Derivatives of operators, registered where the dispatcher looks for those of PyTorch's own operators: a call is
differentiated rightly, or refused, wherever it comes from, compiled code and `torch.func` among it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Registrations live as long as this.
LIBRARY = torch.library.Library("rqkernels", "FRAGMENT")


def is_transformed(tensors: Sequence[Any]) -> bool:
    """Whether `torch.func` is at work, or forward mode on one of these."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def register_derivative(
    name: str, plain: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Registers the derivatives of `torch.ops.rqkernels.<name>`.

    Args:
        name: of the operator.
        plain: the operator by differentiable functions of PyTorch, which forward mode and `torch.func` go through.
        setup_context: as of `torch.autograd.Function`; at its end (ctx, inputs, output).
        backward: as of `torch.autograd.Function`. With gradients enabled, which is where its result may be
            differentiated again, that must be right (see `vjp`) or refused (see `refuse_second_derivative`).
    """
    op = getattr(torch.ops.rqkernels, name).default

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = below(*args)
            setup_context(ctx, args, output)
            return output

    Derivative.backward = staticmethod(backward)
    Derivative.__name__ = Derivative.__qualname__ = name

    def call(*args: Any) -> Any:
        if is_transformed(args):
            below(*args)  # What it refuses is refused here too.
            return plain(*args)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
            return Derivative.apply(*args)
        return below(*args)

    LIBRARY.impl(name, call, "Autograd")


def vjp(plain: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `plain(*inputs)`, which may be differentiated again, in inputs and in `grad`."""
    # Views, since one input may have been made from another: that path is not this function's.
    own = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(plain(*own), own, grad, create_graph=True)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *of: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.op}: a second derivative is not available; rqkernels.reference.{ctx.op} has it, in plain PyTorch"
        )


def refuse_second_derivative(op: str, gradient: Tensor, *of: Tensor) -> Tensor:
    """The gradient, which raises where it is differentiated. `of` are tensors through which that would go on: the
    result of `op`, which is never large, and what its gradient came from."""
    return _Refusal.apply(op, gradient, *of) if torch.is_grad_enabled() else gradient
