"""Counts and sums of vectors by code, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_PER_PIECE = 1024


def code_statistics(x: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """`counts_k = #{n : k_n = k}` and `sums_k = sum of x_n over k_n = k`; code -1 counts nowhere.

    What an exponential-moving-average codebook needs (Lee et al. 2022, section 3.1). A code's rows are added in
    float64, in row order: every 1024 of them from zero, then these sums in their order, rounded once. (Long chains of
    additions can so be made side by side; they also collect less error.) Naively `one_hot(codes).T @ x`.
    """
    if bool(((codes < -1) | (codes >= num_codes)).any()):
        raise IndexError(f"codes must be in [-1, {num_codes})")
    codes_n, x_nc = codes.reshape(-1), x.detach().reshape(-1, x.shape[-1])
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
