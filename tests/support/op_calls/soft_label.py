"""Calls of the soft labels and their losses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Generator, Tensor

import rqkernels

from ._data import DTYPES, FLOATS, INF, NAN, ROWS, Small, leading, normal, rows, rows_and_codes
from ._shapes import RAGGED_LABELS, typical_labels
from ._types import Agreement, Call, Derivative, Function

_FLOAT32 = Agreement(rtol=1e-4, atol=1e-6)


def _inputs(n: int, k: int, c: int, generator: Generator) -> list[Tensor]:
    return [torch.randn(*size, generator=generator) for size in ((n, c), (k, c), (n, k))]


def _every_loss(tau: float, x: Tensor, codebook: Tensor, logits: Tensor) -> list[Tensor]:
    """Losses and gradients."""
    leaf = logits.detach().requires_grad_()
    loss = rqkernels.soft_label_cross_entropy(leaf, x, codebook, tau)
    (grad,) = torch.autograd.grad(loss, leaf)
    # The rows as what a classifier sees, and the codes as its weights, for logits of size 1.
    leaves = [t.requires_grad_() for t in (x / x.shape[1] ** 0.5, codebook.detach().clone())]
    fused = rqkernels.fused_linear_soft_label_cross_entropy(*leaves, logits[0], x, codebook, tau)
    grads = torch.autograd.grad(fused, leaves)
    written = logits.detach().clone().requires_grad_() * 1.0
    rqkernels.soft_label_cross_entropy(written, x, codebook, tau, inplace=True)
    return [loss, grad, rqkernels.distance_softmax(x, codebook, tau), fused, *grads, written.detach()]


def _captured(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    """Losses and labels; no gradients, which a captured graph would not replay."""
    logits = x @ codebooks[1].T
    losses = rqkernels.soft_label_cross_entropy(logits, x, codebooks[0], 4.0, reduction="none")
    by_depth = x[:, None].expand(-1, len(codebooks), -1)
    return [
        losses,
        rqkernels.distance_softmax(x, codebooks[0], 4.0),
        rqkernels.distance_softmax(by_depth, codebooks, 4.0),
    ]


RAGGED = [
    *(
        Call(f"N, K, C = {n, k, c}", partial(_inputs, n, k, c), partial(_every_loss, c / 4), _FLOAT32)
        for n, k, c in RAGGED_LABELS
    ),
    Call("labels and losses", rows_and_codes, _captured, _FLOAT32, captured=True),
]


def _losses(tau: float, x: Tensor, codebook: Tensor, logits: Tensor) -> list[Tensor]:
    rqkernels.distance_softmax(x[: len(x) // 8], codebook, tau)
    logits.requires_grad_()
    rqkernels.soft_label_cross_entropy(logits, x, codebook, tau).backward()
    rqkernels.soft_label_cross_entropy(logits * 1.0, x, codebook, tau, inplace=True)
    return []


def _fused_inputs(n: int, k: int, c: int, generator: Generator) -> list[Tensor]:
    return [torch.randn(*size, generator=generator) for size in ((n, c), (k, c), (n, 2 * c), (k, 2 * c), (k,))]


def _fused(tau: float, x: Tensor, codebook: Tensor, *hidden_and_classifier: Tensor) -> list[Tensor]:
    leaves = [t.requires_grad_() for t in hidden_and_classifier]
    rqkernels.fused_linear_soft_label_cross_entropy(*leaves, x, codebook, tau).backward()
    return []


def typical(device: torch.device, quick: bool) -> Iterator[Call]:
    for n, k, c, tau in typical_labels(quick):
        yield Call(f"N, K, C = {n, k, c}", partial(_inputs, n, k, c), partial(_losses, tau), _FLOAT32)
        yield Call(f"N, K, C = {n, k, c}, fused", partial(_fused_inputs, n, k, c), partial(_fused, tau), _FLOAT32)


# --- valid arguments -------------------------------------------------------------------------------------


def _labels() -> dict[str, Any]:
    small = Small.draw()
    return {"x": small.x, "codebook": small.codebook, "tau": 0.5}


def _loss_arguments() -> dict[str, Any]:
    return {"mask": torch.tensor([True, False, True, True]), "reduction": "mean", "losses_out": torch.zeros(4)}


def _cross_entropy_arguments(package: ModuleType) -> dict[str, Any]:
    return {**_labels(), "logits": torch.randn(4, 9), **_loss_arguments(), "inplace": False}


def _fused_arguments(package: ModuleType) -> dict[str, Any]:
    labels = _labels()
    linear = {"hidden": torch.randn(4, 7), "weight": torch.randn(9, 7), "bias": torch.randn(9)}
    return {**labels, **linear, **_loss_arguments()}


def _random_labels(rng: Random) -> tuple[dict[str, Any], tuple[int, ...], int]:
    k, c = rng.choice([1, 7, 40]), rng.choice([1, 4, 17])
    some = leading(rng)
    books = (some[-1],) if some and some[-1] > 0 and rng.random() < 0.4 else ()
    tau = rng.choice([0.5, 2, INF])
    return {"x": normal(rng, *some, c), "codebook": normal(rng, *books, k, c), "tau": tau}, some, k


def _random_loss(rng: Random, some: tuple[int, ...]) -> dict[str, Any]:
    return {
        "mask": rng.choice([None, torch.rand(some) < 0.6]),
        "reduction": rng.choice(["mean", "sum", "none"]),
        "losses_out": rng.choice([None, torch.zeros(some, dtype=torch.float32)]),
    }


def _random_cross_entropy(rng: Random) -> dict[str, Any]:
    arguments, some, k = _random_labels(rng)
    logits = normal(rng, *some, k)
    inplace = rng.random() < 0.3
    if rng.random() < 0.5:
        logits = logits.requires_grad_()
        logits = logits * 1 if inplace else logits
    return {"logits": logits, **arguments, **_random_loss(rng, some), "inplace": inplace}


def _random_fused(rng: Random) -> dict[str, Any]:
    arguments, some, k = _random_labels(rng)
    h, dtype = rng.choice([1, 6]), rng.choice(FLOATS)
    hidden, weight, bias = (normal(rng, *sizes, dtype=dtype) for sizes in ((*some, h), (k, h), (k,)))
    if rng.random() < 0.5:
        hidden.requires_grad_(), weight.requires_grad_()
    bias = rng.choice([None, bias])
    return {"hidden": hidden, "weight": weight, "bias": bias, **arguments, **_random_loss(rng, some)}


def _label_edges() -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for tau in (1e-12, 0.5, 1e30, INF):
            for sizes in ROWS:
                x = rows(*sizes, dtype=dtype)
                x = torch.where(x.float().abs() < 1e3, x, torch.where(x.isfinite(), 8.0, x)).to(dtype)
                yield {"x": x, "codebook": torch.randn(7, sizes[-1]).to(dtype), "tau": tau}
                yield {"x": x, "codebook": torch.randn(1, sizes[-1]), "tau": tau}
    yield {"x": rows(4, 2, 5), "codebook": torch.randn(2, 7, 5), "tau": 0.5}


def _loss_edges() -> Iterator[dict[str, Any]]:
    for labels in _label_edges():
        x, some = labels["x"], labels["x"].shape[:-1]
        logits = torch.randn(*some, labels["codebook"].shape[-2])
        flat = logits.view(-1, logits.shape[-1])
        if len(flat) >= 8 and logits.shape[-1] > 3:
            flat[0, 1], flat[1, 2], flat[3], flat[7, :2] = NAN, INF, -INF, -INF
        for reduction in ("mean", "sum", "none"):
            common = {**labels, "reduction": reduction, "logits": logits.to(x.dtype)}
            yield common
            for mask in (torch.rand(some) < 0.5, torch.zeros(some, dtype=torch.bool)):
                yield {**common, "mask": mask}
            # Rows of NaN, of x and of logits, that do not count.
            finite = x.isfinite().all(-1) & logits.isfinite().all(-1)
            yield {**common, "mask": finite, "losses_out": torch.full(some, 7.0)}


def _fused_edges() -> Iterator[dict[str, Any]]:
    for labels in _label_edges():
        x, some, k = labels["x"], labels["x"].shape[:-1], labels["codebook"].shape[-2]
        if labels["tau"] != 0.5:
            continue
        hidden = rows(*some, 6, dtype=x.dtype)
        hidden = torch.where(hidden.float().abs() < 1e3, hidden, torch.where(hidden.isfinite(), 1.0, NAN)).to(x.dtype)
        common = {**labels, "hidden": hidden, "weight": torch.randn(k, 6).to(x.dtype)}
        finite = x.isfinite().all(-1) & hidden.isfinite().all(-1)
        for reduction in ("mean", "sum", "none"):
            yield {**common, "bias": None, "reduction": reduction}
            yield {**common, "bias": torch.randn(k).to(x.dtype), "reduction": reduction, "mask": finite}


FUNCTIONS = {
    "distance_softmax": Function(
        lambda package: _labels(), lambda rng: _random_labels(rng)[0], _label_edges, numbers=("tau",)
    ),
    "soft_label_cross_entropy": Function(
        _cross_entropy_arguments,
        _random_cross_entropy,
        _loss_edges,
        gradients=("logits",),
        numbers=("tau",),
        flags=("inplace",),
    ),
    "fused_linear_soft_label_cross_entropy": Function(
        _fused_arguments, _random_fused, _fused_edges, gradients=("hidden", "weight", "bias"), numbers=("tau",)
    ),
}

_DRAWN = Generator().manual_seed(7)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_DRAWN)


_X, _E, _MASK = _drawn(3, 2, 4), _drawn(2, 9, 4), torch.tensor([[True, True], [False, True], [True, True]])
_WEIGHT, _BIAS, _HIDDEN = _drawn(9, 5), _drawn(9), _drawn(3, 2, 5)
DERIVATIVES = {
    "loss": Derivative(
        "soft_label_cross_entropy",
        lambda m, v: m.soft_label_cross_entropy(v, _X, _E, 1.5, mask=_MASK),
        2 * _drawn(3, 2, 9),
        twice=False,
    ),
    "losses": Derivative(
        "soft_label_cross_entropy",
        lambda m, v: m.soft_label_cross_entropy(v, _X, _E[0], 1.5, reduction="none"),
        2 * _drawn(3, 2, 9),
        twice=False,
    ),
    "fused loss, hidden": Derivative(
        "fused_linear_soft_label_cross_entropy",
        lambda m, v: m.fused_linear_soft_label_cross_entropy(
            v, _WEIGHT.to(v.dtype), _BIAS.to(v.dtype), _X, _E, 1.5, reduction="sum"
        ),
        _HIDDEN,
        twice=False,
    ),
    "fused losses, weight": Derivative(
        "fused_linear_soft_label_cross_entropy",
        lambda m, v: m.fused_linear_soft_label_cross_entropy(
            _HIDDEN.to(v.dtype), v, None, _X, _E, 1.5, mask=_MASK, reduction="none"
        ),
        _WEIGHT,
        twice=False,
    ),
    "fused loss, bias": Derivative(
        "fused_linear_soft_label_cross_entropy",
        lambda m, v: m.fused_linear_soft_label_cross_entropy(_HIDDEN.to(v.dtype), _WEIGHT.to(v.dtype), v, _X, _E, 1.5),
        _BIAS,
        twice=False,
    ),
}
