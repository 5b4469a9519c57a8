"""Scores of generated images: precision and recall of their features, and the Inception score."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rqgen.checks import check_integer

from .distances import Features, check_pair
from .features import check_features

# Distances that exist at a time.
_BLOCK = 2**24
_EPS = torch.finfo(torch.float64).eps


class PrecisionRecall(NamedTuple):
    """Shares of images, see `precision_recall`."""

    precision: float
    """Share of the generated images that look real."""
    recall: float
    """Share of the real images that could have been generated."""


@torch.no_grad()
def precision_recall(real: Features, generated: Features, k: int = 3) -> PrecisionRecall:
    """Return precision and recall of generated images, given features of them and of real ones (Kynkäänniemi et al.
    2019).

    The manifold of a set is the union of a ball around each of its feature vectors, whose radius is the distance to
    the vector's k-th nearest neighbour in the set, itself not counted. Precision is the share of generated vectors
    within the manifold of the real ones, recall the share of real vectors within the manifold of the generated ones.

    Distances are Euclidean, `|x|^2 + |y|^2 - 2 x . y` in float64 after the median of the real features is subtracted.
    A vector on the surface of a ball, to the rounding of this formula for these two vectors, is inside: so are copies
    of a real image, whose ball has radius 0 where there are more than k of them. At most 2^24 distances exist at a time
    (128 MiB), never all N x M of them, nor anything of size N x M x d.

    Args:
        real, generated: (N, d) and (M, d), floating point. The two shares compare only where N, M, k and the network
            are the same; the paper has N = M = 50,000 and k = 3.
        k: neighbours, from 1 to less than N and M.

    Raises:
        TypeError: not tensors or arrays of floating-point numbers; k is not an integer.
        ValueError: shapes that do not fit; features that are not finite; k out of range.

    Not a metric of `rqgen evaluate`, which has no feature network.
    """
    x_nd, y_md = check_pair(real, generated, at_least=2)
    k = check_integer(k, "k", 1, min(len(x_nd), len(y_md)) - 1)
    center_d = x_nd.median(0).values  # a mean may be far from all vectors, where one is far away
    x_nd, y_md = x_nd - center_d, y_md - center_d
    return PrecisionRecall(
        precision=_share_within(y_md, x_nd, _squared_radii(x_nd, k)),
        recall=_share_within(x_nd, y_md, _squared_radii(y_md, k)),
    )


def _squared_radii(x_nd: Tensor, k: int) -> Tensor:
    """Return the squared distance of each vector to its k-th nearest neighbour, (N,)."""
    radii = []
    for rows in torch.arange(len(x_nd), device=x_nd.device).split(max(1, _BLOCK // len(x_nd))):
        distances_bn = _squared_distances(x_nd[rows], x_nd)
        distances_bn[torch.arange(len(rows), device=x_nd.device), rows] = math.inf  # itself
        radii.append(distances_bn.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _share_within(points_md: Tensor, centers_nd: Tensor, squared_radii_n: Tensor) -> float:
    """Return the share of points that lie within at least one ball.

    Two squared distances are compared, that to the center and the radius, each rounded in d products and sums of
    numbers up to 2 |x|^2 + 2 |y|^2; for the radius y is the neighbour, with |y|^2 <= 2 |center|^2 + 2 radius^2.
    """
    rounding, within = (centers_nd.shape[1] + 4) * _EPS, 0
    reach_n = squared_radii_n + rounding * (8 * centers_nd.square().sum(1) + 4 * squared_radii_n)
    for block_bd in points_md.split(max(1, _BLOCK // len(centers_nd))):
        slack_b1 = rounding * 2 * block_bd.square().sum(1, keepdim=True)
        within += int((_squared_distances(block_bd, centers_nd).sub_(slack_b1) <= reach_n).any(1).sum())
    return within / len(points_md)


def _squared_distances(x_nd: Tensor, y_md: Tensor) -> Tensor:
    norms = x_nd.square().sum(1, keepdim=True) + y_md.square().sum(1)
    return norms.addmm_(x_nd, y_md.T, alpha=-2).clamp_(min=0)


class InceptionScore(NamedTuple):
    """The exponential of a mean divergence, see `inception_score`."""

    mean: float
    """Mean over the splits: the score, from 1 to the number of classes."""
    std: float
    """Standard deviation over the splits (of the population, divided by their number)."""


@torch.no_grad()
def inception_score(probabilities: Features, splits: int = 10) -> InceptionScore:
    """Return the Inception score of class probabilities of generated images (Salimans et al. 2016).

        exp(mean_x KL(p(y | x) || p(y))),    p(y) = mean_x p(y | x)

    for each of `splits` consecutive parts of the images (part i of N images: floor(i N / splits) up to
    floor((i + 1) N / splits)), so that their order counts: images sorted by class need shuffling first. The arithmetic
    is float64; 0 log 0 is 0.

    Args:
        probabilities: (N, K), floating point, the softmax of a classifier's logits; rows are divided by their sums.
        splits: number of parts, at most N.

    Returns:
        `.mean` and `.std` over the parts, without a unit.

    Raises:
        TypeError: not a tensor or an array of floating-point numbers; splits is not an integer.
        ValueError: another shape; negative numbers, or ones that are not finite; rows whose sum is not within 0.001 of
            1 (bfloat16: its rounding, 0.0078), such as logits; splits out of range.

    Not a metric of `rqgen evaluate`, which has no feature network.
    """
    p_nk = check_features(probabilities, "probabilities", at_least=1)
    splits = check_integer(splits, "splits", 1, len(p_nk))
    sums_n = p_nk.sum(1)
    tolerance = max(1e-3, torch.finfo(probabilities.dtype).eps if isinstance(probabilities, Tensor) else 0.0)
    bad_n = (p_nk < 0).any(1) | ((sums_n - 1).abs() > tolerance)
    if bool(bad_n.any()):
        row = int(bad_n.nonzero()[0, 0])
        least, total = p_nk[row].min().item(), sums_n[row].item()
        raise ValueError(
            "probabilities: expected numbers >= 0 that sum up to 1 in each row, "
            f"got row {row} with minimum {least:.4g} and sum {total:.4g}"
        )
    p_nk = p_nk / sums_n[:, None]
    scores = []
    for part in range(splits):
        part_nk = p_nk[part * len(p_nk) // splits : (part + 1) * len(p_nk) // splits]
        marginal_k = part_nk.mean(0)
        divergence = (torch.special.xlogy(part_nk, part_nk) - torch.special.xlogy(part_nk, marginal_k)).sum(1).mean()
        scores.append(math.exp(divergence.item()))
    mean = math.fsum(scores) / splits
    return InceptionScore(mean, math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / splits))
