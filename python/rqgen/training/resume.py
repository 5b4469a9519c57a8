"""Resuming a run: finding a whole checkpoint, comparing settings, checking the state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import STATE_FILE, check_random_states, checkpoints, load_checkpoint

logger = logging.getLogger(__name__)

# Settings that may differ when a run is resumed: none of them changes the weights a step computes.
RESUMABLE_CHANGES = frozenset(
    {"workers", "log_every", "image_every", "checkpoint_every", "keep_checkpoints", "tensorboard", "history_csv"}
)


def newest_whole_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its info; None where there is no checkpoint at all. Damaged newer ones
    are named in the log.

    Raises ValueError where all are damaged.
    """
    found, damage = checkpoints(folder), []
    for path in reversed(found):
        try:
            _, info = read_state(path)
        except (ValueError, FileNotFoundError) as error:
            damage.append(str(error))
            continue
        for one in damage:
            logger.warning("%s; resuming from %s", one, path.name)
        return path, info
    if damage:
        raise ValueError(f"no checkpoint in {folder} is whole: {'; '.join(damage)}")
    return None


def read_state(path: Path, *, map_location: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, info) of a checkpoint that `train` wrote. Raises FileNotFoundError, or ValueError that names what is
    wrong."""
    state, info = load_checkpoint(path, map_location=map_location)
    _check_entries(info, _INFO, str(path))
    where = str(path / STATE_FILE)
    _check_entries(state, _STATE, where)
    if state["step"] != info["step"]:
        raise ValueError(f"{where}: step: expected {info['step']}, as info.json says, got {state['step']}")
    try:
        check_random_states(state["random"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return state, info


def check_resumable(info: Mapping[str, Any], description: dict[str, Any], path: Path) -> list[tuple[str, Any, Any]]:
    """Raises ValueError where the checkpoint ``path`` is of another run, or past the end of this one. Returns what
    differs otherwise: (key, before, now)."""
    # Older checkpoints do not name their system, whose settings and weights tell it apart, nor their codebook, which
    # stands for the tokenizer, wherever that lies.
    may_change = RESUMABLE_CHANGES | {"steps", "tokenizer"} | ({"system", "codebook"} - info["description"].keys())
    changed = refuse_other_run(info["description"], description, path, may_change=may_change)
    steps = description["loop"]["steps"]
    if info["step"] > steps:
        raise ValueError(f"loop.steps: expected at least {info['step']}, where {path} is, got {steps}")
    return changed


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, where: str) -> None:
    """Restores an optimizer with the same settings. Raises ValueError that names what does not fit."""
    _check_entries(state, {"state": dict, "param_groups": list}, where)
    if _settings(state["param_groups"]) != _settings(optimizer.state_dict()["param_groups"]):
        raise ValueError(f"{where}.param_groups: not those of this optimizer")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in state["state"].items():
        at = f"{where}.state.{index}"
        if not isinstance(index, int) or not 0 <= index < len(parameters):
            raise ValueError(f"{at}: expected one of {len(parameters)} parameters")
        _check_entries(entry, {"step": torch.Tensor, "exp_avg": torch.Tensor, "exp_avg_sq": torch.Tensor}, at)
        shapes = {"step": torch.Size(), "exp_avg": parameters[index].shape, "exp_avg_sq": parameters[index].shape}
        for name, shape in shapes.items():
            if entry[name].shape != shape:
                raise ValueError(f"{at}.{name}: expected shape {tuple(shape)}, got {tuple(entry[name].shape)}")
            if not entry[name].is_floating_point() or not bool(entry[name].isfinite().all()):
                raise ValueError(f"{at}.{name}: expected finite numbers, got {entry[name].dtype}")
    optimizer.load_state_dict(dict(state))


def load_scaler(scaler: Any, state: Any, *, where: str) -> None:
    """Restores a gradient scaler. Raises ValueError that names what does not fit."""
    _check_entries(state, dict.fromkeys(scaler.state_dict(), (int, float)), where)
    scaler.load_state_dict(state)


def refuse_other_run(
    saved: dict[str, Any], current: dict[str, Any], path: Path, *, may_change: frozenset[str] = RESUMABLE_CHANGES
) -> list[tuple[str, Any, Any]]:
    """Raises ValueError where two descriptions of a run differ in what changes its weights. Returns what differs
    otherwise: (key, before, now)."""
    differing = _differences(saved, current, "")
    for key, before, now in differing:
        if key.rsplit(".", 1)[-1] not in may_change:
            raise ValueError(f"cannot resume {path}: '{key}' was {before!r} there and is {now!r} now")
    return differing


def _differences(before: Any, now: Any, key: str) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for name in sorted(before.keys() | now.keys())
            for difference in _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if before == now else [(key, before, now)]


def _settings(groups: list[Any]) -> list[Any]:
    """Parameter groups without the learning rate, which is set before every step."""
    return [{k: v for k, v in group.items() if k != "lr"} if isinstance(group, dict) else group for group in groups]


def _check_entries(entries: Any, expected: Mapping[str, Any], where: str) -> None:
    """``expected`` maps each name to a type, or to a function that says what is wrong with a value, if anything."""
    if not isinstance(entries, Mapping):
        raise ValueError(f"{where}: expected a dictionary, got {type(entries).__name__}")
    if missing := expected.keys() - entries.keys():
        raise ValueError(f"{where}: '{min(missing)}' is missing")
    if unknown := [name for name in entries if name not in expected]:
        raise ValueError(f"{where}: unknown entry {unknown[0]!r}")
    for name, kind in expected.items():
        value = entries[name]
        if isinstance(kind, (type, tuple)):
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            fault = None if isinstance(value, kind) and not isinstance(value, bool) else f"expected {names}"
        else:
            fault = kind(value)
        if fault:
            raise ValueError(f"{where}: {name}: {fault}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def _step_fault(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if whole else "expected a number of steps"


def _history_fault(value: Any) -> str | None:
    return _records_fault(value, lambda one: isinstance(one, (int, float)), "numbers")


def _window_fault(value: Any) -> str | None:
    return _records_fault(
        value, lambda one: isinstance(one, torch.Tensor) and one.ndim == 0 and bool(one.isfinite()), "finite scalars"
    )


def _records_fault(value: Any, fits: Callable[[Any], bool], what: str) -> str | None:
    good = isinstance(value, list) and all(
        isinstance(record, dict) and all(isinstance(key, str) and fits(one) for key, one in record.items())
        for record in value
    )
    return None if good else f"expected a list of dictionaries of {what}"


def _tensors_fault(value: Any) -> str | None:
    good = isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )
    return None if good else "expected a dictionary of tensors"


def _averaged_fault(value: Any) -> str | None:
    if value is None:
        return None
    good = isinstance(value, Mapping) and value.keys() == {"updates", "model"}
    if not good or _step_fault(value["updates"]) or _tensors_fault(value["model"]):
        return "expected nothing, or 'updates' and 'model'"
    return None


_INFO = {"step": _step_fault, "stage": str, "description": dict}
_STATE = {
    "step": _step_fault,
    "history": _history_fault,
    "window": _window_fault,
    "model": _tensors_fault,
    "optimizer": dict,
    "averaged": _averaged_fault,
    "scaler": (dict, type(None)),
    "random": dict,
}
