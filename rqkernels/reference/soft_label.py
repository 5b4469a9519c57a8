"""Soft labels from distances (Lee et al. 2022, section 3.2.3, equation 15), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import (
    REFERENCE_DTYPES,
    check_choice,
    check_device,
    check_elements,
    check_finite,
    check_flag,
    check_positive,
    check_tensor,
    check_writable,
    differ,
    is_apart,
    is_below,
    may_overlap,
    shape_of,
    shapes_differ,
)

REDUCTIONS = ("mean", "sum", "none")


def check_labels(op: str, x: Tensor, codebook: Tensor) -> None:
    """Check x and codebook with the messages of op.cpp."""
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be (..., C), got a scalar")
    check_elements(op, "x", x)
    check_elements(op, "codebook", codebook)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"{op}: codebook must be (K, C), or (D, K, C) for x (..., D, C); got {shape_of(codebook)}")
    if any(is_below(size, 1) for size in codebook.shape):
        raise ValueError(f"{op}: codebook must not be empty, got {shape_of(codebook)}")
    channels, codebook_channels = x.shape[-1], codebook.shape[-1]
    if differ(channels, codebook_channels):
        raise ValueError(
            f"{op}: x {shape_of(x)} has {channels} channels, codebook {shape_of(codebook)} has {codebook_channels}"
        )
    if codebook.dim() == 3 and (x.dim() < 2 or differ(x.shape[-2], codebook.shape[0])):
        raise ValueError(
            f"{op}: x must be (..., D, C) for codebook {shape_of(codebook)} with D = {codebook.shape[0]}, "
            f"got {shape_of(x)}"
        )
    if isinstance(codebook.shape[-2], int) and codebook.shape[-2] >= 1 << 31:
        raise ValueError(f"{op}: codebook may hold at most 2^31 - 1 codes, got {shape_of(codebook)}")
    check_device(op, "x", x, "codebook", codebook)


def check_logits(op: str, logits: Tensor, x: Tensor, codebook: Tensor, mask: Tensor | None) -> None:
    """Check logits and mask with the messages of op.cpp."""
    if logits.dim() < 1 or shapes_differ(logits.shape[:-1], x.shape[:-1]):
        raise ValueError(f"{op}: logits {shape_of(logits)} and x {shape_of(x)} must agree up to the last dimension")
    if differ(logits.shape[-1], codebook.shape[-2]):
        raise ValueError(f"{op}: logits have {logits.shape[-1]} codes, the codebook has {codebook.shape[-2]}")
    check_elements(op, "logits", logits)
    check_device(op, "logits", logits, "x", x)
    check_mask(op, "logits", logits, x, mask)


def check_mask(op: str, name: str, other: Tensor, x: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    check_device(op, name, other, "mask", mask)
    if shapes_differ(mask.shape, x.shape[:-1]):
        raise ValueError(
            f"{op}: mask must be bool of the shape of {name} without {'K' if name == 'logits' else 'H'}, "
            f"{shape_of(other)}; got {shape_of(mask)}"
        )


def check_linear(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, codebook: Tensor) -> None:
    """Check the shapes and devices of a classifier and its input."""
    if hidden.dim() < 1 or shapes_differ(hidden.shape[:-1], x.shape[:-1]):
        raise ValueError(
            f"{op}: hidden {tuple(hidden.shape)} and x {tuple(x.shape)} must agree up to the last dimension"
        )
    check_elements(op, "hidden", hidden)
    check_elements(op, "weight", weight)
    if weight.dim() != 2 or differ(weight.shape[1], hidden.shape[-1]):
        raise ValueError(f"{op}: weight must be (K, {hidden.shape[-1]}) for this hidden, got {tuple(weight.shape)}")
    if bias is not None and shapes_differ(bias.shape, weight.shape[:1]):
        raise ValueError(f"{op}: bias must be ({weight.shape[0]},) for this weight, got {tuple(bias.shape)}")
    if differ(weight.shape[0], codebook.shape[-2]):
        raise ValueError(f"{op}: weight has {weight.shape[0]} codes, the codebook has {codebook.shape[-2]}")
    check_device(op, "hidden", hidden, "x", x)
    check_device(op, "hidden", hidden, "weight", weight)
    if bias is not None:
        check_device(op, "hidden", hidden, "bias", bias)


def check_losses_out(op: str, losses_out: Tensor | None, x: Tensor, **others: Tensor | None) -> None:
    """Check the output for the rows' losses: it must have memory of its own and not require a gradient."""
    if losses_out is None:
        return
    check_tensor(op, "losses_out", losses_out, (torch.float32,))
    if shapes_differ(losses_out.shape, x.shape[:-1]) or losses_out.device != x.device:
        raise ValueError(
            f"{op}: losses_out must be {tuple(x.shape[:-1])} on {x.device}, "
            f"got {tuple(losses_out.shape)} on {losses_out.device}"
        )
    if losses_out.requires_grad:
        raise ValueError(f"{op}: losses_out must not require a gradient: none goes through it")
    check_writable(op, "losses_out", losses_out)
    if torch.compiler.is_compiling():
        return  # traced tensors have no memory
    if not is_apart(losses_out):
        raise ValueError(f"{op}: losses_out must have memory for each row, got strides {losses_out.stride()}")
    for name, other in {"x": x, **others}.items():
        if other is not None and may_overlap(losses_out, other):
            raise ValueError(f"{op}: losses_out must not share memory with {name}")


