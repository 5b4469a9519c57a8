"""Drawing code maps from a prior: what every way of it takes and gives, and which fits a prior and its device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import rqkernels

from .captured import CapturedSampler
from .changes import Change, find_change, warn_once
from .packed import packed_prior
from .rqtransformer import RQTransformer, RQTransformerConfig

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
    """Makes `prior`, in eval mode, ready; `precision` and `use_graphs` as `rqgen.generate` has them.

    Packed weights, and what a CUDA graph has captured, are a prior that computes from its tensors what `RQTransformer`
    says. Of another one (see `change_of_prior`) the modules are called, step by step with their keys and values kept;
    and where it is the prior itself that was changed, or every module, the prior as a whole for each code.

    Raises:
        TypeError, ValueError: as `change_of_prior`.
    """
    change = change_of_prior(prior, precision)
    if change is None and prior.device.type == "cpu":
        return packed_prior(prior, precision)
    ready = cast_prior(prior, precision)
    if change is not None and not change.name:
        return WholeSampler(ready)
    return CapturedSampler(ready, capture=use_graphs and change is None)


def change_of_prior(prior: RQTransformer, precision: str) -> Change | None:
    """The first thing that a prior's weights do not tell (see `rqgen.models.changes`), said by a warning, once; None
    where they tell all.

    Raises:
        TypeError, ValueError: as `check_precision`; a change at "int8", which there is in packed weights alone.
    """
    check_precision(prior, precision)
    change = find_change(prior, _as_built(prior.config), "prior")
    if change is None:
        return None
    if precision == "int8":
        raise ValueError(f'precision: "int8" has packed weights alone and calls no modules, but {change.text}')
    warn_once(
        prior,
        f"{change.text}, which packed weights and CUDA graphs do not know of: the prior's modules are called instead, "
        "which takes longer",
    )
    return change


class _WithoutValues(TorchFunctionMode):
    """Leaves out random numbers, for which torch imports a second's worth of modules on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_BUILT: dict[str, RQTransformer] = {}


def _as_built(config: RQTransformerConfig) -> RQTransformer:
    """A prior of this config, without memory for its tensors."""
    key = repr(config)
    if key not in _BUILT:
        with torch.device("meta"), _WithoutValues():
            built = RQTransformer(copy.deepcopy(config))
        if len(_BUILT) >= 8:
            _BUILT.clear()
        _BUILT[key] = built
    return _BUILT[key]


class WholeSampler:
    """Draws every code from `prior(codes, condition)`: T * D calls, in which everything has a part that was done to the
    prior, hooks on it and a `forward` of its own included. The definition of what all samplers draw.

    Args:
        prior: in eval mode whenever codes are drawn.
    """

    def __init__(self, prior: RQTransformer) -> None:
        self.prior = prior

    @torch.no_grad()
    def sample(
        self,
        condition_bl: Tensor,
        known_btd: Tensor,
        *,
        temperature: Sequence[float],
        top_k: Sequence[int | None],
        top_p: Sequence[float | None],
        guidance: float = 0.0,
        seed: int,
        offset: int = 0,
        advance: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """See `Sampler`.

        Raises:
            ValueError: logits with NaN, +inf, or nothing but -inf.
        """
        config = self.prior.config
        batch, known, depth = known_btd.shape
        codes_btd = known_btd.new_zeros(batch, self.prior.positions, depth)
        codes_btd[:, :known] = known_btd
        null = config.condition == "none" or bool((condition_bl == config.condition_vocab_size).all())
        condition = None if null else condition_bl
        with torch.autocast(self.prior.device.type, enabled=False):
            for position in range(known, self.prior.positions):
                for d in range(depth):
                    logits = self._logits(codes_btd, condition, position, d)
                    if guidance:
                        logits = (1 + guidance) * logits - guidance * self._logits(codes_btd, None, position, d)
                    codes_b = rqkernels.sample_logits(
                        logits,
                        temperature=temperature[d],
                        top_k=top_k[d],
                        top_p=top_p[d],
                        seed=seed,
                        offset=offset,
                        stream=position * depth + d,
                    )
                    failed = (codes_b < 0).nonzero().flatten().tolist()
                    if failed:
                        image = offset + failed[0]
                        raise ValueError(f"prior: the logits of image {image} have NaN, +inf, or nothing but -inf")
                    codes_btd[:, position, d] = codes_b
                advance()
        return codes_btd

    def _logits(self, codes_btd: Tensor, condition: Tensor | None, position: int, d: int) -> Tensor:
        codes = codes_btd.view(len(codes_btd), *self.prior.config.code_shape)
        return self.prior(codes, condition).logits.flatten(1, 2)[:, position, d].float()


def check_precision(prior: RQTransformer, precision: str) -> None:
    """Raises what is wrong with drawing from `prior` at `precision`.

    Raises:
        TypeError: a prior with float64 weights.
        ValueError: an unknown precision, or one that the device does not support; weights on several devices, or on
            none (meta).
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    for name, tensor in (*prior.named_parameters(), *prior.named_buffers()):
        if tensor.dtype == torch.float64:
            raise TypeError(f"prior: expected float32, float16 or bfloat16 weights, got float64 ({name})")
        if tensor.is_meta:
            raise ValueError(f"prior: {name} is on the meta device and has no values; load them first")
        if tensor.device != prior.device:
            raise ValueError(f"prior: expected all weights on {prior.device}, got {name} on {tensor.device}")
    if precision == "int8" and prior.device.type != "cpu":
        raise ValueError('precision: "int8" is for priors on the CPU; on a GPU use "bf16"')


def cast_prior(prior: RQTransformer, precision: str) -> RQTransformer:
    """A prior whose modules compute in "fp32" or "bf16": itself where they do, or a copy."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    tensors = (*prior.parameters(), *prior.buffers())
    if all(tensor.dtype == dtype for tensor in tensors if tensor.is_floating_point()):
        return prior
    return copy.deepcopy(prior).to(dtype)
