"""Distances between two sets of images, given their features: Fréchet distance and kernel distance."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rqgen.checks import check_integer
from rqgen.config import MAX_SEED

from .features import check_features, check_moments

Features = Tensor | np.ndarray[Any, Any]


@torch.no_grad()
def frechet_distance(mean1: Features, cov1: Features, mean2: Features, cov2: Features) -> float:
    """Return the Fréchet distance of two Gaussians; of Inception features of images it is the FID (Heusel et al. 2017).

        |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))

    With factors `C = F F^T` of each covariance from its eigen decomposition, the last trace is the sum of the singular
    values of `F1^T F2 = U S V^T`, because `C1 C2` and `(F1^T F2) (F1^T F2)^T` have the same nonzero eigenvalues. So the
    three traces are `|F1 U - F2 V|^2`, a sum of squares, in which nothing cancels: the distance of nearly equal
    Gaussians keeps its digits, and that of equal ones is 0 to rounding. Eigenvalues that the rounding of a covariance
    cannot tell from 0, below d times 2^-52 of the largest, count as 0. Nothing is complex, and singular covariances
    need no offset on the diagonal. The naive expression is `scipy.linalg.sqrtm(C1 @ C2).trace().real`: the product is
    not symmetric, and for singular covariances its square root is complex, inaccurate (the error of an eigenvalue 0 is
    that of the square root of its rounding) or does not converge.

    Args:
        mean1, mean2: (d,), floating point.
        cov1, cov2: (d, d), see `FeatureStatistics`.

    Returns:
        The distance, >= 0, in squared units of the features.

    Raises:
        TypeError: not tensors or arrays of floating-point numbers.
        ValueError: shapes that do not fit; numbers that are not finite; a matrix that is not a covariance; a distance
            beyond float64.

    Warns:
        UserWarning: a covariance of rank < d: it is of d or fewer samples, or some features are constant. Few samples
            make the distance much too large (Chong and Forsyth 2020): for 20 and 20 samples of one Gaussian in 64
            dimensions of variance 1 it is about 78, not 0. Published scores take 50,000 images.

    Not a metric of `rqgen evaluate`, which has no feature network.
    """
    first, second = check_moments(mean1, cov1, "mean1", "cov1"), check_moments(mean2, cov2, "mean2", "cov2")
    (mean1_d, cov1_dd), (mean2_d, cov2_dd) = first, (moment.to(first[0].device) for moment in second)
    if mean1_d.shape != mean2_d.shape:
        raise ValueError(f"mean2: expected shape {tuple(mean1_d.shape)}, as mean1, got {tuple(mean2_d.shape)}")
    factor1_dr, factor2_dr = _factor(cov1_dd, "cov1"), _factor(cov2_dd, "cov2")
    for name, factor_dr in (("cov1", factor1_dr), ("cov2", factor2_dr)):
        if (rank := factor_dr.shape[1]) < len(mean1_d):
            warnings.warn(
                f"{name}: its rank is {rank} of {len(mean1_d)}: it is of too few samples, or of constant features; "
                "few samples make the Fréchet distance too large",
                stacklevel=3,  # beyond torch.no_grad
            )
    distance = (mean1_d - mean2_d).square().sum() + _squared_gap(factor1_dr, factor2_dr)
    if not math.isfinite(value := float(distance.item())):
        raise ValueError("mean1: expected moments whose distance is in the range of float64, got larger ones")
    return value


def _squared_gap(factor1_dr: Tensor, factor2_dr: Tensor) -> Tensor:
    """Return the least |F1 - F2 Q|^2 over orthogonal Q: `tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))`.

    The ranks may differ; columns of the larger one without a partner count by their squares.
    """
    u_rr, _, vh_rr = torch.linalg.svd(factor1_dr.T @ factor2_dr)
    rotated1_dr, rotated2_dr = factor1_dr @ u_rr, factor2_dr @ vh_rr.T
    paired = min(rotated1_dr.shape[1], rotated2_dr.shape[1])
    gap = (rotated1_dr[:, :paired] - rotated2_dr[:, :paired]).square().sum()
    return gap + rotated1_dr[:, paired:].square().sum() + rotated2_dr[:, paired:].square().sum()


def _factor(cov_dd: Tensor, name: str) -> Tensor:
    """Return F (d, r) with `F F^T = cov`, where r is the rank."""
    values_d, vectors_dd = torch.linalg.eigh(cov_dd)
    least, largest = values_d[0].item(), values_d[-1].item()
    if least < -1e-4 * max(largest, 0.0):  # float32 arithmetic leaves less
        raise ValueError(f"{name}: expected eigenvalues >= 0, got {least:.4g}")
    kept_d = values_d > len(values_d) * torch.finfo(torch.float64).eps * largest
    return vectors_dd[:, kept_d] * values_d[kept_d].sqrt()


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy, see `kernel_distance`."""

    mean: float
    """Mean over the subsets: the distance."""
    std: float
    """Standard deviation over the subsets (of the population, divided by their number)."""


