"""Power laws through points that are known to lie on one, or not."""

import math

import numpy as np
import pytest

from rqgen.evaluation import fit_power_law


@pytest.mark.parametrize(("alpha", "beta"), [(-0.2, 2.5e-9), (-0.01, 6.5e-2), (0.3, 1e-5)])
def test_points_on_a_law_give_the_law_back(alpha, beta):
    sizes = [73_728 * d**3 for d in (1, 2, 3, 4, 6)]
    law = fit_power_law(sizes, [(beta * n) ** alpha for n in sizes])
    assert law.alpha == pytest.approx(alpha, rel=1e-9)
    assert law.log_beta == pytest.approx(math.log(beta), rel=1e-8)
    assert law.correlation == pytest.approx(math.copysign(1, alpha), abs=1e-12) and abs(law.correlation) <= 1


def test_scattered_points_give_least_squares_and_pearson():
    sizes, values = [1e5, 6e5, 2e6, 4.7e6, 1.6e7], [3.1, 2.6, 2.7, 2.4, 2.45]
    law = fit_power_law(sizes, values)
    slope, intercept = np.polyfit(np.log(sizes), np.log(values), 1)
    assert law.alpha == pytest.approx(slope) and law.alpha * law.log_beta == pytest.approx(intercept)
    assert law.correlation == pytest.approx(np.corrcoef(np.log(sizes), np.log(values))[0, 1])
    assert -0.95 < law.correlation < -0.8
    # The order of the models does not matter.
    assert fit_power_law(sizes[::-1], values[::-1]).alpha == pytest.approx(law.alpha)


@pytest.mark.parametrize(
    ("sizes", "values", "words"),
    [
        ([1, 2], [3, 2], r"sizes: a fit needs at least three different ones, got \[1, 2\]"),
        ([1, 2, 2], [3, 2, 1], "at least three different"),
        ([1, 2, 3], [3, 2], "values: expected one for each of 3 sizes, got 2"),
        ([1, 2, 3], [3, 2, 0.0], "values: a power law needs finite numbers above 0"),
        ([1, 2, 3], [3, 2, math.nan], "values: a power law needs finite"),
        ([0, 2, 3], [3, 2, 1], "sizes: a power law needs finite"),
        ([1, 2, 3], [0.5, 0.5, 0.5], "values: all are 0.5"),
        ([1, 2, 4], [3, 2, 3], "have no slope in log N"),
    ],
)
def test_no_law_is_made_up(sizes, values, words):
    with pytest.raises(ValueError, match=words):
        fit_power_law(sizes, values)


def test_numbers_are_numbers():
    with pytest.raises(TypeError, match=r"sizes\[1\]: expected a number, got '2'"):
        fit_power_law([1, "2", 3], [3, 2, 1])
    with pytest.raises(TypeError, match=r"values\[0\]: expected a number, got None"):
        fit_power_law([1, 2, 3], [None, 2, 1])
