"""Sampling of codes from the softmax of distances, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import (
    REFERENCE_DTYPES,
    check_counter,
    check_depth,
    check_flag,
    check_positive,
    check_rows_from,
    check_tensor,
)
from .philox import OP_STOCHASTIC_RESIDUAL_SEARCH, inverse_cdf, philox_uniform
from .residual_search import PackedCodebook, ResidualCodes, check_shapes, choose_by_distances, residual_loop

_OP = "stochastic_residual_search"


def check_settings(
    op: str, depth: object, tau: object, seed: object, offset: object
) -> tuple[int | None, float, int, int]:
    return (
        check_depth(op, depth),
        check_positive(op, "tau", tau),
        check_counter(op, "seed", seed, 64),
        check_counter(op, "offset", offset, 63),
    )


def stochastic_residual_search(
    x: Tensor,
    codebooks: Tensor,
    depth: int | None = None,
    *,
    tau: float,
    seed: int,
    offset: int = 0,
    return_residuals: bool = False,
) -> ResidualCodes:
    """Sample a code at every depth: `k_d ~ Q_tau(. | r_{d-1})` (Lee et al. 2022, section 3.2.3).

    One uniform per choice, from `philox_uniform(row, stream=d)` with row = offset + flattened index of the
    row and d = 0 .. D-1, inverted in code order through the weights `exp(-(D_k - min D) / tau)`, where `D_k` are the
    float64 squared distances of `residual_search`. Shapes and results are those of `residual_search`.

    Args:
        tau: temperature > 0, in squared units of x. Infinity samples all codes uniformly.
        seed: 0 <= seed < 2^64.
        offset: 0 <= offset, offset + rows < 2^63: the counter of the first row.

    Raises:
        ValueError: tau <= 0 or NaN, a seed or an offset out of range, or what `residual_search` raises.
    """
    check_tensor(_OP, "x", x, REFERENCE_DTYPES)
    if isinstance(codebooks, PackedCodebook):
        raise TypeError(f"{_OP}: codebooks must be a torch.Tensor, got PackedCodebook; pass its .codebook")
    check_tensor(_OP, "codebooks", codebooks, REFERENCE_DTYPES)
    depth, tau, seed, offset = check_settings(_OP, depth, tau, seed, offset)
    return_residuals = check_flag(_OP, "return_residuals", return_residuals)
    depth = check_shapes(_OP, x, codebooks, depth)
    check_rows_from(_OP, offset, x.shape[:-1].numel())

    def sample(r_nc: Tensor, rows_n: Tensor, codebook_kc: Tensor, d: int) -> Tensor:
        uniform_n = philox_uniform(rows_n + offset, seed=seed, stream=d, op_id=OP_STOCHASTIC_RESIDUAL_SEARCH)

        def choose(squared_nk: Tensor, rows: slice) -> Tensor:
            # Differences before the division: for a tiny tau, quotients of whole distances would have no digits left.
            weights_nk = torch.exp(-(squared_nk - squared_nk.min(dim=-1, keepdim=True).values) / tau)
            return inverse_cdf(weights_nk, uniform_n[rows])

        return choose_by_distances(r_nc, codebook_kc, choose)

    result, residuals = residual_loop(_OP, x, codebooks, depth, sample)
    return result._replace(residuals=residuals if return_residuals else None)
