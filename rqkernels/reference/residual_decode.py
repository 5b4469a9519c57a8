"""Sum of codes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import (
    REFERENCE_DTYPES,
    check_device,
    check_elements,
    check_flag,
    check_integer,
    check_tensor,
    is_below,
    shape_of,
)


def check_depth(op: str, depth: object) -> int | None:
    """Check the type. The range depends on the codes (`check_shapes`); here the value is cut to 64 bits."""
    if depth is None:
        return None
    return max(check_integer(op, "depth", depth, None, 63, or_none=True), -(1 << 63))


def check_shapes(op: str, codes: Tensor, codebooks: Tensor, depth: int | None) -> int:
    """Check shapes, depth and devices with the messages of op.cpp; return the depth."""
    if codes.dim() < 1:
        raise ValueError(f"{op}: codes must be (..., D), got a scalar")
    check_elements(op, "codes", codes)
    check_elements(op, "codebooks", codebooks)
    if codebooks.dim() not in (2, 3):
        raise ValueError(
            f"{op}: codebooks must be (K, C), shared by all depths, or (D, K, C), one per depth; "
            f"got {shape_of(codebooks)}"
        )
    if any(is_below(size, 1) for size in codebooks.shape):
        raise ValueError(f"{op}: codebooks must not be empty, got {shape_of(codebooks)}")
    available = codes.shape[-1]
    if is_below(available, 1):
        raise ValueError(f"{op}: codes must have at least one depth, got {shape_of(codes)}")
    if codebooks.dim() == 3 and isinstance(available, int) and is_below(codebooks.shape[0], available):
        raise ValueError(
            f"{op}: codes {shape_of(codes)} have {available} depths, codebooks {shape_of(codebooks)} "
            f"only {codebooks.shape[0]}"
        )
    if depth is not None and isinstance(available, int) and not 1 <= depth <= available:
        raise ValueError(f"{op}: depth must be in [1, {available}], got {depth}")
    check_device(op, "codes", codes, "codebooks", codebooks)
    return available if depth is None else depth


def residual_decode(codes: Tensor, codebooks: Tensor, depth: int | None = None, *, check: bool = True) -> Tensor:
    """Compute `sum_{d < depth} e_d(k_d)` in float32, in depth order from zero, cast once to the codebooks' dtype.

    Lee et al. 2022, equation (5). Naively `codebooks.float()[codes].sum(-2)`.
    """
    op = "residual_decode"
    check_tensor(op, "codes", codes, (torch.int64,))
    check_tensor(op, "codebooks", codebooks, REFERENCE_DTYPES)
    depth, check = check_depth(op, depth), check_flag(op, "check", check)
    depth = check_shapes(op, codes, codebooks, depth)
    num_codes = codebooks.shape[-2]
    bad = ((codes < 0) | (codes >= num_codes))[..., :depth]
    if check and bool(bad.any()):
        row, d = bad.reshape(-1, depth).nonzero()[0].tolist()
        code = int(codes.reshape(-1, codes.shape[-1])[row, d])
        raise IndexError(f"{op}: codes must be in [0, {num_codes}), got {code} in row {row}, depth {d}")
    total = torch.zeros(*codes.shape[:-1], codebooks.shape[-1], dtype=torch.float32, device=codes.device)
    for d in range(depth):
        codebook = codebooks if codebooks.dim() == 2 else codebooks[d]
        chosen = codebook.float()[codes[..., d].clamp(0, num_codes - 1)]
        total = total + chosen.masked_fill(bad[..., d, None], torch.nan)
    return total.to(codebooks.dtype)
