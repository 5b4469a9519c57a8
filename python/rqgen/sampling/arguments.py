"""What `generate` and `edit` take, checked: every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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
    """The condition as a tensor on the prior's device, every id in range; class names become labels."""
    condition = _labels_of_names(condition, prior)
    try:
        condition = torch.as_tensor(condition, device=prior.device)
    except (TypeError, ValueError, RuntimeError) as error:
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


def check_partial_codes(partial_codes: Any, start_row: Any, prior: RQTransformer) -> Tensor | None:
    """The codes on the prior's device, with the rows above `start_row` in range."""
    check_integer(start_row, "start_row", 0, prior.config.code_shape[0] - 1)
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


def number_of_images(condition: Tensor | None, num: int | None, partial_codes: Tensor | None) -> int:
    if num is not None:
        check_integer(num, "num", 1)
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
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return [check(value, name)] * entries
    if len(value) != entries:
        raise ValueError(f"{name}: expected one value, or {entries} (one per {kind}), got {len(value)}")
    return [check(item, f"{name}[{d}]") for d, item in enumerate(value)]


def _check_temperature(value: Any, name: str) -> float:
    if not _is_number(value):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return float(value)


def _check_top_k(value: Any, name: str) -> int | None:
    return None if value is None else check_integer(value, name, 1)


def _check_top_p(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if not _is_number(value):
        raise TypeError(f"{name}: expected a number or None, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected a number in (0, 1], got {value}")
    return float(value)


def _check_guidance(cfg_scale: Any, prior: Prior, condition: Tensor | None) -> float:
    if cfg_scale is None:
        return 0.0
    if not _is_number(cfg_scale):
        raise TypeError(f"cfg_scale: expected a number or None, got {cfg_scale!r}")
    if not (math.isfinite(cfg_scale) and cfg_scale >= 0):
        raise ValueError(f"cfg_scale: expected a finite number >= 0, got {cfg_scale}")
    if cfg_scale > 0 and not prior.config.has_null_condition:
        raise ValueError(
            "cfg_scale: guidance needs a prior with a null condition, and this one was not trained with "
            "condition_dropout"
        )
    if cfg_scale > 0 and condition is None:
        raise ValueError("cfg_scale: guidance needs a condition, got None")
    return float(cfg_scale)


def check_integer(value: Any, name: str, lowest: int, highest: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < lowest or (highest is not None and value > highest):
        bound = f">= {lowest}" if highest is None else f"in [{lowest}, {highest}]"
        raise ValueError(f"{name}: expected an integer {bound}, got {value}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
