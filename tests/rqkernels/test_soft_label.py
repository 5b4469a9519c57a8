"""Soft labels: the definitions, and the kernels against them in float64."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rqkernels as rqk
from rqkernels.reference import (
    distance_softmax,
    fused_linear_soft_label_cross_entropy,
    soft_label_cross_entropy,
)


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
        (dict(codebook=torch.zeros(2, 9, 4)), r"x must be \(\.\.\., D, C\) .* with D = 2"),
    ],
)
def test_cross_entropy_names_bad_arguments(change: dict[str, object], message: str) -> None:
    good = {"logits": torch.zeros(6, 9), "x": torch.zeros(6, 4), "codebook": torch.zeros(9, 4), "tau": 1.0}
    with pytest.raises(ValueError, match=message):
        soft_label_cross_entropy(**{**good, **change})


# --- the kernels -----------------------------------------------------------------------------------------

HALVES = [torch.float16, torch.bfloat16]


def pytorch(x: Tensor, codebook: Tensor, tau: float) -> Tensor:
    """Equation 15 in float32, as published code has it: the expanded square."""
    if codebook.dim() == 3:
        return torch.stack([pytorch(x[..., d, :], e, tau) for d, e in enumerate(codebook)], -2)
    x, codebook = x.float(), codebook.float()
    squares = x.square().sum(-1, keepdim=True) + codebook.square().sum(-1) - 2 * x @ codebook.T
    return torch.softmax(-squares / tau, -1)


def pytorch_loss(logits: Tensor, x: Tensor, codebook: Tensor, tau: float) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    return -(pytorch(x, codebook, tau).to(log_p.dtype) * log_p).sum(-1)


def loss_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return value.detach().double(), grad.double()


def truth(logits: Tensor, x: Tensor, codebook: Tensor, tau: float, **options: object) -> tuple[Tensor, Tensor]:
    return loss_and_gradient(lambda v: soft_label_cross_entropy(v, x, codebook, tau, **options), logits.double())


@pytest.mark.parametrize("n", [0, 1, 129])
@pytest.mark.parametrize("depth", [None, 1, 4])
@pytest.mark.parametrize("c", [1, 17, 256])
@pytest.mark.parametrize("k", [1, 257])
def test_equals_the_definition(n: int, depth: int | None, k: int, c: int) -> None:
    leading = (n,) if depth is None else (n, depth)
    x, e = torch.randn(*leading, c), torch.randn(*(() if depth is None else (depth,)), k, c)
    logits = torch.randn(*leading, k)
    tau = 0.3 * c
    q = rqk.distance_softmax(x, e, tau)
    expected = distance_softmax(x, e, tau, dtype=torch.float64)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.double(), expected, rtol=2e-5, atol=1e-12)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction}
        loss, grad = loss_and_gradient(lambda v: rqk.soft_label_cross_entropy(v, x, e, tau, **options), logits)  # noqa: B023
        true_loss, true_grad = truth(logits, x, e, tau, **options)
        torch.testing.assert_close(loss, true_loss, rtol=2e-6, atol=2e-6, equal_nan=True)
        torch.testing.assert_close(grad, true_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("c", [4, 64])
@pytest.mark.parametrize("ratio", [1e-3, 1e-1, 1e1, 1e3, 1e5])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_errors_are_no_larger_than_those_of_pytorch(c: int, ratio: float, size: float, device: torch.device) -> None:
    x, e, logits = torch.randn(200, c), torch.randn(300, c), size * torch.randn(200, 300)
    tau = 2 * c / ratio
    true_loss, true_grad = truth(logits, x, e, tau, reduction="none")
    x, e, logits = x.to(device), e.to(device), logits.to(device)
    errors = []
    for loss in (rqk.soft_label_cross_entropy, pytorch_loss):
        options = {"reduction": "none"} if loss is rqk.soft_label_cross_entropy else {}
        value, grad = loss_and_gradient(lambda v: loss(v, x, e, tau, **options), logits)  # noqa: B023
        errors.append(((value.cpu() - true_loss).abs().max().item(), (grad.cpu() - true_grad).abs().max().item()))
    (loss_error, grad_error), (torch_loss_error, torch_grad_error) = errors
    assert loss_error <= 1.1 * torch_loss_error + 2e-7 * size
    assert grad_error <= 1.1 * torch_grad_error + 2e-7


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_lose_no_more_than_their_rounding(dtype: torch.dtype) -> None:
    x, e = torch.randn(70, 24).to(dtype), torch.randn(300, 24).to(dtype)
    logits = (4 * torch.randn(70, 300)).to(dtype)
    for tau in (0.5, 10.0):
        true_loss, true_grad = truth(logits, x, e, tau)
        loss, grad = loss_and_gradient(lambda v: rqk.soft_label_cross_entropy(v, x, e, tau), logits)  # noqa: B023
        assert abs(loss - true_loss) <= 2e-6 * abs(true_loss)
        half = torch.finfo(dtype).eps / 2
        # Below the normal float16 numbers, half a step of 2^-24.
        least = 2.0**-25 if dtype == torch.float16 else 0.0
        assert ((grad - true_grad).abs() <= 1.01 * half * true_grad.abs() + least + 1e-6 / 70).all()
        rows, _ = loss_and_gradient(lambda v: rqk.soft_label_cross_entropy(v, x, e, tau, reduction="none"), logits)  # noqa: B023
        torch.testing.assert_close(rows, truth(logits, x, e, tau, reduction="none")[0], rtol=2e-6, atol=2e-6)


def test_a_float16_gradient_survives_the_mean_of_many_rows() -> None:
    """For 16384 rows, entries are some 1e-8, below all float16 numbers; backward's factor is to find them whole."""
    x, e = torch.randn(16384, 2), torch.randn(64, 2)
    logits = torch.randn(16384, 64).half()
    scaled = {}
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        loss = rqk.soft_label_cross_entropy(leaf * 1, x, e, 1.0, inplace=inplace)
        (grad,) = torch.autograd.grad(loss * 65536, leaf)
        scaled[inplace] = grad
    true = truth(logits, x, e, 1.0)[1] * 65536
    assert ((scaled[False].double() - true).abs() <= 2e-3 * true.abs() + 2e-5).all()
    assert torch.equal(scaled[False], scaled[True])


