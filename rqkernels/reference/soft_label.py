"""Soft labels from distances (Lee et al. 2022, section 3.2.3, equation 15), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def distance_softmax(x: Tensor, codebook: Tensor, tau: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """`Q_tau(k | x) = softmax_k(-|x - e(k)|^2 / tau)`. Paper, equation (15).

    Args:
        x: (..., C), any floating dtype.
        codebook: (K, C), or (D, K, C): one per depth of x (..., D, C).
        tau: temperature > 0, in squared units of x.
        dtype: of the result; the arithmetic is float64 throughout.

    Returns:
        (..., K), rows summing to one. A row of x that is not finite gives NaN.
    """
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    if codebook.dim() == 3:
        if x.dim() < 2 or x.shape[-2] != codebook.shape[0]:
            raise ValueError(f"x must be (..., {codebook.shape[0]}, C) for as many codebooks, got {tuple(x.shape)}")
        per_depth = [distance_softmax(x[..., d, :], codebook[d], tau, dtype=dtype) for d in range(codebook.shape[0])]
        return torch.stack(per_depth, dim=-2)
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
        float32 scalar (float64 for float64 logits), or the rows' losses. Differentiable in logits alone.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if logits.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"logits {tuple(logits.shape)} and x {tuple(x.shape)} must agree up to the last dimension")
    # float64 logits get all of float64: the truth that kernels are measured by.
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    target = distance_softmax(x, codebook, tau, dtype=dtype)
    if target.shape != logits.shape:
        raise ValueError(f"logits have {logits.shape[-1]} codes, the codebook has {codebook.shape[-2]}")
    logits = logits.to(dtype)
    # A logit of -inf with a label of zero is no loss, not NaN.
    weighted = torch.where(target > 0, target * logits, 0.0)
    loss = logits.logsumexp(dim=-1) - weighted.sum(dim=-1)
    if mask is not None:
        loss = torch.where(mask, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (loss.numel() if mask is None else mask.sum())


def fused_linear_soft_label_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`soft_label_cross_entropy` of the logits `hidden @ weight.T + bias`. Differentiable in those three.

    Args:
        hidden: (..., H), or (..., D, H) where x is (..., D, C).
        weight: (K, H).
        bias: (K), or None.
        x, codebook, tau, mask, reduction: as in `soft_label_cross_entropy`.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return soft_label_cross_entropy(logits, x, codebook, tau, mask=mask, reduction=reduction)
