"""Soft labels from distances (Lee et al. 2022, section 3.2.3, equation 15), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def distance_softmax(x: Tensor, codebook: Tensor, tau: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """`Q_tau(k | x) = softmax_k(-|x - e(k)|^2 / tau)`. Paper, equation (15).

    Args:
        x: (..., C), any floating dtype.
        codebook: (K, C).
        tau: temperature > 0, in squared units of x.
        dtype: of the result; the arithmetic is float64 throughout.

    Returns:
        (..., K), rows summing to one. A row of x that is not finite gives NaN.
    """
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    # Centring on the mean code leaves distances alone and keeps the expanded square from cancelling.
    centre = codebook.detach().double().mean(dim=0)
    e_kc = codebook.detach().double() - centre
    x_c = x.detach().double() - centre
    squared = x_c.square().sum(-1, keepdim=True) - 2 * (x_c @ e_kc.T) + e_kc.square().sum(-1)
    return torch.softmax(-squared / tau, dim=-1).to(dtype)


def soft_label_cross_entropy(
    logits: Tensor,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of `logits` against Q_tau: per row `logsumexp(logits) - sum_k Q_tau(k|x) logits_k`.

    Args:
        logits: (..., K), or (..., D, K) where x is (..., D, C).
        x: (..., C) or (..., D, C): the residual each label is for.
        codebook: (K, C), or (D, K, C): one per depth.
        tau: temperature > 0.
        mask: bool, the shape of logits without K; False rows count nowhere.
        reduction: "mean" (over counted rows), "sum" or "none" (masked rows 0).

    Returns:
        float32 scalar, or the rows' losses. Differentiable in logits alone.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if logits.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"logits {tuple(logits.shape)} and x {tuple(x.shape)} must agree up to the last dimension")
    if codebook.dim() == 2:
        target = distance_softmax(x, codebook, tau)
    else:
        if x.shape[-2] != codebook.shape[0]:
            raise ValueError(f"x has {x.shape[-2]} depths, but there are {codebook.shape[0]} codebooks")
        per_depth = [distance_softmax(x[..., d, :], codebook[d], tau) for d in range(codebook.shape[0])]
        target = torch.stack(per_depth, dim=-2)
    if target.shape != logits.shape:
        raise ValueError(f"logits have {logits.shape[-1]} codes, the codebook has {codebook.shape[-2]}")
    logits = logits.float()
    # A logit of -inf with a label of zero is no loss, not NaN.
    weighted = torch.where(target > 0, target * logits, 0.0)
    loss = logits.logsumexp(dim=-1) - weighted.sum(dim=-1)
    if mask is not None:
        loss = loss.masked_fill(~mask, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (loss.numel() if mask is None else mask.sum())
