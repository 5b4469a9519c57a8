"""A training step of the prior with soft labels and stochastic codes, against the published formulation of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import _harness
import pytest
import torch
from _harness import QUICK, Contender, Work
from torch import Tensor

import rqkernels
from rqgen.models import RQTransformer, RQTransformerConfig, SoftLabels, prior_loss
from rqgen.models.transformer import TransformerConfig

TAU = 60.0  # for squared distances between normal vectors of 256 channels: a few codes share each label


class Case(NamedTuple):
    """A prior of `width` with `layers` (spatial, depth) and `heads`, for h x w stacks of D codes of K."""

    name: str
    width: int
    layers: tuple[int, int]
    heads: int
    code_shape: tuple[int, int, int]
    codes: int
    channels: int
    batch_cpu: int
    batch_cuda: int

    def batch(self, device: torch.device) -> int:
        return self.batch_cuda if device.type == "cuda" else self.batch_cpu


CASES = (
    [Case("tiny", 16, (1, 1), 2, (2, 2, 2), 32, 8, 2, 2)]
    if QUICK
    else [
        Case("width-512", 512, (8, 2), 8, (8, 8, 4), 16384, 256, 2, 16),
        # Logits (256 MiB) dominate the memory. Half a minute per round on two CPU cores.
        *([] if torch.cuda.is_available() else [Case("width-512-16", 512, (8, 2), 8, (8, 8, 4), 16384, 256, 16, 16)]),
        # A minute per step on a CPU.
        *([Case("350M", 1024, (24, 4), 16, (8, 8, 4), 16384, 256, 1, 16)] if torch.cuda.is_available() else []),
    ]
)


class Labels(NamedTuple):
    codes: Tensor  # (B, h, w, D)
    residuals: Tensor  # (B, h, w, D, C)


# Labels of a step, and its loss given the codes.
Prepared: TypeAlias = tuple[Labels, Callable[[Tensor], Tensor]]


def published_labels(x_bhwc: Tensor, codebook_kc: Tensor, depth: int) -> tuple[Labels, Tensor]:
    """Compute stochastic codes, residuals and whole soft labels: distances, softmax, multinomial."""
    residual, codes, residuals, soft = x_bhwc, [], [], []
    squared_norms = codebook_kc.square().sum(1)
    for _ in range(depth):
        rows = residual.reshape(-1, residual.shape[-1])
        distances = rows.square().sum(1, keepdim=True) - 2 * rows @ codebook_kc.t() + squared_norms
        soft.append(torch.softmax(-distances / TAU, dim=1))
        code = torch.multinomial(soft[-1], 1).reshape(residual.shape[:-1])
        residuals.append(residual)
        residual = residual - codebook_kc[code]
        codes.append(code)
    labels = torch.stack(soft, dim=1).reshape(*x_bhwc.shape[:-1], depth, -1)
    return Labels(torch.stack(codes, -1), torch.stack(residuals, -2)), labels


def published_loss(logits: Tensor, soft: Tensor) -> Tensor:
    return -(soft * torch.log_softmax(logits, dim=-1)).sum(-1).mean()


def run_case(case: Case, device: torch.device, benchmark: Any = None) -> dict[str, Any]:
    batch, (height, width, depth) = case.batch(device), case.code_shape
    torch.manual_seed(0)
    spatial, depths = (TransformerConfig(layers, case.heads, residual_dropout=0.0) for layers in case.layers)
    config = RQTransformerConfig(
        case.code_shape,
        case.codes,
        case.channels,
        embed_dim=case.width,
        spatial=spatial,
        depth=depths,
    )
    codebook = torch.randn(case.codes, case.channels) * (torch.rand(case.codes, 1) * 0.8 + 0.2)
    model = RQTransformer(config, codebook).to(device)
    codebook = codebook.to(device)
    x = torch.randn(batch, height, width, case.channels).to(device)

    def step(prepare: Callable[[], Prepared]) -> tuple[Labels, Tensor, Tensor]:
        with torch.no_grad():
            labels, loss_of = prepare()
        loss = loss_of(labels.codes)
        loss.backward()
        norm = gradient_norm(model)
        # Gradients count as memory of the step.
        model.zero_grad(set_to_none=True)
        return labels, loss.detach(), norm

    def search() -> tuple[Labels, SoftLabels]:
        found = rqkernels.stochastic_residual_search(x, codebook, depth, tau=TAU, seed=0, return_residuals=True)
        return Labels(found.codes, found.residuals), SoftLabels(found.residuals, codebook, TAU)

    def fused() -> Prepared:
        labels, soft = search()
        return labels, lambda codes: prior_loss(model(codes, soft_labels=soft)).total

    def in_place() -> Prepared:
        labels, soft = search()
        return labels, lambda codes: prior_loss(model(codes), **soft._asdict(), inplace=True).total

    def published() -> Prepared:
        labels, soft = published_labels(x, codebook, depth)
        return labels, lambda codes: published_loss(model(codes).logits, soft)

    contenders = [
        Contender("rqkernels", lambda: step(fused), batch),
        Contender("rqkernels, whole logits", lambda: step(in_place), batch),
        Contender("published formulation", lambda: step(published), batch),
    ]

    def check(results: Mapping[str, Any]) -> dict[str, float]:
        # Codes are random, so each contender's loss and gradient are compared with the definition's for its own codes.
        for name, (labels, loss, norm) in results.items():

            def defined(labels: Labels = labels) -> Prepared:
                return labels, lambda codes: rqkernels.reference.soft_label_cross_entropy(
                    model(codes).logits, labels.residuals, codebook, TAU
                )

            _, expected, expected_norm = step(defined)
            assert abs(loss - expected) < 1e-4 * expected, f"{name}: loss {loss}, by the definition {expected}"
            assert abs(norm - expected_norm) < 1e-3 * expected_norm, f"{name}: gradient {norm} for {expected_norm}"
        return dict.fromkeys(results, 1.0)

    rows, parameters = batch * height * width, sum(p.numel() for p in model.parameters())
    # The classifier and the labels touch every code; forward and backward of a layer are three products. Attention and
    # the spatial stack, with fewer rows, are left out: this is a lower bound.
    work = Work(
        bytes=12 * parameters,
        operations=2 * rows * depth * case.codes * (3 * case.width + 2 * case.channels),
    )
    shape = {"B": batch, "h, w, D": case.code_shape, "K": case.codes, "C": case.channels, "parameters": parameters}
    return _harness.compare(case.name, shape, device, contenders, work, check, benchmark)


def gradient_norm(model: torch.nn.Module) -> Tensor:
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prior_step(run: _harness.Run, case: Case, benchmark: Any) -> None:
    run.cases.append(run_case(case, run.device, benchmark))


if __name__ == "__main__":
    _harness.main("prior_step", CASES, run_case)
