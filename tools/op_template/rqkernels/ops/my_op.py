"""my_op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._arguments import FLOAT_DTYPES, check_float32
from .._derivatives import register_derivative
from .._library import call, check_tensor
from ..reference.my_op import check_shapes

_OP = "my_op"


def my_op(x: Tensor, factor: float = 1.0) -> Tensor:
    """`factor * x`, in float32 and cast once. Differentiable in x.

    TODO(my_op): the formula with its source, the naive torch expression, and what is never
    materialised.

    Args:
        x: (..., C); float32, float16 or bfloat16.
        factor: >= 0, finite in float32.

    Returns:
        The shape and dtype of x.

    Raises:
        TypeError: x not of those dtypes, factor not a number.
        ValueError: x a scalar, factor negative or not finite in float32.
    """
    check_tensor(_OP, "x", x, FLOAT_DTYPES)
    return call(_OP, torch.ops.rqkernels.my_op, x, check_float32(_OP, "factor", factor))


@torch.library.register_fake("rqkernels::my_op")
def _fake(x: Tensor, factor: float) -> Tensor:
    check_shapes(_OP, x)
    return x.new_empty(x.shape)


# TODO(my_op): the gradient. Without one nothing stands below this line, the docstring says
# "Not differentiable.", and the module in tests/support/op_calls has no `gradients` and no DERIVATIVES.


def _setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.factor = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
    # The operator itself, which can be differentiated again.
    return my_op(grad, ctx.factor) if ctx.needs_input_grad[0] else None, None


register_derivative("my_op", reference.my_op, _setup_context, _backward)
