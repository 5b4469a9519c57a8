"""Derivatives of operators, registered with the dispatcher like those of PyTorch's own operators.

Every call is differentiated correctly or refused, from compiled code and `torch.func` too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Registrations live as long as this object.
LIBRARY = torch.library.Library("rqkernels", "FRAGMENT")


def is_transformed(tensors: Sequence[Any]) -> bool:
    """True inside a `torch.func` transform, or if one of the tensors carries a forward-mode tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def register_derivative(
    name: str, plain: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Register the derivatives of `torch.ops.rqkernels.<name>`.

    Args:
        name: of the operator.
        plain: the operator in differentiable PyTorch functions, for forward mode and `torch.func`.
        setup_context: as in `torch.autograd.Function`: called with (ctx, inputs, output).
        backward: as in `torch.autograd.Function`. With gradients enabled its result may be differentiated again: it
            must then be differentiable (see `vjp`) or refuse that (see `refuse_second_derivative`).
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

    setattr(Derivative, "backward", staticmethod(backward))  # noqa: B010 (mypy knows backward as a method)
    Derivative.__name__ = Derivative.__qualname__ = name

    def call(*args: Any) -> Any:
        if is_transformed(args):
            below(*args)  # for the operator's checks
            return plain(*args)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
            return Derivative.apply(*args)
        return below(*args)

    LIBRARY.impl(name, call, "Autograd")


def vjp(plain: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `plain(*inputs)`, which can be differentiated again in inputs and in `grad`.

    Only with gradients enabled: a backward pass without create_graph has its own arithmetic, see `depth_attention`.
    """
    # Views: one input may have been computed from another, and that path must not be differentiated here.
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
    """Return the gradient, wrapped to raise when it is differentiated.

    `of` are the tensors that such a second derivative would pass through: the result of `op`, which is never large, and
    the tensors that its gradient was computed from.
    """
    return _Refusal.apply(op, gradient, *of) if torch.is_grad_enabled() else gradient
