"""Samplers: the interface of every way of sampling codes from a prior, and the choice of one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rqgen.checks import check_flag
from rqgen.config import one_of
from rqgen.models import Prior
from rqgen.options import EngineOptions
from rqgen.quantizers import Codes

from .params import LevelParams, refuse_failed

PRECISIONS = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Engine(EngineOptions):
    """Settings of the computation of a prior while it is sampled from.

    Attributes:
        precision: "fp32"; of an RQ-Transformer also "bf16": weights rounded to bfloat16 (on a GPU all arithmetic is, on
            the CPU products are float32), and on the CPU "int8": weights in 8 bits with a scale per output, activations
            in 16. See `rqgen.evaluation.evaluate_precision` for the loss. Autocast has no effect. Where modules are
            called "bf16" is all arithmetic on the CPU too, and "int8" is refused. A prior cast to float64 is computed
            in float64 at "fp32", by calling its modules, and refused at the other two.
        use_graphs: capture the steps of an RQ-Transformer's position in CUDA graphs and replay them. On the CPU, and of
            a VAR, there are none; the codes are the same in both cases.
    """

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: {one_of(PRECISIONS, self.precision)}")
        object.__setattr__(self, "use_graphs", check_flag(self.use_graphs, "use_graphs"))

    @classmethod
    def of(cls, precision: str | Engine) -> Engine:
        """Return the engine itself, or that of a precision."""
        return precision if isinstance(precision, Engine) else cls(precision)

    def check_prior(self, prior: Prior) -> None:
        """Raise unless the prior can be sampled from at this precision.

        Raises:
            TypeError: weights of which some are float64 and some not.
            ValueError: a precision that the prior cannot be sampled in; weights on several devices, or on none (meta).
        """
        if self.precision not in prior.precisions:
            allowed = " or ".join(map(repr, prior.precisions))
            raise ValueError(f"precision: a {type(prior).__name__} is sampled in {allowed}, got {self.precision!r}")
        is_float64 = prior.dtype == torch.float64
        for name, tensor in (*prior.named_parameters(), *prior.named_buffers()):
            if tensor.is_meta:
                raise ValueError(f"prior: {name} is on the meta device and has no values; load them first")
            if tensor.device != prior.device:
                raise ValueError(f"prior: expected all weights on {prior.device}, got {name} on {tensor.device}")
            # What embeds codes may stay float32 in a float64 prior, see `MultiScaleDecoder`.
            if tensor.dtype == torch.float64 and not is_float64:
                raise TypeError(f"prior: expected weights of {prior.dtype} like the first, got float64 ({name})")
        if is_float64 and self.precision != "fp32":
            raise ValueError(
                f'precision: a float64 prior is sampled in float64 at "fp32" alone, got {self.precision!r}; '
                "cast it by prior.float()"
            )


class Sampled(NamedTuple):
    """Result of a sampler for B images."""

    codes: Codes
    """As the prior's layout has them; with smooth sampling the codes that weigh most."""
    vectors: list[Tensor] | None = None
    """With smooth sampling, in the place of codes: float32 (B, h_k, w_k, C), see `Tokenizer.decode_vectors`."""


class Sampler(Protocol):
    """A prior made ready to sample from."""

    def steps(self, known: int = 0) -> int:
        """Return how often `sample` calls `advance` for an image of which `known` codes are given."""
        ...

    def sample(
        self,
        condition_ids: Tensor,
        params: LevelParams,
        *,
        first_image: int = 0,
        known: Tensor | None = None,
        advance: Callable[[int], None] = ...,
    ) -> Sampled:
        """Sample the codes that follow the known ones, step by step.

        Args:
            condition_ids: (B, L) of `Prior.condition_ids`.
            params: of every level.
            first_image: number of the first image. Code i (of the L in `CodeLayout.flatten`) of image b is sampled as
                by `rqkernels.sample_logits` with row first_image + b and stream i.
            known: int64 (B, n), the first n codes if given, in whole steps.
            advance: called with a number of images that moved on by one step.

        Raises:
            ValueError: logits with NaN, +inf, or nothing but -inf; known where all codes are sampled.
        """
        ...


def no_progress(images: int) -> None:
    """Ignore that images moved on by one step."""


@functools.singledispatch
def make_sampler(prior: Prior, engine: Engine) -> Sampler:
    """Make `prior`, in eval mode, ready to sample from.

    The samplers of a system are registered by the class of its prior (`make_sampler.register`). Every other prior is
    called as a whole for each step, see `StepSampler`.

    Raises:
        TypeError, ValueError: a request that the sampler cannot serve, such as a precision.
    """
    engine.check_prior(prior)
    return StepSampler(prior)


class StepSampler:
    """Sample each step from `prior(codes, condition)`. Every change of the prior counts, hooks on it and a `forward` of
    its own included. This defines what all samplers sample.

    Args:
        prior: in eval mode whenever codes are sampled.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior

    def steps(self, known: int = 0) -> int:
        """Return the number of the prior's steps that are not known."""
        return sum(places.start >= known for _, places in self.prior.steps)

    @torch.no_grad()
    def sample(
        self,
        condition_ids: Tensor,
        params: LevelParams,
        *,
        first_image: int = 0,
        known: Tensor | None = None,
        advance: Callable[[int], None] = no_progress,
    ) -> Sampled:
        """See `Sampler`."""
        prior, batch = self.prior, len(condition_ids)
        codes_bl = torch.zeros(batch, prior.layout.count, dtype=torch.int64, device=prior.device)
        given = 0 if known is None else known.shape[1]
        if known is not None:
            codes_bl[:, :given] = known
        with torch.autocast(prior.device.type, enabled=False):
            for level, places in prior.steps:
                if places.start < given:
                    continue
                logits = step_logits(prior, codes_bl, condition_ids, places)
                if params.cfg_scale:
                    nulls = prior.condition_ids(None, batch)
                    logits = params.guide(torch.cat([logits, step_logits(prior, codes_bl, nulls, places)]), level)
                tokens = params.sample(logits, level, first_image=first_image, first_stream=places.start)
                refuse_failed(tokens.amin(1), first_image)
                codes_bl[:, places] = tokens
                advance(batch)
        return Sampled(prior.layout.unflatten(codes_bl))


def step_logits(prior: Prior, codes_bl: Tensor, condition_ids: Tensor, places: slice) -> Tensor:
    """Return logits float32 (B, l, K) of one step, from `prior(codes, condition)`; codes from it on have no effect."""
    null = prior.condition_kind == "none" or bool((condition_ids == prior.condition_size).all())
    logits = prior(prior.layout.unflatten(codes_bl), None if null else condition_ids).logits
    return logits.flatten(1, -2)[:, places].float()
