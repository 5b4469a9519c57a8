"""Effect of a shorter precision on a prior."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from rqgen.checks import check_instance, check_integer
from rqgen.inference import can_pack, cast_prior, change_of_prior
from rqgen.inference.packed import PackedPrior
from rqgen.models import Prior
from rqgen.models.interfaces import level_means
from rqgen.models.pretrained import eval_mode
from rqgen.models.rqtransformer import RQTransformer
from rqgen.quantizers import Codes


@dataclass
class PrecisionEffect:
    """``kl``: mean over all positions of KL(float32 || precision) of the next code, in nats, for each depth.
    ``same_likeliest``: the share of positions whose likeliest code stays the same, for each depth.
    ``weight_error``: relative error of the rounded weights (Frobenius), by kind of layer; empty on a GPU, and for a
    prior whose modules are called."""

    precision: str
    kl: list[float]
    same_likeliest: list[float]
    weight_error: dict[str, float]


@dataclass
class PriorLogits:
    """Logits that sampling would see at a precision."""

    of: Callable[[Codes, Tensor | None], Tensor]
    """Map codes and a condition to logits of all codes, (B, .., K), in the order of `CodeLayout.flatten`."""
    weight_error: dict[str, float] = field(default_factory=dict)
    """See `PrecisionEffect`."""


@functools.singledispatch
def logits_at(prior: Prior, precision: str) -> PriorLogits:
    """Return the logits of a prior at a precision. Registered for each class that can be sampled in more than fp32.

    Raises:
        ValueError: a precision other than fp32, for a class without a registered function.
    """
    if precision != "fp32":
        raise ValueError(f"precision: expected 'fp32' for a {prior.model_type}, got {precision!r}")
    return PriorLogits(lambda codes, condition: prior(codes, condition).logits.float())


@logits_at.register
def _(prior: RQTransformer, precision: str) -> PriorLogits:
    if change_of_prior(prior, precision) is not None or not can_pack(prior):
        cast = cast_prior(prior, precision)
        return PriorLogits(lambda codes, condition: cast(codes, condition).logits.float())
    packed = PackedPrior(prior, precision)
    error = {
        f"{stack} {kind}": value
        for stack, weights in (("spatial", packed.spatial), ("depth", packed.decoder))
        for kind, value in weights.quantization_error.items()
    }

    def logits(codes: Codes, condition: Tensor | None) -> Tensor:
        codes_bl = prior.layout.flatten(codes)
        condition_bl = prior.condition_ids(condition, len(codes_bl))
        return packed.logits(codes_bl.unflatten(1, prior.config.code_shape), condition_bl)

    return PriorLogits(logits, error)


@torch.no_grad()
def evaluate_precision(
    prior: Prior, codes: Codes, condition: Tensor | None = None, *, precision: str, batch_size: int = 8
) -> PrecisionEffect:
    """Compare the distributions of every code given the codes before it, at `precision` and in float32.

    Args:
        prior: evaluated without dropout; its mode is kept.
        codes: of N >= 1 real images, as `prior.layout` says: the prior's own samples would make it look better.
        condition: of the N images, see `Prior.condition_ids`.
        precision: as in `rqgen.generate`.
        batch_size: images at once; their logits take L * K numbers each, three times.

    Raises:
        TypeError, ValueError, IndexError: codes or a condition that the prior refuses, or none; a precision that it
            cannot be sampled in.
    """
    check_instance(prior, "prior", Prior)
    layout = prior.layout
    batch_size = check_integer(batch_size, "batch_size", 1)
    layout.check(codes, device=prior.device, owner="prior")
    count = len(layout.flatten(codes))
    if count == 0:
        raise ValueError("codes: expected at least one code map, got none")
    prior.check_codebooks()
    prior.condition_ids(condition, count)
    sums_2l = torch.zeros(2, layout.count, dtype=torch.float64, device=prior.device)
    with eval_mode(prior):
        exact, short = (logits_at(prior, name) for name in ("fp32", precision))
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            some = layout.select(codes, rows), None if condition is None else condition[rows]
            p, q = (logits.of(*some).flatten(1, -2) for logits in (exact, short))
            kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
            same = p.argmax(-1) == q.argmax(-1)
            sums_2l += torch.stack([kl.double().sum(0), same.double().sum(0)])
    kl_d, same_d = (level_means(layout, row.unsqueeze(0)).tolist() for row in sums_2l / count)
    return PrecisionEffect(precision, kl_d, same_d, short.weight_error)
