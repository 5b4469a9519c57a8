"""What a shorter precision changes in a prior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rqgen.inference import can_pack, cast_prior, change_of_prior
from rqgen.inference.packed import PackedPrior
from rqgen.models.pretrained import eval_mode
from rqgen.models.rqtransformer import RQTransformer


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


@torch.no_grad()
def evaluate_precision(
    prior: RQTransformer, codes: Tensor, condition: Tensor | None = None, *, precision: str, batch_size: int = 8
) -> PrecisionEffect:
    """Compares the distributions of every code given the codes before it, at `precision` and in float32.

    Args:
        prior: left in the mode it is in, looked at without dropout.
        codes: int64 (N, h, w, D), N >= 1, of real images: a prior's own samples would flatter it.
        condition: of the N images, see `RQTransformer.condition_ids`.
        precision: as in `rqgen.generate`.
        batch_size: images at once; their logits take h * w * D * K numbers each, three times.

    Raises:
        TypeError, ValueError, IndexError: as `RQTransformer.forward` and `rqgen.generate`; no codes.
    """
    packed = change_of_prior(prior, precision) is None and can_pack(prior)
    prior.layout.check(codes, device=prior.device, owner="prior")
    if len(codes) == 0:
        raise ValueError("codes: expected at least one code map, got none")
    prior.check_codebooks()
    prior.condition_ids(condition, len(codes))
    sums_2d = torch.zeros(2, prior.depth, dtype=torch.float64, device=prior.device)
    with eval_mode(prior):
        exact, short = (_Logits(prior, name, packed) for name in ("fp32", precision))
        for rows in torch.arange(len(codes), device=prior.device).split(batch_size):
            given = None if condition is None else condition[rows]
            p, q = (logits(codes[rows], given).flatten(0, 2) for logits in (exact, short))
            kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
            same = p.argmax(-1) == q.argmax(-1)
            sums_2d += torch.stack([kl.double().sum(0), same.double().sum(0)])
    kl_d, same_d = (sums_2d / (len(codes) * prior.positions)).tolist()
    return PrecisionEffect(precision, kl_d, same_d, short.weight_error)


class _Logits:
    """A prior's logits for codes (B, h, w, D), as sampling at a precision would see them."""

    def __init__(self, prior: RQTransformer, precision: str, packed: bool) -> None:
        self.weight_error: dict[str, float] = {}
        self._of: PackedPrior | RQTransformer
        if packed:
            self._of = PackedPrior(prior, precision)
            for stack, weights in (("spatial", self._of.spatial), ("depth", self._of.decoder)):
                self.weight_error |= {f"{stack} {kind}": error for kind, error in weights.quantization_error.items()}
        else:
            self._of = cast_prior(prior, precision)
        self._condition_ids = prior.condition_ids

    def __call__(self, codes: Tensor, condition: Tensor | None) -> Tensor:
        if isinstance(self._of, PackedPrior):
            return self._of.logits(codes, self._condition_ids(condition, len(codes)))
        return self._of(codes, condition).logits.float()
