"""Residual nearest-code search, in plain PyTorch: the definition of certified codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import (
    REFERENCE_DTYPES,
    check_depth,
    check_device,
    check_elements,
    check_finite,
    check_flag,
    check_tensor,
    differ,
    is_below,
    shape_of,
)

_LANES = 8
# Rows are processed in chunks whose float64 temporaries have about this many elements.
_CHUNK_ELEMENTS = 1 << 23


class ResidualCodes(NamedTuple):
    """Result of a residual search. `...` is the leading shape of `x`."""

    codes: Tensor
    """int64 (..., D); -1 where the residual is not finite."""
    quantized: Tensor
    """(..., C) in the dtype of x: float32 sum of the chosen codes in depth order from zero, cast once."""
    residual_sq_norms: Tensor
    """float32 (..., D): |r_d|^2 after each depth."""
    residuals: Tensor | None
    """float32 (..., D, C): r_0 .. r_{D-1}, the residual that each depth quantizes; None unless requested."""
    statistics: tuple[Tensor, Tensor] | None
    """(counts, sums) of the residuals by code, see `code_statistics`; None unless requested.
    Shared codebook: (K,), (K, C), over all depths together. One per depth: (D, K), (D, K, C)."""


class PackedCodebook:
    """A copy of a shared codebook (K, C), in float32."""

    def __init__(self, codebook: Tensor) -> None:
        check_tensor("PackedCodebook", "codebook", codebook, REFERENCE_DTYPES)
        check_packable("PackedCodebook", codebook)
        check_finite("PackedCodebook", "codebook", codebook)
        self.codebook = codebook.detach().float().clone()


def check_packable(op: str, codebook: Tensor) -> None:
    if codebook.device.type == "meta":
        raise ValueError(f"{op}: codebook must be on cpu or cuda, got meta")
    check_elements(op, "codebook", codebook)
    if codebook.dim() != 2 or codebook.numel() == 0:
        raise ValueError(f"{op}: codebook must be (K, C), not empty, got {tuple(codebook.shape)}")


def check_shapes(op: str, x: Tensor, codebooks: Tensor, depth: int | None) -> int:
    """Check shapes, depth and devices with the messages of op.cpp; return the depth."""
    if codebooks.dim() not in (2, 3):
        raise ValueError(
            f"{op}: codebooks must be (K, C), shared by all depths, or (D, K, C), one per depth; "
            f"got {shape_of(codebooks)}"
        )
    if codebooks.dim() == 3:
        if depth is not None and differ(depth, codebooks.shape[0]):
            raise ValueError(
                f"{op}: depth is {depth}, but codebooks {shape_of(codebooks)} hold {codebooks.shape[0]} depths; "
                "leave depth out or slice the codebooks"
            )
        depth = codebooks.shape[0]
    elif depth is None:
        raise ValueError(f"{op}: depth is required with a shared codebook (K, C)")
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be (..., C), got a scalar")
    check_elements(op, "x", x)
    check_elements(op, "codebooks", codebooks)
    channels = x.shape[-1]
    if differ(codebooks.shape[-1], channels):
        raise ValueError(
            f"{op}: x {shape_of(x)} has {channels} channels, codebooks {shape_of(codebooks)} have {codebooks.shape[-1]}"
        )
    if any(is_below(size, 1) for size in codebooks.shape):
        raise ValueError(f"{op}: codebooks must not be empty, got {shape_of(codebooks)}")
    if isinstance(codebooks.shape[-2], int) and codebooks.shape[-2] >= 1 << 31:
        raise ValueError(f"{op}: codebooks may hold at most 2^31 - 1 codes, got {shape_of(codebooks)}")
    check_device(op, "x", x, "codebooks", codebooks)
    return depth


def lane_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension in the fixed order that all kernels use.

    Eight lanes: lane j adds the terms j, j + 8, j + 16, ... in order, from zero; then the lanes are reduced pairwise:
    (0+4, 1+5, 2+6, 3+7), (0+2, 1+3), (0+1). A missing term is zero.
    """
    missing = -terms.shape[-1] % _LANES
    terms = torch.nn.functional.pad(terms, (0, missing))
    lanes = torch.zeros(*terms.shape[:-1], _LANES, dtype=terms.dtype, device=terms.device)
    for start in range(0, terms.shape[-1], _LANES):
        lanes = lanes + terms[..., start : start + _LANES]
    for half in (4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes[..., 0]


def choose_by_distances(r_nc: Tensor, codebook_kc: Tensor, choose: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Apply `choose(squared, rows) -> codes` to chunks of rows; returns codes (n,) of residuals (n, C), codes (K, C).

    `squared` are the float64 squared distances to all codes, by the definition.
    """
    size = max(1, _CHUNK_ELEMENTS // max(1, codebook_kc.numel()))
    e_kc = codebook_kc.double()
    codes = [
        choose(lane_sum((r_nc[rows].double()[:, None, :] - e_kc) ** 2), rows)
        for rows in (slice(first, first + size) for first in range(0, r_nc.shape[0], size))
    ]
    return torch.cat(codes) if codes else r_nc.new_zeros(0, dtype=torch.int64)


def _nearest(r_nc: Tensor, codebook_kc: Tensor) -> Tensor:
    """Return the lowest index among the codes with the smallest float64 squared distance. (n, C), (K, C) -> (n,)."""
    # argmin returns the first index of equal values.
    return choose_by_distances(r_nc, codebook_kc, lambda squared, rows: squared.argmin(dim=-1))


def _codebook_at(codebooks: Tensor, d: int) -> Tensor:
    return codebooks if codebooks.dim() == 2 else codebooks[d]


def residual_loop(
    op: str, x: Tensor, codebooks: Tensor, depth: int, choose: Callable[[Tensor, Tensor, Tensor, int], Tensor]
) -> tuple[ResidualCodes, Tensor]:
    """Run the residual loop, paper equations (3)-(5). `choose(r_nc, rows_n, codebook_kc, d) -> codes_n` picks k_d."""
    check_finite(op, "codebooks", codebooks)
    leading, channels = x.shape[:-1], x.shape[-1]
    residual = x.detach().reshape(-1, channels).float().clone()
    n = residual.shape[0]
    quantized = torch.zeros_like(residual)
    codes, norms, residuals = [], [], []
    for d in range(depth):
        codebook = _codebook_at(codebooks.detach(), d).float()
        residuals.append(residual)
        rows = torch.isfinite(residual).all(dim=-1).nonzero().squeeze(-1)
        code = torch.full((n,), -1, dtype=torch.int64, device=x.device)
        code[rows] = choose(residual[rows], rows, codebook, d)
        chosen = torch.full_like(residual, torch.nan)
        chosen[rows] = codebook[code[rows]]
        residual = residual - chosen
        quantized = quantized + chosen
        codes.append(code)
        norms.append(lane_sum(residual.double() ** 2).float())
    all_residuals = torch.stack(residuals, dim=1)
    result = ResidualCodes(
        codes=torch.stack(codes, dim=-1).reshape(*leading, depth),
        quantized=quantized.to(x.dtype).reshape(x.shape),
        residual_sq_norms=torch.stack(norms, dim=-1).reshape(*leading, depth),
        residuals=None,
        statistics=None,
    )
    return result, all_residuals.reshape(*leading, depth, channels)


def residual_search(
    x: Tensor,
    codebooks: Tensor | PackedCodebook,
    depth: int | None = None,
    *,
    return_residuals: bool = False,
    return_statistics: bool = False,
) -> ResidualCodes:
    """Find the nearest codes of successive residuals (Lee et al. 2022, equations 3-5), by the definition.

    `r_0 = float32(x)`; `k_d` = the lowest index among the codes with the smallest float64 sum over c of
    `(r_{d-1,c} - e_{k,c})^2`, summed in the order of `lane_sum`; `r_d = r_{d-1} - e_{k_d}` in float32.
    """
    from .code_statistics import code_statistics

    op = "residual_search"
    check_tensor(op, "x", x, REFERENCE_DTYPES)
    if isinstance(codebooks, PackedCodebook):
        codebooks = codebooks.codebook
    check_tensor(op, "codebooks", codebooks, REFERENCE_DTYPES)
    depth = check_depth(op, depth)
    return_residuals = check_flag(op, "return_residuals", return_residuals)
    return_statistics = check_flag(op, "return_statistics", return_statistics)
    depth = check_shapes(op, x, codebooks, depth)
    result, residuals = residual_loop(op, x, codebooks, depth, lambda r, rows, codebook, d: _nearest(r, codebook))
    statistics = None
    if return_statistics:
        num_codes = codebooks.shape[-2]
        if codebooks.dim() == 2:
            statistics = code_statistics(residuals, result.codes, num_codes)
        else:
            per_depth = [
                code_statistics(residuals[..., d, :], result.codes[..., d], num_codes)
                for d in range(codebooks.shape[0])
            ]
            statistics = (torch.stack([c for c, _ in per_depth]), torch.stack([s for _, s in per_depth]))
    return result._replace(residuals=residuals if return_residuals else None, statistics=statistics)
