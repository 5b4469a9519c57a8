"""Resuming a run: finding a whole checkpoint, comparing settings, checking the state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rqgen.config import shorthands
from rqgen.data import DataConfig
from rqgen.data.settings import saved_settings

from .checkpoint import INFO_FILE, STATE_FILE, check_random_states, checkpoints, load_checkpoint

logger = logging.getLogger(__name__)

IMAGES = "images"
"""The entry of a run's description that holds the fingerprint of its images."""
# Settings that may differ when a run is resumed: none of them changes the weights a step computes.
RESUMABLE_CHANGES = frozenset(
    {"workers", "log_every", "image_every", "checkpoint_every", "keep_checkpoints", "tensorboard", "history_csv"}
)


# Paths of files whose checksums stand in a run's description, so that they may be moved.
_MOVABLE = frozenset({"perceptual.vgg", "perceptual.heads", "perceptual.features"})


def newest_whole_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest undamaged checkpoint and its info; None if there is no checkpoint. Damaged newer ones are named
    in the log.

    Raise ValueError if all are damaged.
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
    """Return (state, info) of a checkpoint that `train` wrote. Raise FileNotFoundError, or ValueError that names the
    fault."""
    state, info = load_checkpoint(path, map_location=map_location)
    _check_entries(info, _INFO, str(path / INFO_FILE))
    where = str(path / STATE_FILE)
    state.setdefault("adversary", None)  # stands there only where a model was trained against another
    _check_entries(state, _STATE, where)
    if state["step"] != info["step"]:
        raise ValueError(f"{where}: step: expected {info['step']}, as info.json says, got {state['step']}")
    if state["history"] and (last := state["history"][-1]["step"]) > state["step"]:
        raise ValueError(f"{where}: history: expected steps up to {state['step']}, got {last}")
    try:
        check_random_states(state["random"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return state, info


def check_resumable(info: Mapping[str, Any], description: dict[str, Any], path: Path) -> list[tuple[str, Any, Any]]:
    """Raise ValueError if the checkpoint ``path`` is of another run, or past the end of this one. Return the other
    differences: (key, before, now)."""
    saved, current = saved_description(info["description"]), dict(description)
    before, now = saved.pop(IMAGES, None), current.pop(IMAGES, None)
    # Older checkpoints do not name their system, whose settings and weights do not fit another one, nor their codebook,
    # which stands for the tokenizer, wherever that lies.
    may_change = RESUMABLE_CHANGES | {"steps", "tokenizer"} | ({"system", "codebook"} - saved.keys())
    # Files, images and codes that are known by what they are may lie elsewhere now.
    places = _MOVABLE
    if before is not None:
        places |= {"codes", *(f"data.{key}" for key in shorthands(DataConfig).values())}
    changed = refuse_other_run(saved, current, path, may_change=may_change, places=places)
    if before is not None and now is not None and before != now:
        others = "" if (there := _in_words(before)) != _in_words(now) else ", but others"
        raise ValueError(f"cannot resume {path}: its images have changed: {there} then, {_in_words(now)} now{others}")
    steps = description["loop"]["steps"]
    if info["step"] > steps:
        raise ValueError(f"loop.steps: expected at least {info['step']}, where {path} is, got {steps}")
    return changed


def saved_description(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a run as it was saved, with what older versions did not say of the images."""
    found = {}
    for name, value in description.items():
        is_data = name == "data" and isinstance(value, Mapping)
        value = saved_settings(value) if is_data else value
        found[name] = saved_description(value) if isinstance(value, Mapping) and not is_data else value
    return found


def _in_words(images: Any) -> str:
    if not isinstance(images, Mapping):
        return str(images)[:80]
    classes = images.get("classes")
    return f"{images.get('images')} images" + (f" of {classes} class{'' if classes == 1 else 'es'}" if classes else "")


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, where: str) -> None:
    """Restore an optimizer with the same settings. Raise ValueError that names the entry that does not fit."""
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
    """Restore a gradient scaler. Raise ValueError that names the entry that does not fit."""
    _check_entries(state, dict.fromkeys(scaler.state_dict(), (int, float)), where)
    scaler.load_state_dict(state)


def refuse_other_run(
    saved: dict[str, Any],
    current: dict[str, Any],
    path: Path,
    *,
    may_change: frozenset[str] = RESUMABLE_CHANGES,
    places: frozenset[str] = frozenset(),
) -> list[tuple[str, Any, Any]]:
    """Raise ValueError if two descriptions of a run differ in a setting that changes its weights. Return the other
    differences: (key, before, now). ``may_change`` holds last names of keys, ``places`` whole keys of paths that may
    lead elsewhere, but not come or go."""
    differing = _differences(saved_description(saved), current, "")
    for key, before, now in differing:
        is_moved = key in places and isinstance(before, str) and isinstance(now, str)
        if key.rsplit(".", 1)[-1] not in may_change and not is_moved:
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
    """Return parameter groups without the learning rate, which is set before every step."""
    return [{k: v for k, v in group.items() if k != "lr"} if isinstance(group, dict) else group for group in groups]


def _check_entries(entries: Any, expected: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for missing, unknown or wrong entries. ``expected`` maps each name to a type, or to a function
    that returns the fault of a value, or None."""
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
    if fault := _records_fault(value, lambda one: isinstance(one, (int, float)), "numbers"):
        return fault
    if any(_step_fault(record.get("step")) for record in value):
        return "expected a step in each record"
    steps = [record["step"] for record in value]
    return None if steps == sorted(set(steps)) else "expected records of ascending steps"


def _window_fault(value: Any) -> str | None:
    if fault := _records_fault(value, _is_finite_scalar, "finite scalars"):
        return fault
    # The names of the last one are averaged over all.
    same = all(value[-1].keys() <= record.keys() for record in value)
    return None if same else "expected the names of the last record in each"


def _is_finite_scalar(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.ndim > 0 or not value.is_floating_point():
        return False
    return bool(value.isfinite())


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


def _adversary_fault(value: Any) -> str | None:
    if value is None:
        return None
    good = isinstance(value, Mapping) and value.keys() == {"updates", "model", "optimizer", "scaler"}
    if not good or _step_fault(value["updates"]) or _tensors_fault(value["model"]):
        return "expected nothing, or 'updates', 'model', 'optimizer' and 'scaler'"
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
    "adversary": _adversary_fault,
}
