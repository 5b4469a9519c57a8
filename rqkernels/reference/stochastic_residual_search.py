"""Codes drawn from the softmax of distances, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import OP_STOCHASTIC_RESIDUAL_SEARCH, inverse_cdf, philox_uniform
from .residual_search import ResidualCodes, choose_by_distances, residual_loop


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
    """Codes sampled at every depth: `k_d ~ Q_tau(. | r_{d-1})` (Lee et al. 2022, section 3.2.3).

    One uniform per choice, from `philox_uniform(row, stream=d)` with row = offset + flattened index of the
    row and d = 0 .. D-1, inverted in code order through the weights `exp(-(D_k - min D) / tau)`, where `D_k` are the
    float64 squared distances of `residual_search`. Shapes and the rest are `residual_search`'s.

    Args:
        tau: temperature > 0, in squared units of x. Infinity draws all codes alike.
        seed: 0 <= seed < 2^64.
        offset: 0 <= offset, offset + rows < 2^63: the counter of the first row.

    Raises:
        ValueError: tau <= 0 or NaN, a seed or an offset out of range, or what `residual_search` raises.
    """
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    if not 0 <= offset < 1 << 63:
        raise ValueError(f"offset must be in [0, 2^63), got {offset}")

    def sample(r_nc: Tensor, rows_n: Tensor, codebook_kc: Tensor, d: int) -> Tensor:
        uniform_n = philox_uniform(rows_n + offset, seed=seed, stream=d, op_id=OP_STOCHASTIC_RESIDUAL_SEARCH)

        def draw(squared_nk: Tensor, rows: slice) -> Tensor:
            # Differences first: where tau is tiny, the quotients of whole distances have no digits left.
            weights_nk = torch.exp(-(squared_nk - squared_nk.min(dim=-1, keepdim=True).values) / tau)
            return inverse_cdf(weights_nk, uniform_n[rows])

        return choose_by_distances(r_nc, codebook_kc, draw)

    result, residuals = residual_loop(x, codebooks, depth, sample)
    return result._replace(residuals=residuals if return_residuals else None)
