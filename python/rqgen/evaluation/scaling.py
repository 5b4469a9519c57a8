"""How well a prior predicts the tokens of images it has not learnt from, and how that goes down with its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rqgen.data.datasets import ImageDataset
from rqgen.models import Prior, Tokenizer


@dataclass
class TokenPrediction:
    """Means over images and tokens, of all scales (or depths) and of the last alone. ``loss``: `-log p(token | the
    steps before, the label)` in nats. ``error_rate``: the share of tokens that are not the likeliest one."""

    loss: float
    last_scale_loss: float
    error_rate: float
    last_scale_error_rate: float


@torch.no_grad()
def evaluate_token_prediction(
    prior: Prior, vae: Tokenizer, images: ImageDataset, *, batch_size: int = 128
) -> TokenPrediction:
    """Predicts every token of every image once, given the image's label and the true tokens of the steps before
    (teacher forcing), without dropout; float64 sums.

    Raises:
        ValueError: an empty dataset; a prior of another tokenizer.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one, got an empty dataset (held_out_fraction=0?)")
    prior.check_tokenizer(vae)
    prior.eval()
    vae.eval()
    sums_2l = torch.zeros(2, prior.layout.count, dtype=torch.float64, device=prior.device)
    for start in range(0, len(images), batch_size):
        batch = [images.item(index, 0) for index in range(start, min(start + batch_size, len(images)))]
        codes = vae.encode(torch.stack([image for image, _ in batch]).to(vae.device))
        labels = torch.tensor([label for _, label in batch], device=prior.device)
        found = prior.code_losses(codes, labels if prior.num_classes else None)
        sums_2l += torch.stack([found.nll.double().sum(0), (~found.correct).double().sum(0)])
    means_2l = sums_2l / len(images)
    *_, last_2 = prior.layout.by_level(prior.layout.unflatten(means_2l))
    (loss, error), (last_loss, last_error) = (part.flatten(1).mean(1).tolist() for part in (means_2l, last_2))
    return TokenPrediction(loss, last_loss, error, last_error)


@dataclass
class PowerLaw:
    """`L = (beta N)^alpha`, as Tian et al. (arXiv 2404.02905, "Power-law scaling laws") write it.

    ``log_beta`` is the natural logarithm: beta itself leaves float64 where alpha is near 0. ``correlation``: Pearson's
    coefficient of (log N, log L); -1 is a law without any scatter.
    """

    alpha: float
    log_beta: float
    correlation: float


def fit_power_law(sizes: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """The line `log L = alpha log N + alpha log beta` of least squares through the points (log N, log L).

    Args:
        sizes: N of each model.
        values: L of each model: a loss or an error rate.

    Raises:
        ValueError: fewer than three different sizes (two points lie on every law); numbers that are not finite and
            positive; values that are all equal, which have neither a beta nor a correlation.
    """
    if len(values) != len(sizes):
        raise ValueError(f"values: expected one for each of {len(sizes)} sizes, got {len(values)}")
    if len(set(sizes)) < 3:
        raise ValueError(f"sizes: a fit needs at least three different ones, got {list(sizes)}")
    for name, numbers in (("sizes", sizes), ("values", values)):
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError(f"{name}: a power law needs finite numbers above 0, got {list(numbers)}")
    if len(set(values)) == 1:
        raise ValueError(f"values: all are {values[0]}: nothing goes down with size, so there is no law to fit")
    x, y = np.log(np.asarray(sizes, dtype=np.float64)), np.log(np.asarray(values, dtype=np.float64))
    dx, dy = x - x.mean(), y - y.mean()
    covariance = float(dx @ dy)
    # Rounding must not turn a perfect line into a coefficient above 1.
    correlation = max(-1.0, min(1.0, covariance / math.sqrt(float(dx @ dx) * float(dy @ dy))))
    alpha = covariance / float(dx @ dx)
    if abs(correlation) < 1e-12:  # rounding of no slope at all
        raise ValueError(f"values: {list(values)} have no slope in log N, so beta is not defined")
    return PowerLaw(alpha, float(y.mean()) / alpha - float(x.mean()), correlation)
