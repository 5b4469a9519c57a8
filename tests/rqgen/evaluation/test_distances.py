"""Fréchet and kernel distance by their definitions and by closed forms."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from rqgen.evaluation import FeatureStatistics, frechet_distance, kernel_distance


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_moments(width, seed, count=None):
    x = randn(count or 3 * width, width, seed=seed) @ randn(width, width, seed=seed + 1) + seed
    return x.mean(0), torch.from_numpy(np.cov(x.numpy(), rowvar=False)).view(width, width)


def rotation(width, seed=9):
    return torch.linalg.qr(randn(width, width, seed=seed)).Q


# --- Fréchet distance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 5, 40])
def test_it_is_the_formula_with_scipy_s_root(width):
    (mean1, cov1), (mean2, cov2) = random_moments(width, 0), random_moments(width, 5)
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy()).trace().real
    expected = ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()).item() - 2 * root
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(expected, rel=1e-8)
    arrays = [moment.numpy() for moment in (mean1, cov1, mean2, cov2)]
    assert frechet_distance(*arrays) == frechet_distance(mean1, cov1, mean2, cov2)


def test_commuting_covariances_have_a_closed_form():
    """|m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2 for variances a and b along the same axes."""
    a, b = torch.tensor([4.0, 9.0, 1e-3, 1.0]).double(), torch.tensor([1.0, 16.0, 1e3, 1.0]).double()
    q, mean = rotation(4), torch.tensor([1.0, 2.0, 0.0, -1.0]).double()
    got = frechet_distance(torch.zeros(4), q @ a.diag() @ q.T, mean, q @ b.diag() @ q.T)
    assert got == pytest.approx(6 + (a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-12)
    assert frechet_distance(*(torch.tensor(values) for values in ([0.0], [[4.0]], [3.0], [[1.0]]))) == 10


def test_equal_gaussians_have_no_distance_and_a_shift_is_all_of_it():
    mean, cov = random_moments(64, 0)
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-12 * cov.trace().item()
    assert frechet_distance(mean, cov, mean + 2, cov) == pytest.approx(4 * 64, rel=1e-10)


@pytest.mark.filterwarnings("ignore:cov")
@pytest.mark.parametrize("largest", [1e-8, 1.0, 1e8])
def test_singular_and_ill_conditioned_covariances(largest):
    q = rotation(60)
    # From 1 down to 1e-30: most of it is below rounding.
    spread = largest * torch.logspace(0, -30, 60, dtype=torch.float64)
    ill = q @ spread.diag() @ q.T
    zero = torch.zeros(60, dtype=torch.float64)
    assert frechet_distance(zero, ill, zero, ill) < 1e-11 * largest
    got = frechet_distance(zero, ill, zero, q @ (4 * spread).diag() @ q.T)
    assert got == pytest.approx(spread.sum().item(), rel=1e-10)  # (2 - 1)^2 of each
    # Of rank 20 each, in subspaces that meet at right angles or not at all.
    low, other = q[:, :20] @ q[:, :20].T * largest, q[:, 20:40] @ q[:, 20:40].T * largest
    assert frechet_distance(zero, low, zero, other) == pytest.approx(40 * largest, rel=1e-12)
    assert frechet_distance(zero, low, zero, low) < 1e-11 * largest
    # Nothing varies at all.
    none = torch.zeros(60, 60, dtype=torch.float64)
    assert frechet_distance(zero, none, zero, low) == pytest.approx(20 * largest, rel=1e-12)
    assert frechet_distance(zero, none, zero + 1, none) == 60


def test_few_samples_are_told_and_their_distance_is_too_large():
    """20 and 20 samples of one Gaussian in 64 dimensions: the distance of their statistics is no 0."""
    few, others = (FeatureStatistics() for _ in range(2))
    few.update(randn(20, 64, seed=1))
    others.update(randn(20, 64, seed=2))
    with pytest.warns(UserWarning) as caught:
        distance = frechet_distance(few.mean, few.cov, others.mean, others.cov)
    assert [str(one.message).partition(":")[0] for one in caught] == ["cov1", "cov2"]
    assert all("its rank is 19 of 64: it is of too few samples" in str(one.message) for one in caught)
    assert all(one.filename == __file__ for one in caught)
    assert distance > 50
    many = randn(20_000, 64, seed=3)
    halves = [(half.mean(0), torch.cov(half.T)) for half in many.chunk(2)]
    assert frechet_distance(*halves[0], *halves[1]) < 1


def test_float32_statistics_are_taken():
    (mean1, cov1), (mean2, cov2) = random_moments(40, 0), random_moments(40, 5)
    exact = frechet_distance(mean1, cov1, mean2, cov2)
    assert frechet_distance(mean1.float(), cov1.float(), mean2.float(), cov2.float()) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    ("place", "bad", "error", "words"),
    [
        (0, torch.zeros(3, dtype=torch.int64), TypeError, "mean1: expected floating-point numbers, got torch.int64"),
        (1, [[1.0]], TypeError, "cov1: expected a tensor or an array, got list"),
        (0, torch.zeros(1, 3), ValueError, r"mean1: expected shape \(d,\), got \(1, 3\)"),
        (1, torch.zeros(3, 2), ValueError, r"cov1: expected shape \(3, 3\), got \(3, 2\)"),
        (2, torch.full((3,), math.nan), ValueError, "mean2: expected finite numbers, got NaN or infinity"),
        (3, torch.full((3, 3), math.inf), ValueError, "cov2: expected finite numbers, got NaN or infinity"),
        (3, torch.ones(3, 3).triu(), ValueError, "cov2: expected a symmetric matrix, got an asymmetric one"),
        (3, -torch.eye(3), ValueError, "cov2: expected variances >= 0, got -1"),
        (1, torch.ones(3, 3) - torch.eye(3), ValueError, "cov1: expected eigenvalues >= 0, got -1"),
    ],
)
def test_bad_moments_are_told(place, bad, error, words):
    arguments = [torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(3)]
    arguments[place] = bad
    with pytest.raises(error, match=words):
        frechet_distance(*arguments)


def test_moments_of_other_widths_are_told():
    with pytest.raises(ValueError, match=r"mean2: expected shape \(3,\), as mean1, got \(2,\)"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(2), torch.eye(2))


@pytest.mark.parametrize("change", [1e-2, 1e-4, 1e-6])
def test_nearly_equal_gaussians_keep_their_digits(change):
    """Traces of 2 less a root of nearly 4 had lost them: at 1e-6 a tenth of the distance was rounding."""
    a = torch.logspace(0, -2, 12, dtype=torch.float64)
    b, q, mean = a * (1 + change * randn(12, seed=3)), rotation(12), torch.zeros(12)
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    got = frechet_distance(mean, q @ a.diag() @ q.T, mean, q @ b.diag() @ q.T)
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:cov")
def test_nearly_equal_sets_of_few_samples_keep_their_digits():
    """All features times 1 + c: the distance is c^2 (|m|^2 + tr C)."""
    x, change, found = randn(6, 16), 1e-5, []
    for features in (x, x * (1 + change)):
        statistics = FeatureStatistics()
        statistics.update(features)
        found += [statistics.mean, statistics.cov]
    got = frechet_distance(*found)
    assert got == pytest.approx(change**2 * (found[0].square().sum() + found[1].trace()).item(), rel=1e-6)


def test_a_distance_beyond_float64_is_told():
    with pytest.raises(ValueError, match="mean1: expected moments whose distance is in the range of float64"):
        frechet_distance(torch.full((2,), 1e200, dtype=torch.float64), torch.eye(2), torch.zeros(2), torch.eye(2))


# --- kernel distance ---------------------------------------------------------------------------------------


def naive_mmd(x, y):
    """Return the estimate by its double sums."""
    x, y = x.tolist(), y.tolist()

    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    m = len(x)
    within = sum(k(z[i], z[j]) for z in (x, y) for i, j in itertools.permutations(range(m), 2))
    return within / (m * (m - 1)) - 2 * sum(k(a, b) for a in x for b in y) / m**2


def test_whole_sets_are_the_double_sums():
    x, y = randn(12, 5), randn(12, 5, seed=1) + 0.3
    found = kernel_distance(x, y, subsets=3, subset_size=12)
    assert found.mean == pytest.approx(naive_mmd(x, y), rel=1e-12)
    assert found.std < 1e-12  # all subsets are the whole sets
    assert kernel_distance(y.numpy(), x.numpy(), subsets=1, subset_size=12).mean == pytest.approx(found.mean, rel=1e-12)


def test_subsets_are_chosen_by_the_seed_without_replacement():
    x, y = randn(30, 3), randn(50, 3, seed=1)
    found = kernel_distance(x, y, subsets=4, subset_size=10, seed=7)
    generator, values = torch.Generator().manual_seed(7), []
    for _ in range(4):
        rows = [torch.randperm(count, generator=generator)[:10] for count in (30, 50)]
        values.append(naive_mmd(x[rows[0]], y[rows[1]]))
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.std == pytest.approx(np.std(values), rel=1e-9)
    assert kernel_distance(x, y, subsets=4, subset_size=10, seed=7) == found
    assert kernel_distance(x, y, subsets=4, subset_size=10, seed=8) != found


def test_the_estimate_is_unbiased():
    """For sets of one distribution its mean is 0, also of few images; the biased one, with i = j, is not."""
    x, y = randn(4000, 4), randn(4000, 4, seed=1)
    found = kernel_distance(x, y, subsets=2000, subset_size=5)
    assert abs(found.mean) < 4 * found.std / math.sqrt(2000)
    kernel = (x[:5] @ x[:5].T / 4 + 1) ** 3
    assert kernel.diagonal().mean() / 5 > 4 * found.std / math.sqrt(2000)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "words"),
    [
        ((randn(9, 2), randn(20, 2)), {}, ValueError, "subset_size: expected at most 9, .*smaller set, got 1000"),
        ((randn(9, 2), randn(9, 3)), {}, ValueError, "generated: expected 2 features per image, as real, got 3"),
        ((randn(1, 2), randn(9, 2)), {}, ValueError, r"real: expected shape \(N, d\), N >= 2, got \(1, 2\)"),
        ((randn(9, 2), randn(9)), {}, ValueError, r"generated: expected shape \(N, d\), N >= 2, got \(9,\)"),
        ((randn(9, 2) / 0, randn(9, 2)), {}, ValueError, "real: expected finite numbers within 1e150"),
        ((1e120 * randn(9, 2), randn(9, 2)), {"subset_size": 9}, ValueError, "kernel is in the range of float64"),
        ((randn(9, 2).long(), randn(9, 2)), {}, TypeError, "real: expected floating-point numbers, got torch.int64"),
        ((randn(9, 2), randn(9, 2)), {"subset_size": 1}, ValueError, "subset_size: expected an integer >= 2, got 1"),
        ((randn(9, 2), randn(9, 2)), {"subsets": 0}, ValueError, "subsets: expected an integer >= 1, got 0"),
        ((randn(9, 2), randn(9, 2)), {"subsets": 1.5}, TypeError, "subsets: expected an integer, got 1.5"),
        ((randn(9, 2), randn(9, 2)), {"seed": -1}, ValueError, "seed: expected an integer in"),
    ],
)
def test_bad_arguments_of_the_kernel_distance(arguments, settings, error, words):
    with pytest.raises(error, match=words):
        kernel_distance(*arguments, **settings)
