"""Counts and sums of vectors by code, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import (
    REFERENCE_DTYPES,
    check_device,
    check_elements,
    check_integer,
    check_tensor,
    is_below,
    shape_of,
    shapes_differ,
)

ROWS_PER_PIECE = 1024


def check_num_codes(op: str, num_codes: object) -> int:
    return check_integer(op, "num_codes", num_codes, 1, 40)


def check_shapes(op: str, x: Tensor, codes: Tensor) -> None:
    """Check shapes and devices with the messages of op.cpp."""
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be (..., C), got a scalar")
    check_elements(op, "x", x)
    if shapes_differ(codes.shape, x.shape[:-1]):
        raise ValueError(
            f"{op}: codes must have the shape of x without its last dimension; "
            f"x is {shape_of(x)}, codes are {shape_of(codes)}"
        )
    if is_below(x.shape[-1], 1):
        raise ValueError(f"{op}: x must have at least one channel, got {shape_of(x)}")
    check_device(op, "x", x, "codes", codes)


def code_statistics(x: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Compute `counts_k = #{n : k_n = k}` and `sums_k = sum of x_n over k_n = k`; rows with code -1 are skipped.

    The update of an exponential-moving-average codebook (Lee et al. 2022, section 3.1). The rows of a code are summed
    in float64, in row order, in pieces of 1024 that each start from zero; then the pieces are summed in order and
    rounded once. (So long sums can be computed in parallel, and with a smaller error.) Naively `one_hot(codes).T @ x`.
    """
    op = "code_statistics"
    check_tensor(op, "x", x, REFERENCE_DTYPES)
    check_tensor(op, "codes", codes, (torch.int64,))
    num_codes = check_num_codes(op, num_codes)
    check_shapes(op, x, codes)
    codes_n, x_nc = codes.reshape(-1), x.detach().reshape(-1, x.shape[-1])
    bad = ((codes_n < -1) | (codes_n >= num_codes)).nonzero()
    if len(bad) > 0:
        row = int(bad[0])
        raise IndexError(f"{op}: codes must be in [-1, {num_codes}), got {int(codes_n[row])} in row {row}")
    valid = codes_n >= 0
    counts = torch.bincount(codes_n[valid], minlength=num_codes).float()
    sums = torch.zeros(num_codes, x.shape[-1], dtype=torch.float64, device=x.device)
    for k in codes_n[valid].unique().tolist():
        for rows in (codes_n == k).nonzero().squeeze(-1).split(ROWS_PER_PIECE):
            piece = torch.zeros_like(sums[k])
            for row_c in x_nc[rows].double():
                piece += row_c
            sums[k] += piece
    return counts, sums.float()
