"""Outputs and loss of a VAR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rqgen.checks import check_targets


class VAROutput(NamedTuple):
    """Result of calling a `VAR` with whole token maps."""

    logits: Tensor
    """float32 (B, L, K): of every token of every scale, from coarse to fine, before the softmax."""
    condition_logits: None = None
    condition_dropped: Tensor | None = None
    """bool (B,): rows whose class the prior replaced by the null condition; None outside that."""


class VARLoss(NamedTuple):
    """Terms of a prior's loss, float32."""

    total: Tensor
    """Mean over all L tokens."""
    per_scale: Tensor
    """(K,): the same, scale by scale."""


def var_loss(output: VAROutput, codes: Sequence[Tensor]) -> VARLoss:
    """Return the cross-entropy of all tokens, `-log softmax(logits)[token]`, and its mean over each scale.

    Args:
        output: of `VAR.forward` for these codes.
        codes: token maps int64 (B, h_k, w_k).

    Raises:
        ValueError: another number of tokens than of logits; no images.
        TypeError, IndexError: codes that are not int64, or out of range (unchecked on CUDA).
    """
    flat = [tokens.flatten(1) for tokens in codes]
    target = torch.cat(flat, dim=1)
    if target.shape != output.logits.shape[:2]:
        raise ValueError(f"codes: expected {tuple(output.logits.shape[:2])} tokens, got {tuple(target.shape)}")
    if len(target) == 0:
        raise ValueError("codes: expected those of at least one image to train on, got none")
    check_targets(target, output.logits.shape[-1], "codes")
    per_token = F.cross_entropy(output.logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    parts = per_token.detach().split([tokens.shape[1] for tokens in flat], dim=1)
    return VARLoss(per_token.mean(), torch.stack([part.mean() for part in parts]))
