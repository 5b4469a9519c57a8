"""Checkpoints: a folder per step, written whole or not at all."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

STATE_FILE = "state.pt"
INFO_FILE = "info.json"
_NAME = re.compile(r"step-(\d{8})")


def random_states() -> dict[str, Any]:
    """The state of every global random generator, as plain data that ``weights_only`` loading accepts."""
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
    version, words, cached = state["python"]
    random.setstate((version, tuple(words), cached))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], info: Mapping[str, Any], *, keep: int) -> Path:
    """Writes ``folder/step-XXXXXXXX`` and removes all but the newest ``keep``.

    ``state`` (tensors and plain data) becomes state.pt, ``info`` a readable info.json. Both are written into
    a temporary folder that is renamed when complete: whoever kills the process finds the old ones untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with open(temporary / STATE_FILE, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        (temporary / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None. Unfinished temporary folders do not count."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path, *, map_location: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, info) of one checkpoint folder. Raises FileNotFoundError, or ValueError for a damaged one."""
    for name in (STATE_FILE, INFO_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"not a checkpoint: {path / name} is missing")
    try:
        state = torch.load(path / STATE_FILE, map_location=map_location, weights_only=True)
        info = json.loads((path / INFO_FILE).read_text())
    except Exception as error:  # torch.load raises whatever the damage makes of the file
        raise ValueError(f"{path}: damaged checkpoint ({' '.join(str(error).split())[:200]})") from error
    return state, info


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
