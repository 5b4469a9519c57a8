"""Power laws of a loss over the size of models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rqgen.checks import check_number


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
    """Return the line `log L = alpha log N + alpha log beta` of least squares through the points (log N, log L).

    Args:
        sizes: N of each model.
        values: L of each model: a loss or an error rate.

    Raises:
        TypeError: something that is not a number.
        ValueError: fewer than three different sizes (a law fits any two points); numbers that are not finite and
            positive; values that are all equal, which have neither a beta nor a correlation.
    """
    for name, numbers in (("sizes", sizes), ("values", values)):
        for index, number in enumerate(numbers):
            check_number(number, f"{name}[{index}]")
    if len(values) != len(sizes):
        raise ValueError(f"values: expected one for each of {len(sizes)} sizes, got {len(values)}")
    if len(set(sizes)) < 3:
        raise ValueError(f"sizes: a fit needs at least three different ones, got {list(sizes)}")
    for name, numbers in (("sizes", sizes), ("values", values)):
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError(f"{name}: a power law needs finite numbers above 0, got {list(numbers)}")
    if len(set(values)) == 1:
        raise ValueError(f"values: all are {values[0]}: a power law needs different ones")
    x, y = np.log(np.asarray(sizes, dtype=np.float64)), np.log(np.asarray(values, dtype=np.float64))
    dx, dy = x - x.mean(), y - y.mean()
    covariance = float(dx @ dy)
    # Rounding must not turn a perfect line into a coefficient above 1.
    correlation = max(-1.0, min(1.0, covariance / math.sqrt(float(dx @ dx) * float(dy @ dy))))
    alpha = covariance / float(dx @ dx)
    if abs(correlation) < 1e-12:  # rounding of no slope at all
        raise ValueError(f"values: {list(values)} have no slope in log N, so beta is not defined")
    return PowerLaw(alpha, float(y.mean()) / alpha - float(x.mean()), correlation)
