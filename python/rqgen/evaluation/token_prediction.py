"""Token prediction of a prior, given the true tokens before each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rqgen.data.codes import Codes, flatten_codes
from rqgen.data.datasets import ImageDataset
from rqgen.models.classes import number_of_classes
from rqgen.models.pair import check_tokenizer


@dataclass
class TokenPrediction:
    """Means over images and codes. ``loss``: `-log p(code | the codes before it, the condition)` in nats.
    ``error_rate``: the share of codes that are not the likeliest one. ``level_losses`` and ``level_error_rates``: the
    same for each depth, or each scale."""

    loss: float
    error_rate: float
    level_losses: list[float]
    level_error_rates: list[float]

    @property
    def last_scale_loss(self) -> float:
        return self.level_losses[-1]

    @property
    def last_scale_error_rate(self) -> float:
        return self.level_error_rates[-1]


@torch.no_grad()
def evaluate_token_prediction(prior: Any, vae: Any, images: ImageDataset, *, batch_size: int = 128) -> TokenPrediction:
    """Predicts every code of every image once, given the true codes before it (teacher forcing) and the image's label,
    without dropout; float64 sums.

    A prior without classes, and images without labels, go with no condition or the null condition. The codes are the
    nearest ones, whatever the prior learnt from.

    Args:
        prior, vae: an RQ-Transformer and its RQ-VAE, or a VAR and its multi-scale VQ-VAE.
        images: of the tokenizer's size.
        batch_size: images at once; their logits take so many times codes x K numbers.

    Raises:
        ValueError: an empty dataset; a prior of another tokenizer.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one, got an empty dataset (held_out_fraction=0?)")
    check_tokenizer(prior, vae)
    prior.eval()
    vae.eval()
    sums_2l: Tensor | None = None
    for start in range(0, len(images), batch_size):
        batch = [images.item(index, 0) for index in range(start, min(start + batch_size, len(images)))]
        codes = vae.encode(torch.stack([image for image, _ in batch]).to(vae.device))
        labels = torch.tensor([label for _, label in batch], device=prior.device)
        labelled = number_of_classes(prior) > 0 and bool((labels >= 0).all())
        losses_bl, wrong_bl = code_losses(prior, codes, labels if labelled else None)
        sums = torch.stack([losses_bl.double().sum(0), wrong_bl.double().sum(0)])
        sums_2l = sums if sums_2l is None else sums_2l + sums
    levels_l = code_levels(codes)
    losses_l, wrong_l = sums_2l / len(images)
    by_level = [_by_level(means_l, levels_l) for means_l in (losses_l, wrong_l)]
    return TokenPrediction(losses_l.mean().item(), wrong_l.mean().item(), *by_level)


def code_losses(prior: Any, codes: Codes, condition: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, L) of all codes of an image, as `flatten_codes` orders them: `-log p` in nats, and whether another code is
    likelier."""
    logits_nlk = prior(codes, condition).logits.flatten(1, -2)
    codes_nl = flatten_codes(codes)
    losses_nl = F.cross_entropy(logits_nlk.transpose(1, 2), codes_nl, reduction="none")
    return losses_nl, logits_nlk.argmax(-1) != codes_nl


def code_levels(codes: Codes) -> Tensor:
    """The depth or scale, from 0, of each code of an image, int64 (L,), as `flatten_codes` orders them."""
    if isinstance(codes, Tensor):
        levels = [torch.arange(codes.shape[-1], device=codes.device).expand_as(codes[:1])]
        return flatten_codes(levels[0])[0]
    return flatten_codes([torch.full_like(tokens[:1], k) for k, tokens in enumerate(codes)])[0]


def _by_level(values_l: Tensor, levels_l: Tensor) -> list[float]:
    return [values_l[levels_l == level].mean().item() for level in range(int(levels_l.max()) + 1)]
