"""Drawing code maps from a prior: what every way of it takes and gives, and which fits a device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .captured import CapturedSampler
from .packed import packed_prior
from .rqtransformer import RQTransformer

PRECISIONS = ("fp32", "bf16", "int8")


class Sampler(Protocol):
    """A prior made ready to draw from."""

    def sample(
        self,
        condition_bl: Tensor,
        known_btd: Tensor,
        *,
        temperature: Sequence[float],
        top_k: Sequence[int | None],
        top_p: Sequence[float | None],
        guidance: float = ...,
        seed: int,
        offset: int = ...,
        advance: Callable[[], None] = ...,
    ) -> Tensor:
        """Draws the positions that follow the known ones, one after another.

        Args:
            condition_bl: ids of `RQTransformer.condition_ids`.
            known_btd: int64 (B, t, D), the positions that are given, t < T.
            temperature, top_k, top_p: one entry per depth, as `rqkernels.sample_logits` takes them.
            guidance: g >= 0, `(1 + g) * logits(condition) - g * logits(null condition)`; 0 is off.
            seed: in [0, 2^64).
            offset: number of the first image. The draw at position t and depth d of image b is that of
                `rqkernels.sample_logits` with row offset + b and stream t * D + d.
            advance: called after each drawn position.

        Returns:
            int64 (B, T, D), the known positions among them.
        """
        ...


def make_sampler(prior: RQTransformer, precision: str, use_graphs: bool) -> Sampler:
    """Makes `prior` ready; `precision` and `use_graphs` as `rqgen.generate` has them.

    Raises:
        TypeError, ValueError: as `check_precision`; use_graphs is not a bool.
    """
    if not isinstance(use_graphs, bool):
        raise TypeError(f"use_graphs: expected True or False, got {use_graphs!r}")
    check_precision(prior, precision)
    if prior.device.type == "cpu":
        return packed_prior(prior, precision)
    return CapturedSampler(cast_prior(prior, precision), capture=use_graphs)


def check_precision(prior: RQTransformer, precision: str) -> None:
    """Raises what is wrong with drawing from `prior` at `precision`.

    Raises:
        TypeError: a prior whose weights are float64.
        ValueError: an unknown precision, or one that the prior's device has not.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if prior.depth_positions.dtype == torch.float64:
        raise TypeError("prior: expected float32, float16 or bfloat16 weights, got float64")
    if precision == "int8" and prior.device.type != "cpu":
        raise ValueError('precision: "int8" is for priors on the CPU; on a GPU use "bf16"')


def cast_prior(prior: RQTransformer, precision: str) -> RQTransformer:
    """A prior whose modules compute in "fp32" or "bf16", in eval mode: itself where it does, or a copy."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if prior.depth_positions.dtype == dtype and not any(module.training for module in prior.modules()):
        return prior
    return copy.deepcopy(prior).to(dtype).eval()