def check_inplace(op: str, logits: Tensor) -> None:
    """Check logits that their gradient will overwrite."""
    if logits.is_leaf:
        raise ValueError(f"{op}: inplace would overwrite logits that are a leaf with requires_grad")
    check_writable(op, "logits", logits)
    if not torch.compiler.is_compiling() and not is_apart(logits):
        raise ValueError(
            f"{op}: inplace needs logits that share no memory with one another, got shape {shape_of(logits)} "
            "with a stride too small"
        )


def distance_softmax(x: Tensor, codebook: Tensor, tau: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Soft labels `Q_tau(k | x) = softmax_k(-|x - e(k)|^2 / tau)`. Paper, equation (15).

    Args:
        x: (..., C), any floating dtype.
        codebook: (K, C), or (D, K, C): one per depth of x (..., D, C).
        tau: temperature > 0, in squared units of x.
        dtype: of the result; the arithmetic is float64 throughout.

    Returns:
        (..., K), rows summing to one. A row of x that is not finite gives NaN.
    """
    op = "distance_softmax"
    tau = _check_call(op, x, codebook, tau)
    check_labels(op, x, codebook)
    return _labels(op, x, codebook, tau, dtype)


def _check_call(op: str, x: object, codebook: object, tau: object) -> float:
    check_tensor(op, "x", x, REFERENCE_DTYPES)
    check_tensor(op, "codebook", codebook, REFERENCE_DTYPES)
    return check_positive(op, "tau", tau)


def _labels(op: str, x: Tensor, codebook: Tensor, tau: float, dtype: torch.dtype) -> Tensor:
    if codebook.device.type == "cpu":  # elsewhere an error would require a host sync: the labels are NaN
        check_finite(op, "codebook", codebook)
    if codebook.dim() == 3:
        per_depth = [_softmax(x[..., d, :], codebook[d], tau, dtype) for d in range(codebook.shape[0])]
        return torch.stack(per_depth, dim=-2)
    return _softmax(x, codebook, tau, dtype)


def _softmax(x: Tensor, codebook: Tensor, tau: float, dtype: torch.dtype) -> Tensor:
    # Centering on the mean code keeps distances and avoids cancellation in the expanded square.
    center = codebook.detach().double().mean(dim=0)
    e_kc = codebook.detach().double() - center
    x_c = x.detach().double() - center
    squared = x_c.square().sum(-1, keepdim=True) - 2 * (x_c @ e_kc.T) + e_kc.square().sum(-1)
    # Differences before the division: for a tiny tau, quotients of whole distances would have no digits left, or be
    # infinite.
    return torch.softmax(-(squared - squared.amin(-1, keepdim=True)) / tau, dim=-1).to(dtype)


def soft_label_cross_entropy(
    logits: Tensor,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    losses_out: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of `logits` against Q_tau: per row `logsumexp(logits) - sum_k Q_tau(k|x) logits_k`.

    Args:
        logits: (..., K), or (..., D, K) if x is (..., D, C).
        x: (..., C) or (..., D, C): the residual of each label.
        codebook: (K, C), or (D, K, C): one per depth.
        tau: temperature > 0.
        mask: bool, the shape of logits without K; False rows are not counted and have no gradient.
        reduction: "mean" (over counted rows), "sum" or "none" (masked rows are 0).
        inplace: permission to overwrite the logits, which the reference does not use.
        losses_out: filled with the rows' losses.

    Returns:
        float32 scalar (float64 for float64 logits), or the rows' losses. Differentiable in logits only. A row with
        logits of NaN, +inf or only -inf, or x that is not finite, is NaN.
    """
    op = "soft_label_cross_entropy"
    check_tensor(op, "logits", logits, REFERENCE_DTYPES)
    tau = _check_call(op, x, codebook, tau)
    check_loss(op, mask, reduction)
    check_losses_out(op, losses_out, x, logits=logits, codebook=codebook, mask=mask)
    if check_flag(op, "inplace", inplace) and logits.requires_grad and torch.is_grad_enabled():
        check_inplace(op, logits)
    check_labels(op, x, codebook)
    check_logits(op, logits, x, codebook, mask)
    return _loss(op, logits, x, codebook, tau, mask, reduction, losses_out)


def check_loss(op: str, mask: object, reduction: object) -> None:
    if mask is not None:
        check_tensor(op, "mask", mask, (torch.bool,))
    check_choice(op, "reduction", reduction, REDUCTIONS)


def _loss(
    op: str,
    logits: Tensor,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    mask: Tensor | None,
    reduction: str,
    losses_out: Tensor | None,
) -> Tensor:
    # float64 logits are computed in float64: the truth that kernels are compared with.
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    target = _labels(op, x, codebook, tau, dtype)
    logits = logits.to(dtype)
    if mask is not None:
        # NaN in a masked row must not reach the gradient of that row either.
        logits = torch.where(mask.unsqueeze(-1), logits, 0.0)
        target = torch.where(mask.unsqueeze(-1), target, 0.0)
    # A logit of -inf with a label of zero adds zero, not NaN.
    weighted = torch.where(target == 0, 0.0, target * logits)
    loss = logits.logsumexp(dim=-1) - weighted.sum(dim=-1)
    if mask is not None:
        loss = torch.where(mask, loss, 0.0)
    if losses_out is not None:
        losses_out.copy_(loss.detach())
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
    losses_out: Tensor | None = None,
) -> Tensor:
    """`soft_label_cross_entropy` of the logits `hidden @ weight.T + bias`. Differentiable in hidden, weight and bias.

    Args:
        hidden: (..., H), or (..., D, H) if x is (..., D, C).
        weight: (K, H).
        bias: (K), or None.
        x, codebook, tau, mask, reduction, losses_out: as in `soft_label_cross_entropy`.
    """
    op = "fused_linear_soft_label_cross_entropy"
    check_tensor(op, "hidden", hidden, REFERENCE_DTYPES)
    check_tensor(op, "weight", weight, REFERENCE_DTYPES)
    if bias is not None:
        check_tensor(op, "bias", bias, REFERENCE_DTYPES)
    tau = _check_call(op, x, codebook, tau)
    check_loss(op, mask, reduction)
    check_losses_out(op, losses_out, x, hidden=hidden, weight=weight, bias=bias, codebook=codebook, mask=mask)
    check_labels(op, x, codebook)
    check_linear(op, hidden, weight, bias, x, codebook)
    check_mask(op, "hidden", hidden, x, mask)
    check_linear_dtypes(op, hidden, weight, bias)
    if mask is not None:
        hidden = torch.where(mask.unsqueeze(-1), hidden, 0.0)  # NaN in a masked row reaches no gradient
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return _loss(op, logits, x, codebook, tau, mask, reduction, losses_out)


def check_linear_dtypes(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Check that dtypes agree; return the dtype in which logits are computed."""
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if any(t is not None and t.dtype != hidden.dtype for t in (weight, bias)):
        raise TypeError(f"{op}: weight and bias must have the dtype of hidden, {hidden.dtype}, outside of autocast")
    return hidden.dtype
