"""Samplers of an RQ-Transformer: packed weights on a CPU, CUDA graphs, or its modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rqgen.models import RQTransformer, RQTransformerConfig
from rqgen.models.changes import Change, find_change, warn_once

from .cuda_graph import CapturedSampler
from .packed import packed_prior
from .sampler import Engine, Sampler, StepSampler, make_sampler


@make_sampler.register
def make_stack_sampler(prior: RQTransformer, engine: Engine) -> Sampler:
    """Make an RQ-Transformer ready.

    Packed weights and captured CUDA graphs serve a prior that computes from its tensors what `RQTransformer` defines.
    The modules of another one (see `change_of_prior`) are called, step by step with their keys and values kept; and
    where the prior itself was changed, or every module, the prior is called as a whole for each code.

    Raises:
        TypeError, ValueError: as `change_of_prior`.
    """
    change = change_of_prior(prior, engine.precision)
    if change is None and can_pack(prior):
        return packed_prior(prior, engine.precision)
    ready = cast_prior(prior, engine.precision)
    if change is not None and not change.name:
        return StepSampler(ready)
    return CapturedSampler(ready, capture=engine.use_graphs and change is None and prior.device.type == "cuda")


def can_pack(prior: RQTransformer) -> bool:
    """Return True where packed weights stand for an unchanged prior: on a CPU, unless it is float64."""
    return prior.device.type == "cpu" and prior.dtype != torch.float64


def change_of_prior(prior: RQTransformer, precision: str) -> Change | None:
    """Return the first change of a prior that its weights do not show (see `rqgen.models.changes`), and warn of it
    once; None without any.

    Raises:
        TypeError, ValueError: as `check_precision`; a change at "int8", which only packed weights have.
    """
    check_precision(prior, precision)
    change = find_change(prior, _as_built(prior.config), "prior")
    if change is None:
        return None
    if precision == "int8":
        raise ValueError(f'precision: "int8" has packed weights alone and calls no modules, but {change.text}')
    warn_once(
        prior,
        f"{change.text}, which packed weights and CUDA graphs do not include: the prior's modules are called instead, "
        "which takes longer",
    )
    return change


class _WithoutValues(TorchFunctionMode):
    """Leave out random numbers, for which torch imports a second's worth of modules on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_BUILT: dict[str, RQTransformer] = {}


def _as_built(config: RQTransformerConfig) -> RQTransformer:
    """Return a prior of this config, without memory for its tensors."""
    key = repr(config)
    if key not in _BUILT:
        with torch.device("meta"), _WithoutValues():
            built = RQTransformer(copy.deepcopy(config))
        if len(_BUILT) >= 8:
            _BUILT.clear()
        _BUILT[key] = built
    return _BUILT[key]


def check_precision(prior: RQTransformer, precision: str) -> None:
    """Raise unless `prior` can be sampled from at `precision`.

    Raises:
        TypeError, ValueError: as `Engine.check_prior`; an unknown precision, or one that the device does not support.
    """
    Engine(precision).check_prior(prior)
    if precision == "int8" and prior.device.type != "cpu":
        raise ValueError('precision: expected "fp32" or "bf16" on a GPU ("int8" is for the CPU), got "int8"')


def cast_prior(prior: RQTransformer, precision: str) -> RQTransformer:
    """Return a prior whose modules compute in "fp32" or "bf16": itself where they do, or a copy. A float64 prior stays
    so."""
    if prior.dtype == torch.float64:
        return prior
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    tensors = (*prior.parameters(), *prior.buffers())
    if all(tensor.dtype == dtype for tensor in tensors if tensor.is_floating_point()):
        return prior
    return copy.deepcopy(prior).to(dtype)
