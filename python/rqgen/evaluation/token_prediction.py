"""Token prediction of a prior, given the true tokens before each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rqgen.checks import check_instance, check_integer
from rqgen.data.datasets import ImageDataset
from rqgen.models import Prior, Tokenizer
from rqgen.models.interfaces import level_means
from rqgen.models.pretrained import eval_mode

from .reconstruction import check_encoded


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
def evaluate_token_prediction(
    prior: Prior, vae: Tokenizer, images: ImageDataset, *, batch_size: int = 128
) -> TokenPrediction:
    """Predict every code of every image once, given the true codes before it (teacher forcing) and the image's label,
    without dropout; float64 sums.

    A prior without classes, and images without labels, are predicted without a condition or with the null condition.
    The codes are the nearest ones, also for a prior trained on stochastic codes.

    Args:
        prior, vae: of one system; evaluated in eval mode, and left in the mode they came in.
        images: of the tokenizer's size.
        batch_size: images at once; their logits take L * K numbers each.

    Raises:
        TypeError, ValueError: not a prior and its tokenizer; an empty dataset; labels of some images alone; latents
            that are not finite.
    """
    check_instance(prior, "prior", Prior)
    batch_size = check_integer(batch_size, "batch_size", 1)
    if len(images) == 0:
        raise ValueError("images: expected at least one, got an empty dataset (held_out_fraction=0?)")
    prior.check_tokenizer(vae)
    sums_2l = torch.zeros(2, prior.layout.count, dtype=torch.float64, device=prior.device)
    conditions = set()
    with eval_mode(prior, vae):
        for start in range(0, len(images), batch_size):
            batch = [images.item(index, 0) for index in range(start, min(start + batch_size, len(images)))]
            codes = vae.encode(torch.stack([image for image, _ in batch]).to(vae.device))
            check_encoded(codes, vae.layout, start)
            labels = torch.tensor([label for _, label in batch], device=prior.device)
            if prior.num_classes > 0:
                conditions |= set((labels >= 0).tolist())
            if len(conditions) > 1:
                raise ValueError("images: expected labels of all of them or of none, got -1 for some")
            found = prior.code_losses(codes, labels if True in conditions else None)
            sums_2l += torch.stack([found.nll.double().sum(0), (~found.correct).double().sum(0)])
    means_2l = sums_2l / len(images)
    by_level = [level_means(prior.layout, means_l.unsqueeze(0)).tolist() for means_l in means_2l]
    loss, error_rate = means_2l.mean(1).tolist()
    return TokenPrediction(loss, error_rate, *by_level)
