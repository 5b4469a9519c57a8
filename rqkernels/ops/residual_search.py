"""Residual nearest-code search."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import FLOAT_DTYPES, check_depth, check_tensor
from ..reference.residual_search import ResidualCodes
from .code_statistics import code_statistics


def residual_search(
    x: Tensor,
    codebooks: Tensor,
    depth: int | None = None,
    *,
    return_residuals: bool = False,
    return_statistics: bool = False,
) -> ResidualCodes:
    """Nearest codes of successive residuals, all depths in one call (Lee et al. 2022, equations 3-5).

        r_0 = x;   k_d = argmin_k |r_{d-1} - e_d(k)|^2;   r_d = r_{d-1} - e_d(k_d)

    Naively, for each depth: `k = torch.cdist(r, e).argmin(-1); r = r - e[k]`. Here no array of rows x codes is ever
    formed, and the codes are certified: for every finite row, `k_d` has the smallest float64 sum of
    `(float64(r_c) - float64(e_c))^2` on the values as given, the lowest index where sums are equal, and `r_d` is
    subtracted in float32. So they are the same on every device, instruction set, thread count, batch size and position
    in the batch. `rqkernels.reference.residual_search` is the definition in plain PyTorch.

    Not differentiable: inputs are taken detached (the straight-through gradient is a model's matter). Autocast does not
    touch it.

    Args:
        x: (..., C), float32, float16 or bfloat16, any strides, on cpu or cuda. Searched as float32.
        codebooks: (K, C), shared by all depths, or (D, K, C), one per depth; float32, float16 or bfloat16 (need not
            be the dtype of x).
        depth: D. Required with a shared codebook; otherwise None or the number of codebooks.
        return_residuals: also return r_0 .. r_{D-1}.
        return_statistics: also return counts and sums of the residuals by code (see `code_statistics`): over all
            depths together for a shared codebook, stacked by depth for one per depth.

    Returns:
        `ResidualCodes`: codes int64 (..., D); quantized (..., C) in the dtype of x, the float32 sum of the chosen codes
        in depth order, cast once; residual_norms float32 (..., D), |r_d|^2 after each depth; residuals float32
        (..., D, C) or None; statistics or None.

        A row that is not finite gets code -1 at every depth, NaN quantized and NaN norms. A row whose residual
        overflows float32 gets -1 from that depth on (and NaN quantized).

    Raises:
        TypeError: x or codebooks of another dtype (float64 among them), depth not an integer.
        ValueError: shapes or devices that do not fit, an empty codebook, a depth that contradicts the codebooks; on a
            CPU a codebook that is not finite (on CUDA its bad codes are never chosen).
    """
    check_tensor("residual_search", "x", x, FLOAT_DTYPES)
    check_tensor("residual_search", "codebooks", codebooks, FLOAT_DTYPES)
    check_depth("residual_search", depth)
    codes, quantized, residual_norms, residuals = torch.ops.rqkernels.residual_search(
        x.detach(), codebooks.detach(), depth, return_residuals or return_statistics
    )
    statistics = None
    if return_statistics:
        num_codes = codebooks.shape[-2]
        if codebooks.dim() == 2:
            statistics = code_statistics(residuals, codes, num_codes)
        else:
            per_depth = [
                code_statistics(residuals[..., d, :], codes[..., d], num_codes) for d in range(codebooks.shape[0])
            ]
            statistics = (torch.stack([c for c, _ in per_depth]), torch.stack([s for _, s in per_depth]))
    return ResidualCodes(codes, quantized, residual_norms, residuals if return_residuals else None, statistics)


@torch.library.register_fake("rqkernels::residual_search")
def _fake(
    x: Tensor, codebooks: Tensor, depth: int | None, return_residuals: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if codebooks.dim() == 3:
        depth = codebooks.shape[0]
    leading, channels = x.shape[:-1], x.shape[-1]
    return (
        x.new_empty((*leading, depth), dtype=torch.int64),
        x.new_empty(x.shape),
        x.new_empty((*leading, depth), dtype=torch.float32),
        x.new_empty((*leading, depth, channels) if return_residuals else (0,), dtype=torch.float32),
    )
