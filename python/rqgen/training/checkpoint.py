"""Checkpoints: a folder per step, written whole or not at all, with a checksum of every byte."""

from __future__ import annotations

import random
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rqgen.files import CHECKSUM, check_json, new_folder, remove_folder, write_signed_json
from rqgen.reading import describe_file, read_json, unreadable

STATE_FILE = "state.pt"
INFO_FILE = "info.json"
_NAME = re.compile(r"step-(\d{8,})")


def random_states() -> dict[str, Any]:
    """Return the state of every global random generator, as plain data that ``weights_only`` loading accepts."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_states(state: Mapping[str, Any]) -> None:
    random.setstate(_python_state(state))
    np.random.set_state(_numpy_state(state))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


def check_random_states(state: Any) -> None:
    """Raise ValueError for a state that `restore_random_states` could not use."""
    try:
        random.Random().setstate(_python_state(state))
        np.random.RandomState().set_state(_numpy_state(state))
        torch.Generator().set_state(state["torch"].cpu())
    except Exception as error:  # each generator fails in its own way
        raise ValueError(f"random: expected states of random generators ({type(error).__name__}: {error})") from error


def _python_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    version, words, cached = state["python"]
    return version, tuple(words), cached


def _numpy_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    name, keys, position, has_gauss, gauss = state["numpy"]
    return name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], info: Mapping[str, Any], *, keep: int) -> Path:
    """Write ``folder/step-XXXXXXXX`` and remove all earlier ones but the newest ``keep``, this one counted.

    ``state`` (tensors and plain data) becomes state.pt, ``info`` a readable info.json. If the process is killed,
    the old checkpoints are untouched. Checkpoints of later steps, left by a run that was resumed from an earlier one,
    are kept.
    """
    target = folder / f"step-{step:08d}"
    with new_folder(target) as written:
        with open(written / STATE_FILE, "wb") as file:
            torch.save(dict(state), file)
        write_signed_json(written / INFO_FILE, info, written / STATE_FILE)
    upto = [path for path in checkpoints(folder) if _step(path) <= step]
    for old in upto[:-keep]:
        remove_folder(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder in the order of their steps, without unfinished ones."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path, *, map_location: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (state, info) of one checkpoint folder. Raise FileNotFoundError, or ValueError for a damaged one."""
    state_path, info_path = path / STATE_FILE, path / INFO_FILE
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected the folder of a checkpoint, got {describe_file(path)}")
    for file in (state_path, info_path):
        if not file.is_file():
            found = describe_file(file)
            raise FileNotFoundError(f"not a checkpoint: {file} is {'missing' if found == 'no file' else found}")
    try:
        info = read_json(info_path)
        state = _load_state(state_path, map_location)
        check_json(info_path, info, state_path)
    except ValueError as error:
        raise ValueError(f"{path}: damaged checkpoint: {error}") from error
    return state, {name: value for name, value in info.items() if name != CHECKSUM}


def _load_state(path: Path, map_location: torch.device | str) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise unreadable(path, "torch checkpoint", f"no zip archive, or cut short: {path.stat().st_size} bytes")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch.load fails in many ways on damaged files
        # Its message advises to run the code that the file may hold.
        reason = f"not of tensors and plain data: {type(error).__name__}"
        raise unreadable(path, "torch checkpoint", reason) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dictionary, got {type(state).__name__}")
    return state


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested dictionaries and lists, with its path."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from tensors_in(item, f"{name}.{key}" if name else str(key))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
