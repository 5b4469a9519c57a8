"""Settings of sampling: as they are given, and resolved for every level of a prior's codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rqkernels
from rqgen.checks import check_flag, check_integer, check_nonnegative, check_number, plain
from rqgen.config import did_you_mean
from rqgen.models import Prior
from rqgen.options import SamplingOptions

# Names of settings in other libraries, and in earlier versions.
_HINTS = {
    "guidance_scale": "cfg_scale is guidance_scale - 1",
    "guidance": "it is called cfg_scale",
    "cfg": "it is called cfg_scale",
    "partial_codes": "give known=KnownRows(codes, rows)",
    "start_row": "give known=KnownRows(codes, rows)",
    "use_graphs": "give precision=Engine(precision, use_graphs)",
}


@dataclass(frozen=True)
class SamplingParams(SamplingOptions):
    """Settings of sampling codes from a prior.

    Attributes:
        temperature: divisor of the logits, >= 0; 0 takes the likeliest code. One value, or one per level (depth, or
            scale of a VAR), as for top_k and top_p.
        top_k: only the k likeliest codes; None: all.
        top_p: only the likeliest codes of this total mass, in (0, 1]; None: all. See
            `rqkernels.reference.sample_logits` for the order of the three, and ties.
        cfg_scale: strength g >= 0 of classifier-free guidance (Ho and Salimans 2022): codes come from
            `(1 + g) * logits(condition) - g * logits(null condition)`; None or 0 is off. Other libraries'
            guidance_scale, where 1 is off, is cfg_scale + 1. Of a VAR scale k = 0 .. K-1 has g k / (K - 1), as
            published.
        seed: in [0, 2^64). The same seed gives the same images.
        offset: number of the first image, >= 0: an image depends on its number, not on the batch it is sampled in.
        smooth: of a VAR: mixtures of codes in the place of codes; smoother images, fewer details.

    Raises:
        TypeError, ValueError: a value of the wrong kind or out of range; starts with its name.
    """

    def __post_init__(self) -> None:
        values = {
            "temperature": _each(self.temperature, "temperature", check_nonnegative),
            "top_k": _each(self.top_k, "top_k", _check_top_k),
            "top_p": _each(self.top_p, "top_p", _check_top_p),
            "cfg_scale": self.cfg_scale,
            "seed": check_integer(self.seed, "seed", 0, 2**64 - 1),
            "offset": check_integer(self.offset, "offset", 0, 2**62),
            "smooth": check_flag(self.smooth, "smooth"),
        }
        if self.cfg_scale is not None:
            values["cfg_scale"] = check_nonnegative(self.cfg_scale, "cfg_scale", "a number or None")
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @classmethod
    def of(
        cls, params: SamplingParams | None, settings: Mapping[str, Any], *, beside: Collection[str] = ()
    ) -> SamplingParams:
        """Return `params`, or the defaults, with these fields replaced.

        Raises:
            TypeError: a setting that is not a field; names the nearest of the fields and of the parameters `beside`
                them.
        """
        if params is None:
            params = cls()
        elif not isinstance(params, cls):
            raise TypeError(f"params: expected a SamplingParams, got {type(params).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                raise TypeError(f"{name}: unknown; {_HINTS.get(name) or did_you_mean(name, [*names, *beside])}")
        return dataclasses.replace(params, **settings)

    def resolve(self, prior: Prior, condition: Tensor | None) -> LevelParams:
        """Return the settings of each level of `prior`, sampled under `condition` (None: the null condition, or none).

        Raises:
            ValueError: a list of another length than the prior has levels; guidance without a condition, or of a prior
                without a null condition; smooth sampling of a prior that has none.
        """
        if self.smooth and not prior.has_smooth_sampling:
            raise ValueError(
                f"smooth: expected False, as a prior of type {type(prior).__name__} has no smooth sampling, got True"
            )
        scale = self.cfg_scale or 0.0
        if scale > 0 and not prior.has_null_condition:
            raise ValueError(
                "cfg_scale: guidance needs a prior with a null condition, and this one was not trained with "
                "condition_dropout"
            )
        if scale > 0 and condition is None:
            raise ValueError("cfg_scale: guidance needs a condition, got None")
        lists = {name: _per_level(getattr(self, name), name, prior) for name in ("temperature", "top_k", "top_p")}
        scales = tuple(prior.cfg_scale_per_level(scale)) if scale > 0 else ()
        return LevelParams(**lists, cfg_scale=scales, seed=self.seed, smooth=self.smooth)


@dataclass(frozen=True)
class LevelParams:
    """Settings of sampling with one entry per level: what a `Sampler` takes, see `SamplingParams.resolve`."""

    temperature: tuple[float, ...]
    top_k: tuple[int | None, ...]
    top_p: tuple[float | None, ...]
    cfg_scale: tuple[float, ...] = ()
    """g of each level; empty without guidance."""
    seed: int = 0
    smooth: bool = False

    @property
    def copies(self) -> int:
        """Rows of each image: with guidance the null condition follows the condition, in a second half."""
        return 2 if self.cfg_scale else 1

    def guide(self, logits: Tensor, level: int) -> Tensor:
        """Combine (copies * B, ..., K) to (B, ..., K): `(1 + g) conditional - g null`, with guidance."""
        if not self.cfg_scale:
            return logits
        strength = self.cfg_scale[level]
        conditional, null = logits.chunk(2)
        return (1 + strength) * conditional - strength * null

    def sample(self, logits_blk: Tensor, level: int, *, first_image: int, first_stream: int) -> Tensor:
        """Return codes (B, l) from guided logits (B, l, K) of one level: image b has row first_image + b, its i-th code
        stream first_stream + i of `rqkernels.sample_logits`."""
        return rqkernels.sample_logits(
            logits_blk,
            temperature=self.temperature[level],
            top_k=self.top_k[level],
            top_p=self.top_p[level],
            seed=self.seed,
            offset=first_image,
            stream=first_stream,
            streams=logits_blk.shape[1],
        )

    def kept(self, logits: Tensor, level: int) -> Tensor:
        """Return logits (..., K) over the temperature, -inf where top-k or top-p leave a code out."""
        ordered, order = logits.double().sort(dim=-1, descending=True, stable=True)
        temperature, top_k, top_p = self.temperature[level], self.top_k[level], self.top_p[level]
        if temperature == 0:
            temperature, top_k = 1.0, 1
        scores = ordered / temperature
        if top_k is not None:
            scores[..., top_k:] = -torch.inf
        if top_p is not None:
            mass = torch.softmax(scores, dim=-1)
            scores = scores.masked_fill(mass.cumsum(dim=-1) - mass >= top_p, -torch.inf)
        return torch.empty_like(scores).scatter(-1, order, scores)


def refuse_failed(min_code_b: Tensor, first_image: int) -> None:
    """Raise ValueError for the first image of which a code came back as -1: its logits had no distribution. A
    host-device synchronisation."""
    failed = (min_code_b < 0).nonzero().flatten().tolist()
    if failed:
        image = first_image + failed[0]
        raise ValueError(f"prior: the logits of image {image} have NaN, +inf, or nothing but -inf")


def _each(value: Any, name: str, check: Callable[[Any, str], Any]) -> Any:
    """Return the checked value, or a tuple of checked values."""
    value = plain(value)
    if not isinstance(value, (list, tuple)):
        return check(value, name)
    return tuple(check(item, f"{name}[{level}]") for level, item in enumerate(value))


def _per_level(value: Any, name: str, prior: Prior) -> tuple[Any, ...]:
    levels = prior.levels
    if not isinstance(value, tuple):
        return (value,) * levels
    if len(value) != levels:
        axis = prior.layout.axis
        raise ValueError(f"{name}: expected one value, or {levels} (one per {axis}), got {len(value)}")
    return value


def _check_top_k(value: Any, name: str) -> int | None:
    # No codebook has as many codes as the largest number that operators take.
    return None if value is None else min(check_integer(value, name, 1), 2**62)


def _check_top_p(value: Any, name: str) -> float | None:
    if value is None:
        return None
    number = check_number(value, name, "a number or None")
    if not 0 < number <= 1:
        raise ValueError(f"{name}: expected a number in (0, 1], got {value}")
    return number
