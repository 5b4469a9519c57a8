"""Counts and sums of vectors by code."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import FLOAT_DTYPES
from .._library import call, check_tensor
from ..reference.code_statistics import check_num_codes, check_shapes

_OP = "code_statistics"


def code_statistics(x: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Count the vectors assigned to each code and sum them, as the update of a moving-average codebook needs it.

        counts_k = #{n : k_n = k}        sums_k = sum of x_n over k_n = k

    Naively `one_hot(codes).T.float() @ x`, with a one-hot of rows x codes; here it is a scatter. The rows of a code are
    summed in float64 in row order, in pieces of 1024 that each start from zero; then the pieces are summed in order and
    rounded once. The result does not depend on threads or device. (Lee et al. 2022, section 3.1: the codebook is the
    exponential moving average of these sums over these counts.)

    Neither x nor codes is copied if x is float32, its channels are contiguous, and its other dimensions can be walked
    with at most two strides. In addition to the results, a CPU needs 8 bytes per row and 16 per code, or at most 3 MiB
    per thread if there are few codes; CUDA needs 16 bytes per row, 4 per code, 1/256 of x, and 1 MiB.

    Not differentiable: x is detached.

    Args:
        x: (..., C), float32, float16 or bfloat16.
        codes: int64 (...): the shape of x without its last dimension. Rows with code -1 are skipped.
        num_codes: 1 <= K < 2^40.

    Returns:
        counts float32 (K,), exact up to 2^24 per code; sums float32 (K, C).

    Raises:
        TypeError: a wrong dtype, num_codes not an integer.
        ValueError: shapes or devices that do not match, num_codes out of range.
        IndexError: on a CPU, a code outside [-1, K). On CUDA such a code makes all counts and sums NaN instead, because
            raising would require a host-device sync.
    """
    check_tensor(_OP, "x", x, FLOAT_DTYPES)
    check_tensor(_OP, "codes", codes, (torch.int64,))
    num_codes = check_num_codes(_OP, num_codes)
    return call(_OP, torch.ops.rqkernels.code_statistics, x.detach(), codes, num_codes)


def statistics(op: str, x: Tensor, codes: Tensor, num_codes: int, *, by_depth: bool) -> tuple[Tensor, Tensor]:
    """Call `code_statistics` in the name of another operator, with checked arguments.

    With `by_depth`, x (..., D, C) and codes (..., D) give separate statistics per depth, (D, K) and (D, K, C), in one
    call.
    """
    return call(op, torch.ops.rqkernels.code_statistics, x, codes, num_codes, by_depth)


@torch.library.register_fake("rqkernels::code_statistics")
def _fake(x: Tensor, codes: Tensor, num_codes: int, by_depth: bool = False) -> tuple[Tensor, Tensor]:
    check_shapes(_OP, x, codes)
    leading = (codes.shape[-1], num_codes) if by_depth else (num_codes,)
    return (
        x.new_empty(leading, dtype=torch.float32),
        x.new_empty((*leading, x.shape[-1]), dtype=torch.float32),
    )
