"""Residual search that samples its codes."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import FLOAT_DTYPES, check_flag, check_rows_from, signed_seed
from .._library import call, check_tensor
from ..reference.residual_search import ResidualCodes
from ..reference.stochastic_residual_search import check_settings
from .residual_search import PackedCodebook, fake_codes

_OP = "stochastic_residual_search"


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
    """Sample a code by distance at every depth, all depths in one call (Lee et al. 2022, section 3.2.3, eq. 15).

        r_0 = x;   k_d ~ Q_tau(. | r_{d-1});   r_d = r_{d-1} - e_d(k_d)
        Q_tau(k | r) = softmax_k(-|r - e_d(k)|^2 / tau)

    Naively, for each depth: `k = torch.multinomial((-torch.cdist(r, e).square() / tau).softmax(-1), 1); r = r - e[k]`.
    Here no array of rows x codes is ever formed (on a CPU a thread holds the scores of at most 32 rows), and each
    choice takes one counter-based uniform u: Philox4x32-10 with key `seed` and counter (offset + flattened index of the
    row, depth, 1). The code is the first, in code order, whose cumulative weight exceeds u times the total. A sample is
    a function of (seed, row, depth) and the row's values alone: the same for every batch size, position in the batch
    and thread count, and independent between rows, depths and seeds.

    The weights are those of float64 (`rqkernels.reference.stochastic_residual_search` is the definition in plain
    PyTorch), with one exception: on a CPU, if the mass of a row is spread over many codes (more than 32 + K/64 within
    40 tau of the nearest), they may have float32 rounding, at most a relative 2^-10 by its bound and some 1e-6 in
    practice. Devices and instruction sets agree unless u is that close to a boundary between two codes.

    tau -> 0 gives the codes of `residual_search`, except that codes at equal distances share their mass.

    Not differentiable: inputs are detached. Autocast does not affect it.

    Args:
        x: (..., C), float32, float16 or bfloat16, any strides, on cpu or cuda. Searched as float32.
        codebooks: (K, C), shared by all depths, or (D, K, C), one per depth; float32, float16 or bfloat16 (need not
            be the dtype of x).
        depth: D. Required with a shared codebook; otherwise None or the number of codebooks.
        tau: temperature > 0, in squared units of x. Infinity samples all codes uniformly.
        seed: 0 <= seed < 2^64.
        offset: index of the first row, >= 0: with it a part of a batch samples the same codes as within the batch.
        return_residuals: also return r_0 .. r_{D-1}, from which the soft labels of these codes are computed.

    Returns:
        `ResidualCodes`, as `residual_search` returns it; statistics None. A row that is not finite gets code -1 at
        every depth, NaN quantized and NaN norms; a row whose residual overflows float32 from that depth on.

    Raises:
        TypeError: x or codebooks of another dtype (float64 among them) or not a tensor (a `PackedCodebook` among them:
            pass its `.codebook`), depth, seed or offset not an integer, tau not a number, return_residuals not a bool.
        ValueError: shapes or devices that do not match, an empty codebook, a depth that contradicts the codebooks, tau
            <= 0 or NaN, a seed or an offset out of range; on a CPU a codebook that is not finite (on CUDA its bad codes
            are never sampled).
    """
    check_tensor(_OP, "x", x, FLOAT_DTYPES)
    if isinstance(codebooks, PackedCodebook):
        raise TypeError(f"{_OP}: codebooks must be a torch.Tensor, got PackedCodebook; pass its .codebook")
    check_tensor(_OP, "codebooks", codebooks, FLOAT_DTYPES)
    depth, tau, seed, offset = check_settings(_OP, depth, tau, seed, offset)
    return_residuals = check_flag(_OP, "return_residuals", return_residuals)
    codes, quantized, residual_sq_norms, residuals = call(
        _OP,
        torch.ops.rqkernels.stochastic_residual_search,
        x.detach(),
        codebooks.detach(),
        depth,
        tau,
        signed_seed(seed),
        offset,
        return_residuals,
    )
    return ResidualCodes(codes, quantized, residual_sq_norms, residuals if return_residuals else None, None)


@torch.library.register_fake("rqkernels::stochastic_residual_search")
def _fake(
    x: Tensor, codebooks: Tensor, depth: int | None, tau: float, seed: int, offset: int, return_residuals: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = fake_codes(_OP, x, codebooks, depth, return_residuals)
    rows = x.shape[:-1].numel()
    if isinstance(rows, int) and isinstance(offset, int):
        check_rows_from(_OP, offset, rows)
    return codes
