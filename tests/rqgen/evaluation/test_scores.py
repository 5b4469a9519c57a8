"""Precision and recall of features, and the Inception score, by their definitions."""

import math

import numpy as np
import pytest
import torch

from rqgen.evaluation import inception_score, precision_recall, scores


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_share(points, centers, k):
    """Return the share of points in a ball, with an N x M x d tensor of differences."""
    between = (centers[:, None] - centers[None]).square().sum(-1).sqrt()
    radii = between.sort(1).values[:, k]  # the first is the vector itself
    return ((points[:, None] - centers[None]).square().sum(-1).sqrt() <= radii).any(1).double().mean().item()


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("block", [1, 130, 2**24])
def test_precision_and_recall_are_their_definition(monkeypatch, k, block):
    monkeypatch.setattr(scores, "_BLOCK", block)
    real, generated = randn(60, 4), 1.5 * randn(45, 4, seed=1) + 0.5
    found = precision_recall(real, generated, k)
    assert found.precision == naive_share(generated, real, k)
    assert found.recall == naive_share(real, generated, k)
    assert 0 < found.precision < 1 and 0 < found.recall < 1
    assert precision_recall(generated.numpy(), real.numpy(), k) == found[::-1]


def test_sets_with_known_precision_and_recall():
    line = torch.arange(10, dtype=torch.float64)[:, None]
    assert precision_recall(line, line) == (1.0, 1.0)
    assert precision_recall(line, line + 100) == (0.0, 0.0)
    # Half of the generated are at the real ones, half far away: they cover all real ones.
    assert precision_recall(line, torch.cat([line, line + 100])) == (0.5, 1.0)
    # One mode of two.
    assert precision_recall(torch.cat([line, line + 100]), line) == (1.0, 0.5)
    # On the surface of the ball around 0, whose radius is 3, and outside it.
    assert precision_recall(line[:4], torch.tensor([[-3.0], [-3.0], [-3.0], [-3.1], [9.0]]).double()).precision == 0.6


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_copies_are_inside_balls_without_a_radius(offset):
    """More than k copies of an image leave balls of radius 0, which hold further copies and nothing else."""
    real = randn(3, 50).repeat_interleave(5, dim=0) + offset
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    assert precision_recall(real, real[order]) == (1.0, 1.0)
    assert precision_recall(real, real + 1e-3) == (0.0, 0.0)


def test_a_vector_far_away_does_not_widen_the_balls_of_others():
    """Its rounding was that of all: at 1e7 times the others' length every vector was inside."""
    real, generated = randn(60, 64), 1.2 * randn(45, 64, seed=1)
    real[7] *= 1e7
    found = precision_recall(real, generated)
    assert found == (naive_share(generated, real, 3), naive_share(real, generated, 3))
    assert 0 < found.precision < 1


def test_nothing_of_all_pairs_is_made(monkeypatch):
    """Blocks of distances keep to their size, and no differences of all pairs exist."""
    monkeypatch.setattr(scores, "_BLOCK", 1000)
    sizes, squared_distances = [], scores._squared_distances

    def watched(x, y):
        found = squared_distances(x, y)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(scores, "_squared_distances", watched)
    precision_recall(randn(200, 3), randn(300, 3, seed=1))
    assert max(sizes) <= 1000 and sum(sizes) == 200 * 200 + 300 * 300 + 2 * 200 * 300


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((randn(9, 2), randn(7, 2), 7), ValueError, r"k: expected an integer in \[1, 6\], got 7"),
        ((randn(9, 2), randn(7, 2), 0), ValueError, r"k: expected an integer in \[1, 6\], got 0"),
        ((randn(9, 2), randn(7, 2), "3"), TypeError, "k: expected an integer, got '3'"),
        ((randn(9, 2), randn(7, 3)), ValueError, "generated: expected 2 features per image, as real, got 3"),
        ((randn(0, 2), randn(7, 2)), ValueError, r"real: expected shape \(N, d\), N >= 2, got \(0, 2\)"),
        ((randn(9, 2), randn(7, 2) * math.nan), ValueError, "generated: expected finite numbers .* in row 0"),
        ((randn(9, 2), randn(7, 2).int()), TypeError, "generated: expected floating-point numbers, got torch.int32"),
    ],
)
def test_bad_arguments_of_precision_and_recall(arguments, error, words):
    with pytest.raises(error, match=words):
        precision_recall(*arguments)


# --- Inception score ---------------------------------------------------------------------------------------


def naive_score(p, splits):
    """Return the formula in NumPy."""
    found = []
    for part in range(splits):
        some = p[part * len(p) // splits : (part + 1) * len(p) // splits]
        divergence = np.where(some > 0, some * (np.log(np.where(some > 0, some, 1)) - np.log(some.mean(0))), 0).sum(1)
        found.append(np.exp(divergence.mean()))
    return np.mean(found), np.std(found)


@pytest.mark.parametrize("splits", [1, 4, 10, 53])
def test_the_inception_score_is_its_definition(splits):
    p = (3 * randn(53, 6)).softmax(1)
    mean, std = inception_score(p, splits)
    expected = naive_score(p.numpy(), splits)
    assert mean == pytest.approx(expected[0], rel=1e-12) and std == pytest.approx(expected[1], rel=1e-9, abs=1e-12)
    assert inception_score(p.numpy(), splits) == (mean, std)


def test_scores_that_are_known():
    sure = torch.eye(8).repeat(20, 1)  # 0 log 0 is 0
    assert inception_score(sure, 10) == (pytest.approx(8, rel=1e-12), pytest.approx(0, abs=1e-12))
    assert inception_score(torch.eye(8)[:1].repeat(40, 1)).mean == 1
    assert inception_score(torch.full((30, 8), 1 / 8)).mean == pytest.approx(1, rel=1e-12)
    # The order counts: sorted by class, each part shows fewer of them.
    assert inception_score(torch.eye(8).repeat_interleave(20, 0), 8).mean == pytest.approx(1, rel=1e-12)


def test_sums_of_float32_rows_do_not_count():
    p = (3 * randn(400, 1000)).softmax(1)
    assert inception_score(p.float()).mean == pytest.approx(inception_score(p).mean, rel=1e-6)
    assert inception_score(p * 1.0005).mean == pytest.approx(inception_score(p).mean, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_of_short_types_are_taken(dtype):
    p = randn(400, 10).softmax(1)
    assert inception_score(p.to(dtype)).mean == pytest.approx(inception_score(p).mean, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            (randn(40, 6),),
            ValueError,
            "expected numbers >= 0 that sum up to 1 in each row, got row 0 with",
        ),
        ((torch.full((40, 6), 0.2),), ValueError, "row 0 with minimum 0.2 and sum 1.2"),
        ((torch.full((40, 6), math.nan),), ValueError, "probabilities: expected finite numbers"),
        ((torch.eye(6)[0],), ValueError, r"probabilities: expected shape \(N, d\), N >= 1, got \(6,\)"),
        ((torch.zeros(0, 6),), ValueError, r"got \(0, 6\)"),
        ((torch.eye(6).long(),), TypeError, "probabilities: expected floating-point numbers, got torch.int64"),
        ((torch.eye(6), 7), ValueError, r"splits: expected an integer in \[1, 6\], got 7"),
        ((torch.eye(6), 0), ValueError, r"splits: expected an integer in \[1, 6\], got 0"),
        ((torch.eye(6), 2.0), TypeError, "splits: expected an integer, got 2.0"),
    ],
)
def test_bad_arguments_of_the_inception_score(arguments, error, words):
    with pytest.raises(error, match=words):
        inception_score(*arguments)
