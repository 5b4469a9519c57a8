"""Sum of codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._arguments import FLOAT_DTYPES, check_flag
from .._derivatives import register_derivative, vjp
from .._library import call, check_tensor
from ..reference.residual_decode import check_depth, check_shapes
from .code_statistics import statistics

_OP = "residual_decode"


def residual_decode(codes: Tensor, codebooks: Tensor, depth: int | None = None, *, check: bool = True) -> Tensor:
    """Sum the code vectors of each row: `sum_{d < depth} e_d(k_d)` (Lee et al. 2022, equation 5).

    Naively `codebook.float()[codes[..., :depth]].sum(-2)`; here the (..., D, C) gather is never formed. The sum runs in
    float32, in depth order from zero, and is cast once, so for codes of `residual_search` it equals its `.quantized`.

    Linear in codebooks and differentiable in them any number of times, also in forward mode and under `torch.func`
    (there, and for a gradient with create_graph=True, by `rqkernels.reference.residual_decode`).

    Args:
        codes: int64 (..., D).
        codebooks: (K, C), shared by all depths, or (D', K, C), one per depth, with D' >= D; float32, float16 or
            bfloat16.
        depth: use only the first `depth` codes, 1 <= depth <= D; None for all.
        check: raise if a code is outside [0, K). On CUDA this reads one flag back from the device. False is for graph
            capture: a row with such a code becomes NaN.

    Returns:
        (..., C) in the dtype of codebooks.

    Raises:
        TypeError: codes not int64, codebooks not of those dtypes, depth not an integer, check not a bool.
        ValueError: shapes or devices that do not match, depth out of range.
        IndexError: a code outside [0, K), with its row and depth.
    """
    check_tensor(_OP, "codes", codes, (torch.int64,))
    check_tensor(_OP, "codebooks", codebooks, FLOAT_DTYPES)
    depth, check = check_depth(_OP, depth), check_flag(_OP, "check", check)
    return call(_OP, torch.ops.rqkernels.residual_decode, codes, codebooks, depth, check)


@torch.library.register_fake("rqkernels::residual_decode")
def _fake(codes: Tensor, codebooks: Tensor, depth: int | None, check: bool) -> Tensor:
    check_shapes(_OP, codes, codebooks, depth)
    return codebooks.new_empty((*codes.shape[:-1], codebooks.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int | None, bool], output: Tensor) -> None:
    codes, codebooks, depth, _ = inputs
    ctx.save_for_backward(codes)
    ctx.codebooks_shape, ctx.codebooks_dtype = codebooks.shape, codebooks.dtype
    ctx.depth = codes.shape[-1] if depth is None else depth


def _plain(codes: Tensor, codebooks: Tensor, depth: int | None, check: bool) -> Tensor:
    return reference.residual_decode(codes, codebooks, depth, check=False)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[1]:
        return None, None, None, None
    (codes,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        # The sum is linear: its gradient does not depend on the values of the codebooks.
        anywhere = grad.new_zeros(ctx.codebooks_shape, dtype=ctx.codebooks_dtype)
        return None, *vjp(lambda e: _plain(codes, e, ctx.depth, False), [anywhere], grad), None, None
    num_codes = ctx.codebooks_shape[-2]
    # A bad code gets here with check=False only; its row is NaN, and no code contributed to it.
    codes = codes.masked_fill((codes < 0) | (codes >= num_codes), -1)
    # A row's gradient goes to each of its codes: it is read D times and never copied.
    codes = codes[..., : ctx.depth]
    grad = grad.float().contiguous().unsqueeze(-2).expand(*codes.shape, -1)
    by_depth = len(ctx.codebooks_shape) == 3
    total = statistics(_OP, grad, codes, num_codes, by_depth=by_depth)[1]
    if by_depth:
        total = torch.nn.functional.pad(total, (0, 0, 0, 0, 0, ctx.codebooks_shape[0] - ctx.depth))
    return None, total.to(ctx.codebooks_dtype), None, None


register_derivative("residual_decode", _plain, _setup_context, _backward)
