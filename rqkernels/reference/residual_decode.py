"""Sum of codes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def residual_decode(codes: Tensor, codebooks: Tensor, depth: int | None = None, *, check: bool = True) -> Tensor:
    """`sum_{d < depth} e_d(k_d)` in float32, in depth order from zero, cast once to the codebooks' dtype.

    Lee et al. 2022, equation (5). Naively `codebooks.float()[codes].sum(-2)`.
    """
    depth = codes.shape[-1] if depth is None else depth
    num_codes = codebooks.shape[-2]
    bad = (codes < 0) | (codes >= num_codes)
    if check and bool(bad[..., :depth].any()):
        raise IndexError(f"codes must be in [0, {num_codes})")
    total = torch.zeros(*codes.shape[:-1], codebooks.shape[-1], dtype=torch.float32, device=codes.device)
    for d in range(depth):
        codebook = codebooks if codebooks.dim() == 2 else codebooks[d]
        chosen = codebook.float()[codes[..., d].clamp(0, num_codes - 1)]
        total = total + chosen.masked_fill(bad[..., d, None], torch.nan)
    return total.to(codebooks.dtype)
