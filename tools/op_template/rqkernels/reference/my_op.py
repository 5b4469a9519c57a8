"""my_op, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import REFERENCE_DTYPES, check_elements, check_float32, check_tensor


def check_shapes(op: str, x: Tensor) -> None:
    """Checks as op.cpp does, in the same words."""
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be (..., C), got a scalar")
    check_elements(op, "x", x)


def my_op(x: Tensor, factor: float = 1.0) -> Tensor:
    """`factor * x` in float32, cast once to x's dtype.

    TODO(my_op): the definition, slow and obvious; everything else is measured against it.
    """
    op = "my_op"
    check_tensor(op, "x", x, REFERENCE_DTYPES)
    factor = check_float32(op, "factor", factor)
    check_shapes(op, x)
    in_float = x if x.dtype == torch.float64 else x.float()
    return (in_float * factor).to(x.dtype)
