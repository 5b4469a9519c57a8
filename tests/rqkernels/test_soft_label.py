"""The definitions of soft labels and stochastic codes."""

from __future__ import annotations

import pytest
import torch

import rqkernels as rqk
from rqkernels.reference import distance_softmax, soft_label_cross_entropy


def test_distance_softmax_is_equation_15() -> None:
    x, e = torch.randn(2, 7, 5), torch.randn(9, 5)
    expected = torch.softmax(-torch.cdist(x.double(), e.double()[None]).square() / 0.7, dim=-1)
    q = distance_softmax(x, e, 0.7)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.double(), expected, rtol=1e-6, atol=1e-9)
    # A common offset moves no distance.
    torch.testing.assert_close(distance_softmax(x + 4096, e + 4096, 0.7), q, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_tau_must_be_positive(tau: float) -> None:
    with pytest.raises(ValueError, match="tau must be > 0"):
        distance_softmax(torch.zeros(1, 2), torch.zeros(3, 2), tau)


def test_cross_entropy_is_that_of_the_soft_target() -> None:
    x, e, logits = torch.randn(4, 3, 5), torch.randn(9, 5), torch.randn(4, 3, 9, requires_grad=True)
    target = distance_softmax(x, e, 0.5)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
    loss = soft_label_cross_entropy(logits, x, e, 0.5)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, (logits.softmax(-1) - target).detach() / 12)


def test_cross_entropy_with_a_codebook_per_depth() -> None:
    x, e, logits = torch.randn(4, 3, 5), torch.randn(3, 9, 5), torch.randn(4, 3, 9)
    rows = soft_label_cross_entropy(logits, x, e, 0.5, reduction="none")
    for d in range(3):
        alone = soft_label_cross_entropy(logits[:, d], x[:, d], e[d], 0.5, reduction="none")
        torch.testing.assert_close(rows[:, d], alone)


def test_cross_entropy_limits_of_tau() -> None:
    x, e, logits = torch.randn(50, 5), torch.randn(9, 5), torch.randn(50, 9)
    codes = rqk.residual_search(x, e, 1).codes[:, 0]
    hard = torch.nn.functional.cross_entropy(logits, codes)
    torch.testing.assert_close(soft_label_cross_entropy(logits, x, e, 1e-6), hard)
    uniform = (logits.logsumexp(-1) - logits.mean(-1)).mean()
    torch.testing.assert_close(soft_label_cross_entropy(logits, x, e, 1e8), uniform)


def test_cross_entropy_mask_and_reductions() -> None:
    x, e, logits = torch.randn(6, 5), torch.randn(9, 5), torch.randn(6, 9)
    mask = torch.tensor([True, False, True, True, False, True])
    rows = soft_label_cross_entropy(logits, x, e, 0.5, reduction="none")
    assert soft_label_cross_entropy(logits, x, e, 0.5, mask=mask, reduction="none")[~mask].eq(0).all()
    torch.testing.assert_close(soft_label_cross_entropy(logits, x, e, 0.5, mask=mask), rows[mask].mean())
    torch.testing.assert_close(
        soft_label_cross_entropy(logits, x, e, 0.5, mask=mask, reduction="sum"), rows[mask].sum()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(reduction="avg"), "reduction must be"),
        (dict(x=torch.zeros(5, 4)), "must agree up to the last dimension"),
        (dict(codebook=torch.zeros(8, 4)), "logits have 9 codes, the codebook has 8"),
        (dict(codebook=torch.zeros(2, 9, 4)), "x has 6 depths, but there are 2 codebooks"),
    ],
)
def test_cross_entropy_names_bad_arguments(change: dict[str, object], message: str) -> None:
    good = {"logits": torch.zeros(6, 9), "x": torch.zeros(6, 4), "codebook": torch.zeros(9, 4), "tau": 1.0}
    with pytest.raises(ValueError, match=message):
        soft_label_cross_entropy(**{**good, **change})
