"""Counts and sums of vectors by code, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def code_statistics(x: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """`counts_k = #{n : k_n = k}` and `sums_k = sum of x_n over k_n = k`; code -1 counts nowhere.

    What an exponential-moving-average codebook needs (Lee et al. 2022, section 3.1). Sums run in float64 in
    row order and are rounded once. Naively `one_hot(codes).T @ x`.
    """
    if bool(((codes < -1) | (codes >= num_codes)).any()):
        raise IndexError(f"codes must be in [-1, {num_codes})")
    codes_n, x_nc = codes.reshape(-1), x.detach().reshape(-1, x.shape[-1])
    valid = codes_n >= 0
    counts = torch.bincount(codes_n[valid], minlength=num_codes).float()
    sums = torch.zeros(num_codes, x.shape[-1], dtype=torch.float64, device=x.device)
    for n in valid.nonzero().squeeze(-1).tolist():
        sums[codes_n[n]] += x_nc[n].double()
    return counts, sums.float()
