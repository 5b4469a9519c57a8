"""What `generate` and `edit` take, checked: every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from rqgen.models import RQVAE, VAR, MultiScaleVQVAE, RQTransformer
from rqgen.models.classes import class_label
from rqgen.models.condition import check_range
from rqgen.models.pair import check_tokenizer

from .draw import DrawSettings

Prior = RQTransformer | VAR
Tokenizer = RQVAE | MultiScaleVQVAE


def check_models(prior: Any, vae: Any) -> None:
    """A prior and the tokenizer whose codes it models, on one device."""
    systems = {RQTransformer: RQVAE, VAR: MultiScaleVQVAE}
    kind = next((ours for ours in systems if isinstance(prior, ours)), None)
    if kind is None:
        raise TypeError(f"prior: expected an RQTransformer or a VAR, got {type(prior).__name__}")
    if not isinstance(vae, systems[kind]):
        raise TypeError(f"vae: expected an {systems[kind].__name__}, got {type(vae).__name__}")
    check_tokenizer(prior, vae)


def check_settings(
    prior: Prior,
    condition: Tensor | None,
    *,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    cfg_scale: Any,
    seed: Any,
) -> DrawSettings:
    """How codes are drawn: temperature, top_k and top_p as one entry per depth (VAR: per scale)."""
    entries, name = (prior.depth, "depth") if isinstance(prior, RQTransformer) else (len(prior.scales), "scale")
    return DrawSettings(
        temperature=_per_entry(temperature, "temperature", entries, name, _check_temperature),
        top_k=_per_entry(top_k, "top_k", entries, name, _check_top_k),
        top_p=_per_entry(top_p, "top_p", entries, name, _check_top_p),
        guidance=_check_guidance(cfg_scale, prior, condition),
        seed=check_integer(seed, "seed", 0, 2**64 - 1),
    )


def check_condition(condition: Any, prior: Prior) -> Tensor:
    """The condition as an int64 tensor on the prior's device, every id in range: integers of every width, class names
    become labels."""
    condition = _labels_of_names(condition, prior)
    try:
        # A copy, because torch takes neither negative strides nor, without a warning, arrays that are read-only.
        given = np.array(condition) if isinstance(condition, (np.ndarray, np.generic)) else condition
        condition = torch.as_tensor(given, device=prior.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"condition: expected a tensor or a list of integers or class names ({error})") from error
    if condition.dim() == 0 or condition.shape[0] == 0:
        raise ValueError(f"condition: expected at least one row, got shape {tuple(condition.shape)}")
    condition = prior.condition_ids(condition, condition.shape[0])
    size = prior.config.num_classes if isinstance(prior, VAR) else prior.config.condition_vocab_size
    check_range(condition, size, "condition")
    return condition


def _labels_of_names(condition: Any, prior: Prior) -> Any:
    if isinstance(condition, str):
        raise TypeError(f"condition: expected a tensor or a list of integers or class names, got {condition!r}")
    if isinstance(condition, np.ndarray) and condition.dtype.kind in "UO":
        condition = condition.tolist()
    if not isinstance(condition, (list, tuple)):
        return condition
    return [
        class_label(entry, prior, "condition")
        if isinstance(entry, str)
        else _labels_of_names(entry, prior)
        if isinstance(entry, (list, tuple))
        else entry
        for entry in condition
    ]


def check_partial_codes(partial_codes: Any, start_row: int, prior: RQTransformer) -> Tensor | None:
    """The codes on the prior's device, with the rows above `start_row` in range."""
    if partial_codes is None:
        if start_row > 0:
            raise ValueError(f"start_row: {start_row} needs partial_codes, which hold the rows above it")
        return None
    if not isinstance(partial_codes, Tensor):
        raise TypeError(f"partial_codes: expected a tensor, got {type(partial_codes).__name__}")
    if partial_codes.dtype != torch.int64:
        raise TypeError(f"partial_codes: expected int64, got {partial_codes.dtype}")
    if partial_codes.shape[1:] != prior.config.code_shape or partial_codes.shape[0] == 0:
        expected = ", ".join(map(str, prior.config.code_shape))
        raise ValueError(f"partial_codes: expected shape (num, {expected}), got {tuple(partial_codes.shape)}")
    check_range(partial_codes[:, :start_row], prior.config.codebook_size, "partial_codes above start_row")
    return partial_codes.to(prior.device)


def number_of_images(condition: Tensor | None, num: Any, partial_codes: Tensor | None) -> int:
    if num is not None:
        num = check_integer(num, "num", 1)
        if condition is not None:
            raise ValueError("num: only without a condition, whose length says how many images")
    counts = {
        name: count
        for name, count in (
            ("num", num),
            ("condition", None if condition is None else condition.shape[0]),
            ("partial_codes", None if partial_codes is None else partial_codes.shape[0]),
        )
        if count is not None
    }
    if not counts:
        raise ValueError("num: expected the number of images, as there is no condition; got None")
    if len(set(counts.values())) > 1:
        raise ValueError(f"partial_codes: the number of images differs: {counts}")
    return next(iter(counts.values()))


def _per_entry(value: Any, name: str, entries: int, kind: str, check: Callable[[Any, str], Any]) -> list[Any]:
    value = _plain(value)
    if not isinstance(value, (list, tuple)):
        return [check(value, name)] * entries
    if len(value) != entries:
        raise ValueError(f"{name}: expected one value, or {entries} (one per {kind}), got {len(value)}")
    return [check(item, f"{name}[{d}]") for d, item in enumerate(value)]


def _check_temperature(value: Any, name: str) -> float:
    return _nonnegative(_check_number(value, name, "a number"), name)


def _check_top_k(value: Any, name: str) -> int | None:
    # No codebook has as many codes as the largest number that operators take.
    return None if value is None else min(check_integer(value, name, 1), 2**62)


def _check_top_p(value: Any, name: str) -> float | None:
    if value is None:
        return None
    number = _check_number(value, name, "a number or None")
    if not 0 < number <= 1:
        raise ValueError(f"{name}: expected a number in (0, 1], got {value}")
    return number


def _check_guidance(cfg_scale: Any, prior: Prior, condition: Tensor | None) -> float:
    if cfg_scale is None:
        return 0.0
    scale = _nonnegative(_check_number(cfg_scale, "cfg_scale", "a number or None"), "cfg_scale")
    if scale > 0 and not prior.config.has_null_condition:
        raise ValueError(
            "cfg_scale: guidance needs a prior with a null condition, and this one was not trained with "
            "condition_dropout"
        )
    if scale > 0 and condition is None:
        raise ValueError("cfg_scale: guidance needs a condition, got None")
    return scale


def check_integer(value: Any, name: str, lowest: int, highest: int | None = None) -> int:
    """An integer of Python or NumPy, or in a tensor without dimensions, as Python's."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, SupportsIndex):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    value = operator.index(plain)
    if value < lowest or (highest is not None and value > highest):
        bound = f">= {lowest}" if highest is None else f"in [{lowest}, {highest}]"
        raise ValueError(f"{name}: expected an integer {bound}, got {value}")
    return value


def check_flag(value: Any, name: str) -> bool:
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return plain


def _check_number(value: Any, name: str, expected: str) -> float:
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    try:
        return float(plain)
    except OverflowError:
        return math.inf


def _nonnegative(value: float, name: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return value


def _plain(value: Any) -> Any:
    """Numbers of arrays and tensors as Python's, in lists unless it is one."""
    return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value
