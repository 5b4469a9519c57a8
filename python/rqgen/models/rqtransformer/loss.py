"""Outputs and losses of an RQ-Transformer: hard labels, and soft ones (equation 15)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import rqkernels
from rqgen.checks import check_targets, integers


class SoftLabels(NamedTuple):
    """Parts of the label `Q_tau(k | r) = softmax_k(-|r - e(k)|^2 / tau)` of every code (equation 15)."""

    residuals: Tensor
    """(B, h, w, D, C): what each depth quantized, r_0 .. r_{D-1} of the search."""
    codebooks: Tensor
    """(K, C) or (D, K, C), see `RQTransformer.codebooks`."""
    tau: float
    """Temperature > 0, in squared units of the residuals."""


class CodeLoss(NamedTuple):
    """Negative log-likelihood of codes, float32."""

    mean: Tensor
    """Mean over all T * D codes; the value to differentiate."""
    per_depth: Tensor
    """(D,): the same depth by depth, detached."""


class RQTransformerOutput(NamedTuple):
    """Result of calling an `RQTransformer` with whole code maps."""

    logits: Tensor | None
    """float32 (B, h, w, D, K): `p(S_td | S_{<t}, S_{t,<d})` before the softmax; None where `code_loss` stands."""
    condition_logits: Tensor | None = None
    """float32 (B, L - 1, V): predictions of condition tokens 2..L; only with a token condition."""
    condition_dropped: Tensor | None = None
    """bool (B,): rows whose condition the prior replaced by the null condition; None outside that."""
    code_loss: CodeLoss | None = None
    """The loss against soft labels, in place of logits, for a call with soft labels."""


class PriorLoss(NamedTuple):
    """Terms of a prior's loss, float32."""

    total: Tensor
    codes: Tensor
    """Mean over all T * D codes."""
    per_depth: Tensor
    """(D,): the same, depth by depth."""
    condition: Tensor | None
    """Mean over the predicted condition tokens; None without a token condition."""


def prior_loss(
    output: RQTransformerOutput,
    *,
    codes: Tensor | None = None,
    residuals: Tensor | None = None,
    codebooks: Tensor | None = None,
    tau: float | None = None,
    condition: Tensor | None = None,
    condition_weight: float = 0.1,
    inplace: bool = False,
) -> PriorLoss:
    """Return the negative log-likelihood of all T * D codes (equation 14), with hard or soft labels (equation 15).

        hard: -log softmax(logits)[code]           soft: -sum_k Q_tau(k | r_{d-1}) log softmax(logits)[k]

    With a token condition: total = (1 - condition_weight) * codes + condition_weight * condition.

    Args:
        output: of `RQTransformer.forward`. Where it was called with soft labels, it holds the loss of the codes, and
            no labels are given here.
        codes: hard labels, int64 (B, h, w, D). Give these, or the next three.
        residuals, codebooks, tau: soft labels, see `SoftLabels`.
        condition: the token ids (B, L) that `output` was computed with; a row whose condition was dropped
            does not count in their loss.
        condition_weight: in [0, 1].
        inplace: let the gradient of soft labels overwrite `output.logits`, which must not be needed afterwards, and
            allocate nothing of their size; see `rqkernels.soft_label_cross_entropy`.

    Raises:
        ValueError: both or neither kind of label, no condition, a weight out of range, shapes that differ, inplace
            without soft labels, no images.
        TypeError, IndexError: codes that are not int64, token ids that are not integers; either of them out of range
            (unchecked on CUDA).
    """
    if not 0 <= condition_weight <= 1:
        raise ValueError(f"condition_weight: expected a number in [0, 1], got {condition_weight}")
    code_loss = _code_loss(output, codes, residuals, codebooks, tau, inplace)
    if output.condition_logits is None:
        return PriorLoss(code_loss.mean, *code_loss, None)

    if condition is None:
        raise ValueError("condition: expected token ids, as the output has condition_logits, got None")
    batch, predicted, _ = output.condition_logits.shape
    if condition.shape != (batch, predicted + 1):
        raise ValueError(f"condition: expected shape {(batch, predicted + 1)}, got {tuple(condition.shape)}")
    condition = integers(condition, "condition")
    check_targets(condition, output.condition_logits.shape[-1], "condition")
    per_token = F.cross_entropy(output.condition_logits.transpose(1, 2), condition[:, 1:], reduction="none")
    kept = per_token.new_ones(batch) if output.condition_dropped is None else ~output.condition_dropped
    condition_loss = (per_token.mean(dim=1) * kept).sum() / kept.sum().clamp(min=1)
    total = (1 - condition_weight) * code_loss.mean + condition_weight * condition_loss
    return PriorLoss(total, *code_loss, condition_loss)


def check_some(codes: Tensor) -> None:
    if len(codes) == 0:
        raise ValueError(f"codes: expected those of at least one image to train on, got shape {tuple(codes.shape)}")


def _code_loss(
    output: RQTransformerOutput,
    codes: Tensor | None,
    residuals: Tensor | None,
    codebooks: Tensor | None,
    tau: float | None,
    inplace: bool,
) -> CodeLoss:
    parts = [part is not None for part in (residuals, codebooks, tau)]
    if output.code_loss is not None:
        if codes is not None or any(parts) or inplace:
            raise ValueError(
                "prior_loss: expected neither labels nor inplace, as the output holds the loss of its codes"
            )
        return output.code_loss
    if output.logits is None:
        raise ValueError("output: expected logits or a code_loss, got neither")
    if residuals is not None and codebooks is not None and tau is not None and codes is None:
        return soft_label_loss(output.logits, SoftLabels(residuals, codebooks, tau), inplace=inplace)
    if codes is None or any(parts):
        raise ValueError("prior_loss: expected either codes, or residuals with codebooks and tau")
    if inplace:
        raise ValueError("inplace: expected False with codes, whose loss keeps the logits, got True")
    return _hard_label_loss(output.logits, codes)


def soft_label_loss(logits: Tensor, labels: SoftLabels, *, inplace: bool) -> CodeLoss:
    check_some(logits[..., 0])
    losses = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    # The mean, so that its gradient is written once; the losses of the depths for the log are a second output.
    mean = rqkernels.soft_label_cross_entropy(logits, *labels, inplace=inplace, losses_out=losses)
    return CodeLoss(mean, losses.detach().mean(dim=(0, 1, 2)))


def _hard_label_loss(logits: Tensor, codes: Tensor) -> CodeLoss:
    check_some(logits[..., 0])
    if codes.shape != logits.shape[:-1]:
        raise ValueError(f"codes: expected shape {tuple(logits.shape[:-1])}, got {tuple(codes.shape)}")
    check_targets(codes, logits.shape[-1], "codes")
    losses = F.cross_entropy(logits.flatten(0, -2), codes.flatten(), reduction="none").view(codes.shape)
    return CodeLoss(losses.mean(), losses.detach().mean(dim=(0, 1, 2)))