@torch.no_grad()
def kernel_distance(
    real: Features, generated: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Return the kernel distance of two sets of features; of Inception features it is the KID (Bińkowski et al. 2018).

    The unbiased estimate of the squared maximum mean discrepancy with a polynomial kernel, averaged over random subsets
    of m images of each set:

        k(x, y) = (x . y / d + 1)^3
        sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 sum_{i, j} k(x_i, y_j) / m^2

    Its expectation does not depend on the number of images, unlike that of the Fréchet distance, and it may be
    negative. The arithmetic is float64; three (m, m) matrices exist at a time.

    Args:
        real, generated: (N, d) and (M, d), floating point, of any N and M.
        subsets: number of subsets.
        subset_size: m, at least 2; images of a subset are chosen without replacement.
        seed: of the choice, which is the same on every device.

    Returns:
        `.mean` and `.std` over the subsets, in units of the kernel, without a unit. Reports often multiply by 1000.

    Raises:
        TypeError: not tensors or arrays of floating-point numbers; numbers of another type.
        ValueError: shapes that do not fit; features that are not finite; a subset larger than a set.

    Not a metric of `rqgen evaluate`, which has no feature network.
    """
    x_nd, y_md = check_pair(real, generated, at_least=2)
    subsets = check_integer(subsets, "subsets", 1)
    size = check_integer(subset_size, "subset_size", 2)
    generator = torch.Generator().manual_seed(check_integer(seed, "seed", 0, MAX_SEED))
    if size > (smaller := min(len(x_nd), len(y_md))):
        raise ValueError(f"subset_size: expected at most {smaller}, the images of the smaller set, got {size}")
    found = []
    for _ in range(subsets):
        x_md, y_sd = (
            z_nd[torch.randperm(len(z_nd), generator=generator)[:size].to(z_nd.device)] for z_nd in (x_nd, y_md)
        )
        within = sum(_off_diagonal_sum(_kernel(z_sd, z_sd)) for z_sd in (x_md, y_sd))
        across = _kernel(x_md, y_sd).sum().item()
        found.append(within / (size * (size - 1)) - 2 * across / size**2)
    mean = math.fsum(found) / subsets
    if not math.isfinite(mean):
        raise ValueError("real: expected features whose kernel is in the range of float64, got larger ones")
    return KernelDistance(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in found) / subsets))


def check_pair(real: Any, generated: Any, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Return the features of two sets as float64 on the device of the first. Raises as `check_features`."""
    x_nd = check_features(real, "real", at_least=at_least)
    y_md = check_features(generated, "generated", at_least=at_least)
    if x_nd.shape[1] != y_md.shape[1]:
        raise ValueError(f"generated: expected {x_nd.shape[1]} features per image, as real, got {y_md.shape[1]}")
    return x_nd, y_md.to(x_nd.device)


def _kernel(x_nd: Tensor, y_md: Tensor) -> Tensor:
    return (x_nd @ y_md.T / x_nd.shape[1] + 1).pow(3)


def _off_diagonal_sum(kernel_nn: Tensor) -> float:
    return (kernel_nn.sum() - kernel_nn.diagonal().sum()).item()