def assert_rounded_once(gradient: Tensor, true: Tensor, factor: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Within half a last place of the truth and the error of float32 in softmax - Q; infinite where the truth is."""
    limits = torch.finfo(dtype)
    places = 1.02 * roundings * limits.eps / 2
    error = places * true.abs() + 2e-7 * factor.abs()[..., None] + 0.51 * limits.smallest_normal * limits.eps
    over = true.abs() > limits.max * (1 + limits.eps / 4)
    near = (true.abs() - limits.max).abs() <= error
    assert not gradient.isnan().any()
    assert torch.equal(gradient.isinf() | near, over | near)
    kept = gradient.isfinite()
    assert ((gradient - true).abs() <= error)[kept].all()


@pytest.mark.parametrize("way", ["plain", "inplace", "losses_out"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_halves_are_the_truth_rounded_once(
    dtype: torch.dtype, reduction: str, way: str, device: torch.device
) -> None:
    """Gradients that reach backward: means over up to 9000 rows, loss scales up to 2^24, rows that differ by 10^16."""
    for n, k in ((1, 16384), (100, 64), (3000, 64), (9000, 50)):
        x, e, logits, mask = (
            torch.randn(n, 4),
            torch.randn(k, 4),
            (3 * torch.randn(n, k)).to(dtype),
            torch.rand(n) < 0.7,
        )
        mask[0] = True
        rows = 10.0 ** torch.empty(n).uniform_(-8, 8) if n != 3000 else torch.ones(n)
        for scale in (1e-6, 1.0, 2.0**16, 2.0**24):

            def gradient(loss: Callable[..., Tensor], logits: Tensor, **options: object) -> Tensor:
                leaf, on = logits.detach().clone().requires_grad_(), logits.device
                given = (x.to(on), e.to(on), 1.0)  # noqa: B023
                value = loss(leaf * 1, *given, mask=mask.to(on), reduction=reduction, **options)  # noqa: B023
                # As a training loop would: the mean of the rows' losses, and what a scaler makes of it.
                value = (value * rows.to(on)).mean() if reduction == "none" else value  # noqa: B023
                (value * scale).backward()  # noqa: B023
                return leaf.grad.cpu().double()

            options = {"inplace": True} if way == "inplace" else {}
            if way == "losses_out":
                options = {"losses_out": torch.empty(n, device=device)}
            found = gradient(rqk.soft_label_cross_entropy, logits.to(device), **options)
            true = gradient(soft_label_cross_entropy, logits.double())
            of_rows = {"mean": 1 / mask.sum(), "sum": torch.ones(()), "none": rows / n}[reduction].double() * scale
            twice = dtype == torch.bfloat16 and reduction != "none"
            assert_rounded_once(found, true, of_rows.expand(n), dtype, roundings=2 if twice else 1)


def test_a_loss_scaled_by_one_costs_bfloat16_no_second_rounding() -> None:
    x, e, logits = torch.randn(100, 4), torch.randn(64, 4), torch.randn(100, 64).bfloat16()
    _, grad = loss_and_gradient(lambda v: rqk.soft_label_cross_entropy(v, x, e, 1.0), logits)
    assert_rounded_once(grad, truth(logits, x, e, 1.0)[1], torch.full((100,), 0.01), torch.bfloat16)


def test_float16_in_place_is_checked_in_forward_and_writes_in_backward() -> None:
    x, e = torch.randn(4, 2, 8), torch.randn(50, 8)
    leaf = torch.randn(4, 2, 50).half().requires_grad_()
    with pytest.raises(ValueError, match="inplace needs logits that share no memory"):
        rqk.soft_label_cross_entropy((leaf[:1] * 1).expand(4, 2, 50), x, e, 2.0, inplace=True)
    turned = (leaf.transpose(1, 2) * 1).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"inplace needs logits .* make them contiguous first"):
        rqk.soft_label_cross_entropy(turned, x, e, 2.0, inplace=True)
    logits = leaf * 1
    loss = rqk.soft_label_cross_entropy(logits, x, e, 2.0, inplace=True)
    assert torch.equal(logits, leaf)
    (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(logits, grad)
    with pytest.raises(RuntimeError, match="with inplace=True backward runs once"):
        torch.autograd.grad(loss, leaf)
    # A function that keeps its result for its own backward finds it changed, and so does the loss.
    kept = leaf.exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rqk.soft_label_cross_entropy(kept, x, e, 2.0, inplace=True).backward()
    logits = leaf * 1
    loss = rqk.soft_label_cross_entropy(logits, x, e, 2.0)
    logits.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tau_to_zero_is_the_certified_code(draw: Callable[..., tuple[Tensor, Tensor]], kind: str) -> None:
    x, e = draw(kind, 33, 70, 12, torch.device("cpu"))
    logits = torch.randn(33, 70)
    codes = rqk.residual_search(x, e, 1).codes[:, 0]
    distances = torch.stack([(r.double() - e.double()).square().sum(-1) for r in x])
    nearest = distances.min(-1, keepdim=True).values
    rest = torch.where(distances > nearest * (1 + 1e-12), distances - nearest, math.inf)
    tau = rest.min().item() / 200
    if tau in (0.0, math.inf):
        tau = 1e-30
    # Equal codes share their label.
    label = (distances <= nearest * (1 + 1e-12)).double()
    label /= label.sum(-1, keepdim=True)
    assert label.gather(1, codes[:, None]).gt(0).all()
    q = rqk.distance_softmax(x, e, tau)
    torch.testing.assert_close(q.double(), label, rtol=0, atol=1e-6)
    loss = rqk.soft_label_cross_entropy(logits, x, e, tau)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, label.float()))


def test_large_tau_is_uniform() -> None:
    x, e = torch.randn(20, 5), torch.randn(70, 5)
    for tau in (1e9, 1e60, math.inf):
        assert torch.allclose(rqk.distance_softmax(x, e, tau), torch.full((20, 70), 1 / 70), rtol=1e-6)


def test_codes_off_the_origin_keep_their_digits() -> None:
    x, e = torch.randn(40, 64), torch.randn(90, 64)
    x, e = (x + 1000).float(), (e + 1000).float()
    expected = distance_softmax(x, e, 8.0, dtype=torch.float64)
    worst = (pytorch(x, e, 8.0).double() - expected).abs().max()
    assert (rqk.distance_softmax(x, e, 8.0).double() - expected).abs().max() < 2e-5 < worst


def test_small_labels_keep_their_relative_error() -> None:
    x, e = torch.randn(60, 16), torch.randn(300, 16)
    q, expected = rqk.distance_softmax(x, e, 0.5), distance_softmax(x, e, 0.5, dtype=torch.float64)
    kept = expected > 1e-37
    assert (expected[kept] < 1e-30).any()
    assert ((q.double() - expected)[kept].abs() <= 1e-4 * expected[kept]).all()


def test_values_at_the_ends_of_float() -> None:
    for scale in (1e-30, 1e18, 1e30):
        x, e = scale * torch.randn(9, 6), scale * torch.randn(40, 6)
        q = rqk.distance_softmax(x, e, scale**2 * 3)
        expected = distance_softmax(x, e, scale**2 * 3, dtype=torch.float64)
        torch.testing.assert_close(q.double(), expected, rtol=1e-5, atol=1e-9)


def test_threads_and_neighbours_change_nothing() -> None:
    x, e, logits = torch.randn(150, 20), torch.randn(513, 20), 3 * torch.randn(150, 513)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for tau in (1e-4, 5.0):
                rows = {"reduction": "none"}
                whole = loss_and_gradient(lambda v: rqk.soft_label_cross_entropy(v, x, e, tau, **rows), logits)  # noqa: B023
                mean = rqk.soft_label_cross_entropy(logits, x, e, tau)
                results.append((tau, *whole, mean, rqk.distance_softmax(x, e, tau)))
                for first, last in ((0, 1), (30, 37), (32, 150)):
                    part = slice(first, last)
                    loss, grad = loss_and_gradient(
                        lambda v: rqk.soft_label_cross_entropy(v, x[part], e, tau, **rows),  # noqa: B023
                        logits[part],
                    )
                    assert torch.equal(loss, whole[0][part]) and torch.equal(grad, whole[1][part])
    finally:
        torch.set_num_threads(threads)
    for other in results[2:]:
        same = results[0 if other[0] == results[0][0] else 1]
        assert all(torch.equal(a, b) for a, b in zip(other[1:], same[1:], strict=True))


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_threads_that_share_the_codes_of_a_tile_change_nothing(offset: float) -> None:
    # Few rows and many numbers of codes: with one thread a tile at a time, with more a share of the codes each.
    x, e, logits = torch.randn(70, 128) + offset, torch.randn(6151, 128) + offset, 3 * torch.randn(70, 6151)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for n in (70, 5):
                rows = {"reduction": "none"}
                found.append(
                    loss_and_gradient(lambda v: rqk.soft_label_cross_entropy(v, x[:n], e, 9.0, **rows), logits[:n])  # noqa: B023
                )
                found[-1] += (rqk.distance_softmax(x[:n], e, 9.0),)
    finally:
        torch.set_num_threads(threads)
    expected = distance_softmax(x, e, 9.0, dtype=torch.float64)
    torch.testing.assert_close(found[0][2].double(), expected, rtol=1e-4, atol=1e-9)
    for other in found:
        assert all(torch.equal(a, b[: len(a)]) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_strided_logits(dtype: torch.dtype) -> None:
    x, e = torch.randn(6, 5, 4, 8), torch.randn(4, 50, 8)
    whole = torch.randn(7, 5, 4, 64).to(dtype)
    views = {
        "contiguous": whole[:6, ..., :50].contiguous(),
        "two strides": whole[:6, ..., 3:53],
        "flipped": whole.permute(1, 0, 2, 3)[:, 1:, ..., :50].transpose(0, 1),
        "codes apart": whole[:6].transpose(-1, -2).contiguous().transpose(-1, -2)[..., :50],
        "every other": whole.repeat(1, 1, 1, 2)[:6, ..., ::2][..., :50],
    }
    for name, logits in views.items():
        results = []
        for v in (logits, logits.contiguous()):
            leaf = v.detach().requires_grad_()
            loss = rqk.soft_label_cross_entropy(leaf, x, e, 2.0)
            results.append((loss, *torch.autograd.grad(loss, leaf)))
        (loss, grad), (expected, expected_grad) = results
        assert torch.equal(loss, expected) and torch.equal(grad, expected_grad), name
    # One codebook for all depths is as many rows.
    shared = rqk.soft_label_cross_entropy(views["two strides"], x, e[0], 2.0, reduction="none")
    flat = rqk.soft_label_cross_entropy(
        views["two strides"].flatten(0, 2), x.flatten(0, 2), e[0], 2.0, reduction="none"
    )
    assert torch.equal(shared.flatten(), flat)


def test_leading_shapes() -> None:
    e = torch.randn(50, 8)
    for leading in ((), (1,), (2, 3), (2, 0, 3)):
        x, logits = torch.randn(*leading, 8), torch.randn(*leading, 50)
        loss = rqk.soft_label_cross_entropy(logits, x, e, 2.0, reduction="none")
        torch.testing.assert_close(loss, soft_label_cross_entropy(logits, x, e, 2.0, reduction="none"))
        assert rqk.distance_softmax(x, e, 2.0).shape == logits.shape


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masked_rows_are_as_if_absent(inplace: bool, reduction: str) -> None:
    x, e, logits = torch.randn(90, 2, 8), torch.randn(2, 50, 8), torch.randn(90, 2, 50)
    mask = torch.rand(90, 2) < 0.6
    logits[~mask] = torch.nan
    x[~mask] = torch.inf
    leaf = logits.clone().requires_grad_()
    loss = rqk.soft_label_cross_entropy(leaf * 1, x, e, 2.0, mask=mask, reduction=reduction, inplace=inplace)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    true_loss, true_grad = truth(logits.nan_to_num(), x.nan_to_num(0, 0, 0), e, 2.0, mask=mask, reduction=reduction)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6)
    assert grad[~mask].eq(0).all()
    if reduction == "none":
        assert loss[~mask].eq(0).all()


def test_no_rows() -> None:
    x, e, logits = torch.randn(3, 8), torch.randn(50, 8), torch.randn(3, 50, requires_grad=True)
    loss = rqk.soft_label_cross_entropy(logits, x, e, 2.0, mask=torch.zeros(3, dtype=torch.bool))
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.eq(0).all()
    assert rqk.soft_label_cross_entropy(logits[:0], x[:0], e, 2.0).isnan()
    assert rqk.soft_label_cross_entropy(logits[:0], x[:0], e, 2.0, reduction="sum") == 0


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("k", [20, 257])
def test_logits_that_are_not_finite(dtype: torch.dtype, k: int) -> None:
    x, e, logits = torch.randn(6, 8), torch.randn(k, 8), torch.randn(6, k).to(dtype)
    e[3] = 1e4  # so far away that its label is zero
    logits[0, 3] = -torch.inf
    logits[1, 5] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 7] = torch.nan
    logits[4, 7] = torch.inf
    rows = {"reduction": "none"}
    loss, grad = loss_and_gradient(lambda v: rqk.soft_label_cross_entropy(v, x, e, 2.0, **rows), logits)
    expected, expected_grad = truth(logits, x, e, 2.0, **rows)
    assert loss[0].isfinite() and loss[1] == torch.inf
    assert loss[2:5].isnan().all() and grad[2:5].isnan().all()
    kept = [0, 1, 5]
    torch.testing.assert_close(loss[kept], expected[kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[kept], expected_grad[kept], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_of_x_that_are_not_finite(bad: float) -> None:
    x, e, logits = torch.randn(5, 8), torch.randn(20, 8), torch.randn(5, 20)
    good = rqk.soft_label_cross_entropy(logits, x, e, 2.0, reduction="none")
    x[2, 3] = bad
    rows = {"reduction": "none"}
    loss, grad = loss_and_gradient(lambda v: rqk.soft_label_cross_entropy(v, x, e, 2.0, **rows), logits)
    q = rqk.distance_softmax(x, e, 2.0)
    for result in (loss, grad, q):
        assert result[2].isnan().all() and result[[0, 1, 3, 4]].isfinite().all()
    others = [0, 1, 3, 4]
    assert torch.equal(loss[others].float(), good[others])


def test_one_code_and_equal_codes() -> None:
    x = torch.randn(5, 8)
    assert rqk.soft_label_cross_entropy(torch.randn(5, 1), x, torch.randn(1, 8), 1e-3).abs() < 1e-6
    equal = torch.randn(1, 8).expand(30, 8)
    for tau in (1e-20, 1.0):
        assert torch.allclose(rqk.distance_softmax(x, equal, tau), torch.full((5, 30), 1 / 30), rtol=1e-6)


# --- autograd --------------------------------------------------------------------------------------------


def test_in_place_overwrites_the_logits_with_their_gradient() -> None:
    x, e, leaf = torch.randn(40, 8), torch.randn(50, 8), torch.randn(40, 50, requires_grad=True)
    plain = rqk.soft_label_cross_entropy(leaf * 1, x, e, 2.0)
    (expected,) = torch.autograd.grad(plain, leaf)
    for factor in (1.0, 0.5):
        logits = leaf * 1
        loss = rqk.soft_label_cross_entropy(logits, x, e, 2.0, inplace=True)
        assert torch.equal(loss, plain)
        (grad,) = torch.autograd.grad(loss * factor, leaf, retain_graph=True)
        assert torch.equal(grad, expected * factor)
        assert torch.equal(logits, expected * factor)
        with pytest.raises(RuntimeError, match="with inplace=True backward runs once"):
            torch.autograd.grad(loss, leaf)


def test_in_place_on_a_view() -> None:
    x, e = torch.randn(4, 3, 8), torch.randn(50, 8)
    hidden, weight = torch.randn(12, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    results = []
    for inplace in (False, True):
        logits = torch.nn.functional.linear(hidden, weight).view(4, 3, 50)
        loss = rqk.soft_label_cross_entropy(logits, x, e, 2.0, inplace=inplace)
        results.append(torch.autograd.grad(loss, (hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


MEMORY_SCRIPT = """
import ctypes, re, torch, rqkernels as rqk
from pathlib import Path
torch.set_num_threads(1)
status = lambda key: int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def peak(call):
    call(512)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call(4096)
    return (status("VmHWM") - before) / (4096 * 4096 * 4)
x, e = torch.randn(4096, 16), torch.randn(4096, 16)
logits = torch.randn(4096, 4096, requires_grad=True)
h, w = torch.randn(4096, 32, requires_grad=True), torch.randn(4096, 32, requires_grad=True)
def plain(n):
    leaf = logits.detach()[:n].requires_grad_()
    torch.autograd.grad(rqk.soft_label_cross_entropy(leaf, x[:n], e, 2.0), leaf)
def in_place(n):
    leaf = logits.detach()[:n].requires_grad_()
    torch.autograd.grad(rqk.soft_label_cross_entropy(leaf.view_as(leaf), x[:n], e, 2.0, inplace=True), leaf)
def fused(n):
    torch.autograd.grad(rqk.fused_linear_soft_label_cross_entropy(h[:n], w, None, x[:n], e, 2.0), (h, w))
few = [peak(plain) - 1, peak(in_place), peak(fused)]
torch.set_num_threads(2)
x, e, logits = torch.randn(1024, 32), torch.randn(16384, 32), torch.randn(1024, 16384)
in_place(64)
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
in_place(1024)
print(*few, (status("VmHWM") - before) / (1024 * 16384 * 4))
"""


def test_memory_added_to_the_gradient() -> None:
    """Memory in units of the logits: at most a twentieth next to them, and with the classifier its budget."""
    environment = {**os.environ, "PYTHONPATH": str(Path(rqk.__file__).resolve().parent.parent)}
    run = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    plain, in_place, fused, of_few_rows = map(float, run.stdout.split())
    assert plain < 0.05 and in_place < 0.05 and of_few_rows < 0.05
    assert fused < 0.75  # 32 MiB of 64, and gradients


def test_in_place_leaves_logits_alone_without_a_gradient_to_come() -> None:
    x, e, logits = torch.randn(4, 8), torch.randn(50, 8), torch.randn(4, 50)
    before = logits.clone()
    rqk.soft_label_cross_entropy(logits, x, e, 2.0, inplace=True)
    with torch.no_grad():
        rqk.soft_label_cross_entropy(logits.requires_grad_(), x, e, 2.0, inplace=True)
    assert torch.equal(logits, before)


def test_in_place_is_refused_where_it_would_do_harm() -> None:
    x, e, leaf = torch.randn(4, 2, 8), torch.randn(50, 8), torch.randn(4, 2, 50, requires_grad=True)
    loss = rqk.soft_label_cross_entropy
    with pytest.raises(ValueError, match="inplace would overwrite logits that are a leaf"):
        loss(leaf, x, e, 2.0, inplace=True)
    with pytest.raises(ValueError, match="inplace needs logits that share no memory"):
        loss((leaf[:1] * 1).expand(4, 2, 50), x, e, 2.0, inplace=True)
    with pytest.raises(ValueError, match=r"inplace needs logits .* make them contiguous first"):
        loss((leaf.transpose(1, 2) * 1).contiguous().transpose(1, 2), x, e, 2.0, inplace=True)
    # The exponential keeps its result for its own backward.
    kept = leaf.exp()
    value = loss(kept, x, e, 2.0, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("kind", ["plain", "inplace", "fused"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_of_rows_next_to_the_loss(kind: str, reduction: str) -> None:
    """Row losses change neither the loss nor its gradient, which is still written once, and have none themselves."""
    x, e, mask = torch.randn(40, 8), torch.randn(50, 8), torch.rand(40) < 0.8
    hidden, weight = torch.randn(40, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)

    def loss(**options: object) -> Tensor:
        arguments = dict(mask=mask, **{"reduction": reduction, **options})
        if kind == "fused":
            return rqk.fused_linear_soft_label_cross_entropy(hidden, weight, None, x, e, 2.0, **arguments)
        logits = torch.nn.functional.linear(hidden, weight)
        return rqk.soft_label_cross_entropy(logits, x, e, 2.0, inplace=kind == "inplace", **arguments)

    rows = loss(reduction="none").detach()
    for no_grad in (False, True):
        losses = torch.full((40,), math.nan)
        with torch.inference_mode(no_grad):
            found, expected = loss(losses_out=losses), loss()
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
        assert torch.equal(losses, rows) and not losses.requires_grad and found.requires_grad != no_grad
        if not no_grad:
            grads = (torch.autograd.grad((total * 0.5).sum(), (hidden, weight)) for total in (found, expected))
            for grad, expected_grad in zip(*grads, strict=True):
                assert torch.equal(grad, expected_grad)


def test_backward_may_run_again() -> None:
    x, e, logits = torch.randn(4, 8), torch.randn(50, 8), torch.randn(4, 50, requires_grad=True)
    loss = rqk.soft_label_cross_entropy(logits, x, e, 2.0)
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    loss.backward(retain_graph=True)
    assert torch.equal(logits.grad, 2 * first)
    (loss * 3).backward()
    torch.testing.assert_close(logits.grad, 5 * first)


def test_the_definition_has_the_right_gradient() -> None:
    x, e = torch.randn(3, 2, 4), torch.randn(2, 6, 4)
    logits = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: soft_label_cross_entropy(v, x, e, 1.5), logits)
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 5), (6, 5), (6,)))
    assert torch.autograd.gradcheck(
        lambda h, w, b: fused_linear_soft_label_cross_entropy(h, w, b, x, e, 1.5), (hidden, weight, bias)
    )


def test_opcheck() -> None:
    x, e = torch.randn(3, 2, 6), torch.randn(2, 9, 6)
    logits, mask = torch.randn(3, 2, 9, requires_grad=True), torch.rand(3, 2) < 0.5
    torch.library.opcheck(torch.ops.rqkernels.distance_softmax.default, (x, e, 2.0))
    op = torch.ops.rqkernels.soft_label_cross_entropy.default
    weight = torch.tensor(0.25)
    torch.library.opcheck(op, (logits, x, e, 2.0, None, weight, True, True))
    torch.library.opcheck(op, (logits, x, e, 2.0, mask, None, False, True))
    half = logits.detach().half().requires_grad_()
    torch.library.opcheck(op, (half, x, e, 2.0, None, weight, True, False))
    torch.library.opcheck(op, (half, x, e, 2.0, mask, None, False, False))
    torch.library.opcheck(op, (logits.detach(), x, e, 2.0, mask, torch.rand(3, 2), False, False))
    op = torch.ops.rqkernels.soft_label_cross_entropy_.default
    torch.library.opcheck(op, (logits.detach().clone(), x, e, 2.0, mask, weight, True))
    torch.library.opcheck(op, (logits.detach().clone(), x, e, 2.0, mask, weight, False))
    op = torch.ops.rqkernels.fused_linear_soft_label_cross_entropy.default
    hidden, w, b = (torch.randn(s, requires_grad=True) for s in ((3, 2, 5), (9, 5), (9,)))
    torch.library.opcheck(op, (hidden, w, b, x, e, 2.0, mask, weight, True, True, torch.float32))
    torch.library.opcheck(op, (hidden, w, None, x, e, 2.0, None, None, False, False, torch.float32))
    torch.library.opcheck(op, (hidden, w, b, x, e, 2.0, mask, weight, True, True, torch.bfloat16))
    torch.library.opcheck(
        op, (hidden.detach(), w.detach(), None, x, e, 2.0, mask, torch.rand(3, 2), False, True, torch.half)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_in_one_graph(reduction: str) -> None:
    x, e = torch.randn(30, 8), torch.randn(50, 8)
    hidden, w, b = (torch.randn(s, requires_grad=True) for s in ((30, 6), (50, 6), (50,)))

    def separate(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return rqk.soft_label_cross_entropy(torch.nn.functional.linear(h, w, b), x, e, 2.0, reduction=reduction)

    def fused(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return rqk.fused_linear_soft_label_cross_entropy(h, w, b, x, e, 2.0, reduction=reduction)

    for function in (separate, fused):
        expected = torch.autograd.grad(function(hidden, w, b).sum(), (hidden, w, b))
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(hidden, w, b).sum(), (hidden, w, b))
        for a, b_ in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b_)

    def with_losses(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        losses = h.new_empty(30), h.new_empty(30)
        logits = torch.nn.functional.linear(h, w, b)
        both = (
            rqk.soft_label_cross_entropy(logits, x, e, 2.0, losses_out=losses[0]),
            rqk.fused_linear_soft_label_cross_entropy(h, w, b, x, e, 2.0, losses_out=losses[1]),
        )
        return sum(both), torch.stack(losses)

    results = []
    for function in (with_losses, torch.compile(with_losses, fullgraph=True, backend="aot_eager")):
        total, rows = function(hidden, w, b)
        results.append((total, rows, *torch.autograd.grad(total, (hidden, w, b))))
    for a, b_ in zip(*results, strict=True):
        torch.testing.assert_close(a, b_)

    def in_place(h: Tensor) -> Tensor:
        return rqk.soft_label_cross_entropy(torch.nn.functional.linear(h, w, b), x, e, 2.0, inplace=True)

    with pytest.raises(Exception, match="inplace cannot be traced"):
        torch.compile(in_place, fullgraph=True, backend="aot_eager")(hidden)


# --- with the classifier ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_fused_linear(shared: bool, reduction: str, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from rqkernels.ops import soft_label

    monkeypatch.setattr(soft_label, "_LOGITS_BUDGET", 5 * 4 * 257 * 4)  # five positions at a time
    x, e = torch.randn(4, 7, 4, 8), torch.randn(*(() if shared else (4,)), 257, 8)
    mask = torch.rand(4, 7, 4) < 0.7
    hidden, weight, bias = (torch.randn(s, requires_grad=True) for s in ((4, 7, 4, 12), (257, 12), (257,)))
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    options = {"mask": mask, "reduction": reduction}
    factor = torch.rand(4, 7, 4) if reduction == "none" else torch.tensor(0.7)
    loss = rqk.fused_linear_soft_label_cross_entropy(
        hidden, weight, leaves[2] if with_bias else None, x, e, 2.0, **options
    )
    grads = torch.autograd.grad((loss * factor).sum(), leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    true = fused_linear_soft_label_cross_entropy(*doubles[:2], doubles[2] if with_bias else None, x, e, 2.0, **options)
    true_grads = torch.autograd.grad((true * factor).sum(), doubles)
    torch.testing.assert_close(loss.double(), true, rtol=2e-6, atol=2e-6)
    for grad, expected in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_fused_linear_under_autocast(dtype: torch.dtype) -> None:
    x, e = torch.randn(60, 8), torch.randn(100, 8)
    hidden, weight, bias = (torch.randn(s, requires_grad=True) for s in ((60, 16), (100, 16), (100,)))
    errors = []
    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    true = fused_linear_soft_label_cross_entropy(*doubles, x, e, 2.0)
    true_grads = torch.autograd.grad(true, doubles)
    for function in (rqk.fused_linear_soft_label_cross_entropy, fused_linear_soft_label_cross_entropy):
        with torch.autocast("cpu", dtype=dtype):
            loss = function(hidden, weight, bias, x, e, 2.0)
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss * 64, (hidden, weight, bias))
        assert all(grad.dtype == torch.float32 for grad in grads)
        errors.append(
            [
                (loss - true).abs().item(),
                *((g / 64 - t).abs().max().item() for g, t in zip(grads, true_grads, strict=True)),
            ]
        )
    for ours, pytorchs in zip(*errors, strict=True):
        assert ours <= 1.5 * pytorchs + 1e-6


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", HALVES)
def test_fused_linear_in_halves_at_any_scale(
    dtype: torch.dtype,
    reduction: str,
    autocast: bool,
    shared: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss's factor does not change the relative error: PyTorch's where nothing overflows. In chunks."""
    from rqkernels.ops import soft_label

    monkeypatch.setattr(soft_label, "_LOGITS_BUDGET", 1000 * 50 * 2)
    for n in (1, 4000):
        x, e = torch.randn(n, 2, 4), torch.randn(*(() if shared else (2,)), 50, 4)
        mask = torch.rand(n, 2) < 0.7
        mask[0] = True
        given = [torch.randn(n, 2, 16), 0.3 * torch.randn(50, 16), torch.randn(50)]
        given = given if autocast else [t.to(dtype) for t in given]
        rows = 10.0 ** torch.empty(n, 2).uniform_(-6, 6)

        def gradients(loss: Callable[..., Tensor], given: list[Tensor], scale: float, half: bool) -> list[Tensor]:
            on = device if half else torch.device("cpu")
            leaves = [t.detach().clone().to(on).requires_grad_() for t in given]
            with torch.autocast(on.type, dtype=dtype, enabled=half and autocast):
                value = loss(*leaves, x.to(on), e.to(on), 1.0, mask=mask.to(on), reduction=reduction)  # noqa: B023
            value = (value * rows.to(on)).mean() if reduction == "none" else value  # noqa: B023
            return [grad.cpu().double() / scale for grad in torch.autograd.grad(value * scale, leaves)]

        true = gradients(fused_linear_soft_label_cross_entropy, [t.double() for t in given], 1.0, False)
        # What its autograd, too, can do: logits in half precision, with factors that it does not lose.
        fair = 2.0**12 if reduction == "mean" else 2.0**-3
        pytorchs = gradients(fused_linear_soft_label_cross_entropy, given, fair, True)
        for scale in (2.0**-10, 1.0, 2.0**16, 2.0**24):
            found = gradients(rqk.fused_linear_soft_label_cross_entropy, given, scale, True)
            for ours, theirs, exact in zip(found, pytorchs, true, strict=True):
                largest, least = (
                    (torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal) if not autocast else (1e38, 0)
                )
                over = exact.abs() * scale > largest
                near = (exact.abs() * scale / largest - 1).abs() < 0.2
                assert not ours.isnan().any() and torch.equal(ours.isinf() | near, over | near)
                kept = ours.isfinite()
                error = (ours - exact)[kept].norm().item()
                lost = kept.sum().item() ** 0.5 * least * torch.finfo(dtype).eps / scale
                assert error <= 1.5 * (theirs - exact)[kept].norm().item() + 1e-4 * exact[kept].norm().item() + lost


@pytest.mark.parametrize("which", range(3))
def test_fused_linear_gives_strided_tensors_the_same_bits(which: int) -> None:
    """An operand with no contiguous dimension is copied to the layout of a plain one before the products."""
    for seed in range(10):
        torch.manual_seed(seed)
        plain = [torch.randn(4, 7), torch.randn(9, 7), torch.randn(9)]
        x, e = torch.randn(4, 5), torch.randn(9, 5)
        strided = [torch.stack([t, t], -1)[..., 1] if i == which else t for i, t in enumerate(plain)]
        results = []
        for leaves in (plain, strided):
            leaves = [t.detach().requires_grad_() for t in leaves]
            loss = rqk.fused_linear_soft_label_cross_entropy(*leaves, x, e, 0.5)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        assert all(map(torch.equal, *results)), seed


def test_fused_linear_of_no_rows_has_no_gradient() -> None:
    x, e, mask = torch.randn(3, 8), torch.randn(50, 8), torch.zeros(3, dtype=torch.bool)
    for dtype in (torch.float32, *HALVES):
        hidden, weight = (torch.randn(s).to(dtype).requires_grad_() for s in ((3, 6), (50, 6)))
        loss = rqk.fused_linear_soft_label_cross_entropy(hidden, weight, None, x, e, 2.0, mask=mask)
        assert loss.isnan()
        assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_autocast_leaves_the_loss_alone() -> None:
    x, e, logits = torch.randn(20, 8), torch.randn(50, 8), torch.randn(20, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = rqk.soft_label_cross_entropy(logits, x, e, 2.0), rqk.distance_softmax(x, e, 2.0)
    assert torch.equal(under[0], rqk.soft_label_cross_entropy(logits, x, e, 2.0))
    assert torch.equal(under[1], rqk.distance_softmax(x, e, 2.0))


# --- every level of the CPU ------------------------------------------------------------------------------

LEVELS_SCRIPT = """
import json, torch, rqkernels as rqk
torch.manual_seed(0)
out = []
for k, c, tau, dtype in ((257, 17, 3.0, torch.float32), (50, 64, 1e-4, torch.float16), (130, 5, 1.0, torch.bfloat16)):
    x, e, logits = torch.randn(37, c), torch.randn(k, c), (3 * torch.randn(37, k)).to(dtype).requires_grad_()
    loss = rqk.soft_label_cross_entropy(logits, x, e, tau, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    for t in (loss, grad, rqk.distance_softmax(x, e, tau)):
        out.append(t.detach().double().flatten().tolist())
    # Every float16 and bfloat16 there is passes through unharmed: of one code all the gradient is in its rounding.
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype if dtype.itemsize == 2 else torch.half)
    pair = torch.stack([every, torch.zeros_like(every)], -1)
    pair = pair[pair.isfinite().all(-1)].requires_grad_()
    loss = rqk.soft_label_cross_entropy(pair, torch.zeros(len(pair), 1), torch.zeros(2, 1), 1.0, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), pair)
    truth = pair.detach().double().requires_grad_()
    (true,) = torch.autograd.grad((truth.logsumexp(-1) - truth.mean(-1)).sum(), truth)
    eps = torch.finfo(pair.dtype).eps
    assert ((grad.double() - true).abs() <= 0.51 * eps * true.abs() + 2e-7).all()
    # Factors of a row come to it in float32, and leave float16 where the truth does.
    logits = (3 * torch.randn(60, k)).half().requires_grad_()
    factor = 2.0 ** torch.linspace(-36, 24, 60)
    loss = rqk.soft_label_cross_entropy(logits, torch.zeros(60, 1), torch.zeros(k, 1), 1.0, reduction="none")
    (grad,) = torch.autograd.grad((loss * factor).sum(), logits)
    true = (logits.detach().double().softmax(-1) - 1 / k) * factor[:, None]
    error = 2e-7 * factor[:, None] + 2.0**-11 * true.abs() + 2.0**-25
    assert (((grad - true).abs() <= 1.01 * error) | ((true.abs() > 65519) & grad.isinf())).all()
print(json.dumps([torch.ops.rqkernels.cpu_capability(), out]))
"""


def test_every_level_agrees() -> None:
    root = Path(rqk.__file__).resolve().parent.parent
    levels = ["default", "avx2", "avx512"]
    results = {}
    for level in levels[: levels.index(torch.ops.rqkernels.cpu_capability()) + 1]:
        environment = {**os.environ, "RQK_CPU_CAPABILITY": level, "PYTHONPATH": str(root)}
        run = subprocess.run([sys.executable, "-c", LEVELS_SCRIPT], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        name, results[level] = json.loads(run.stdout)
        assert name == level
    first = results[next(iter(results))]
    for other in results.values():
        for i, (a, b) in enumerate(zip(first, other, strict=True)):
            # A rounding to half the other way is a step of its last digit.
            rtol = {1: 1e-4, 4: 2e-3, 7: 2e-2}.get(i, 2e-5)
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=rtol, atol=2e-6)


# --- wrong arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(logits=torch.zeros(6, 9, dtype=torch.float64)), TypeError, "logits must be .* got float64"),
        (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(x=torch.zeros(6, 4, dtype=torch.float64)), TypeError, "x must be .* got float64"),
        (dict(codebook=torch.zeros(9, 4, dtype=torch.int64)), TypeError, "codebook must be .* got int64"),
        (dict(mask=torch.zeros(6)), TypeError, "mask must be bool, got float32"),
        (dict(tau="1"), TypeError, "tau must be a number, got str"),
        (dict(tau=0.0), ValueError, "tau must be > 0, got 0"),
        (dict(tau=-1.0), ValueError, "tau must be > 0, got -1"),
        (dict(tau=math.nan), ValueError, "tau must be > 0, got nan"),
        (dict(reduction="avg"), ValueError, "reduction must be"),
        (dict(losses_out=torch.zeros(6).half()), TypeError, "losses_out must be float32, got float16"),
        (dict(losses_out=torch.zeros(6, 1)), ValueError, r"losses_out must be \(6,\) on cpu, got \(6, 1\) on cpu"),
        (dict(x=torch.zeros(5, 4)), ValueError, r"logits \(6, 9\) and x \(5, 4\) must agree"),
        (dict(x=torch.zeros(6, 3)), ValueError, r"x \(6, 3\) has 3 channels, codebook \(9, 4\) has 4"),
        (dict(x=torch.tensor(1.0)), ValueError, "x must be .*, got a scalar"),
        (dict(codebook=torch.zeros(8, 4)), ValueError, "logits have 9 codes, the codebook has 8"),
        (dict(codebook=torch.zeros(0, 4)), ValueError, "codebook must not be empty"),
        (dict(codebook=torch.zeros(4)), ValueError, r"codebook must be \(K, C\)"),
        (dict(codebook=torch.zeros(2, 9, 4)), ValueError, r"x must be \(\.\.\., D, C\) .* with D = 2"),
        (dict(codebook=torch.full((9, 4), math.nan)), ValueError, "codebook must be finite, got nan in code 0"),
        (dict(mask=torch.zeros(6, 1, dtype=torch.bool)), ValueError, r"mask must be bool of the shape .* got \(6, 1\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"logits": torch.zeros(6, 9), "x": torch.zeros(6, 4), "codebook": torch.zeros(9, 4), "tau": 1.0}
    with pytest.raises(error, match=f"soft_label_cross_entropy: {message}"):
        rqk.soft_label_cross_entropy(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hidden=torch.zeros(6, 5, dtype=torch.float64)), TypeError, "hidden must be .* got float64"),
        (dict(weight=torch.zeros(9, 5).half()), TypeError, "weight and bias must have the dtype of hidden"),
        (dict(weight=torch.zeros(9, 4)), ValueError, r"weight must be \(K, 5\) for this hidden, got \(9, 4\)"),
        (dict(bias=torch.zeros(8)), ValueError, r"bias must be \(9,\) for this weight, got \(8,\)"),
        (dict(hidden=torch.zeros(5, 5)), ValueError, r"hidden \(5, 5\) and x \(6, 4\) must agree"),
    ],
)
def test_bad_arguments_of_the_fused_linear_are_named(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    good = dict(
        hidden=torch.zeros(6, 5),
        weight=torch.zeros(9, 5),
        bias=None,
        x=torch.zeros(6, 4),
        codebook=torch.zeros(9, 4),
        tau=1.0,
    )
    with pytest.raises(error, match=f"fused_linear_soft_label_cross_entropy: {message}"):
        rqk.fused_linear_soft_label_cross_entropy(**{**good, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_devices_agree(dtype: torch.dtype) -> None:
    x, e, mask = torch.randn(70, 3, 40), torch.randn(3, 300, 40), torch.rand(70, 3) < 0.7
    for tau in (1e-6, 1.0, 1e3):
        q = rqk.distance_softmax(x.cuda(), e.cuda(), tau)
        torch.testing.assert_close(q.cpu(), rqk.distance_softmax(x, e, tau), rtol=2e-3, atol=1e-5)
    logits = (3 * torch.randn(70, 3, 300)).to(dtype).requires_grad_()
    on_gpu = logits.detach().cuda().requires_grad_()
    loss = rqk.soft_label_cross_entropy(logits, x, e, 20.0, mask=mask)
    loss_on_gpu = rqk.soft_label_cross_entropy(on_gpu, x.cuda(), e.cuda(), 20.0, mask=mask.cuda())
    torch.testing.assert_close(loss_on_gpu.cpu(), loss, rtol=1e-5, atol=1e-6)
    loss.backward(), loss_on_gpu.backward()
    torch.testing.assert_close(on_gpu.grad.cpu(), logits.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    overwritten = rqk.soft_label_cross_entropy(
        written := on_gpu.detach().clone().requires_grad_() * 1.0,
        x.cuda(),
        e.cuda(),
        20.0,
        mask=mask.cuda(),
        inplace=True,
    )
    assert torch.equal(overwritten, loss_on_gpu) and written.shape == on_gpu.shape
    with pytest.raises(ValueError, match="logits and x must be on the same device"):
        rqk.soft_label_cross_entropy(on_gpu, x, e, 20.0)


@pytest.mark.gpu
def test_a_captured_call_replays_on_new_inputs() -> None:
    def call(logits: Tensor, x: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        return (
            *loss_and_gradient(lambda v: rqk.soft_label_cross_entropy(v, x, e, 5.0), logits),
            rqk.distance_softmax(x, e, 5.0),
        )

    def inputs() -> tuple[Tensor, ...]:
        # A row for the direct path among them.
        logits = torch.randn(130, 300, device="cuda")
        logits[7, 5] = -torch.inf
        return logits, torch.randn(130, 40, device="cuda"), torch.randn(300, 40, device="cuda")

    static = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(*static)
    for _ in range(2):
        given = inputs()
        for old, new in zip(static, given, strict=True):
            old.copy_(new)
        graph.replay()
        for result, expected in zip(results, call(*given), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.gpu
def test_a_codebook_that_is_not_finite_makes_nan_on_a_gpu() -> None:
    x, e = torch.randn(50, 8, device="cuda"), torch.randn(20, 8, device="cuda")
    e[7, 3] = torch.inf
    assert rqk.distance_softmax(x, e, 1.0).isnan().all()


def test_bad_arguments_of_the_softmax_are_named() -> None:
    with pytest.raises(ValueError, match="distance_softmax: tau must be > 0"):
        rqk.distance_softmax(torch.zeros(2, 3), torch.zeros(4, 3), 0.0)
    with pytest.raises(TypeError, match="distance_softmax: x must be"):
        rqk.distance_softmax(torch.zeros(2, 3).double(), torch.zeros(4, 3), 1.0)
