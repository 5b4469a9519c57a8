"""Runs a case of the emulation in one of its builds, with numpy arrays in and out."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BUILDS = ("plain", "asan", "race")
# In order, and shuffled three ways, one of them with a smaller grid: results must be the same, bit for bit.
SCHEDULES = (0, 1, 2, 3)


class KernelError(Exception):
    """What a build found wrong with a kernel."""


@cache
def _module(folder: Path) -> ModuleType:
    (path,) = folder.glob("rqk_emulation.*.so")
    spec = importlib.util.spec_from_file_location("rqk_emulation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Emulation:
    """One build: "plain" in this process, "asan" and "race" as executables, since a find ends their process."""

    def __init__(self, build: str, folder: Path, scratch: Path) -> None:
        self.build = build
        self._folder = folder
        self._scratch = scratch

    def run(
        self, case: str, *inputs: np.ndarray | int, schedules: Sequence[int] = SCHEDULES
    ) -> list[np.ndarray[Any, Any]]:
        """Results of a case. Integers become int64 scalars.

        Raises:
            KernelError: the kernel broke a rule, or its results depend on the schedule.
        """
        arrays = [np.array(a, dtype=np.int64) if isinstance(a, int) else np.ascontiguousarray(a) for a in inputs]
        if self.build != "plain":
            return self._run_executable(case, arrays, schedules)
        try:
            return _module(self._folder).run(case, arrays, list(schedules))
        except RuntimeError as error:
            raise KernelError(str(error)) from None

    def _run_executable(
        self, case: str, arrays: Sequence[np.ndarray], schedules: Sequence[int]
    ) -> list[np.ndarray[Any, Any]]:
        for old in self._scratch.glob("*.npy"):
            old.unlink()
        for i, array in enumerate(arrays):
            np.save(self._scratch / f"{i}.npy", array)
        command = [self._folder / f"rqk_emulation_{self.build}", case, ",".join(map(str, schedules)), self._scratch]
        # What the environment asks of sanitizers is meant for other programs.
        environment = {k: v for k, v in os.environ.items() if not k.endswith("SAN_OPTIONS")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace")
        if done.returncode != 0:
            raise KernelError(done.stderr or f"ended with status {done.returncode}")
        count = len(list(self._scratch.glob("out*.npy")))
        return [np.load(self._scratch / f"out{i}.npy") for i in range(count)]


def ragged_grid(**sizes: Sequence[int]) -> list[Any]:
    """All combinations of named sizes, as pytest parameters with readable ids."""
    return [
        pytest.param(*values, id="-".join(f"{n}{v}" for n, v in zip(sizes, values, strict=True)))
        for values in product(*sizes.values())
    ]
