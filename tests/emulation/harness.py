"""Runs a case of the emulation in one of its builds, with named arguments in and numpy arrays out."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

BUILDS = ("plain", "asan", "race")
# In order, and shuffled three ways, one of them with a smaller grid: results must be the same, bit for bit.
SCHEDULES = (0, 1, 2, 3)


# An argument of a case. None is "not given", where the case says that it may be.
Argument = np.ndarray | np.generic | bool | int | float | str | None


class KernelError(Exception):
    """A rule that a kernel broke, or a wrong argument of a case."""


class Device(NamedTuple):
    """Limits that launches keep to, and errors of matrix products. The default is an H100."""

    multiprocessors: int = 132
    shared_kib: int = 227  # of a block
    mma_bits: int = 0  # after which an mma errs; 0: it is exact

    def arguments(self) -> dict[str, Argument]:
        """Arguments of a case that describe this device."""
        error = 2.0**-self.mma_bits if self.mma_bits else 0.0
        return {
            "multiprocessors": self.multiprocessors,
            "shared_bytes": self.shared_kib * 1024,
            "mma_error": error,
        }


def as_array(name: str, value: object) -> np.ndarray[Any, Any]:
    """An argument as the emulation gets it: a number without dimensions, a string as its bytes, None as a void.

    Raises:
        TypeError: nothing of these; numpy would make an array of Python objects of it.
    """
    if value is None:
        return np.zeros((), "V1")
    array = np.asarray(value.encode() if isinstance(value, str) else value, order="C")
    if array.dtype.kind not in "biufS":
        raise TypeError(f"{name}: expected an array, a number, a string or None, got {type(value).__name__}")
    return array


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
        self, case: str, *, schedules: Sequence[int] = SCHEDULES, device: Device | None = None, **arguments: Argument
    ) -> list[np.ndarray[Any, Any]]:
        """Results of a case, in the order that its comment in csrc/emulation/ops gives.

        Args:
            case: its name, such as "sample_logits".
            schedules: seeds of the orders in which threads run; 0 is in order.
            device: what it runs on, where it is not the default.
            arguments: those of the case, by its names.

        Raises:
            KernelError: the kernel broke a rule, or its results depend on the schedule; or the case has no such
                argument, misses one, or expects it of another type.
        """
        given = {**arguments, **({} if device is None else device.arguments())}
        arrays = {name: as_array(name, value) for name, value in given.items()}
        if self.build != "plain":
            return self._run_executable(case, arrays, schedules)
        try:
            return _module(self._folder).run(case, arrays, list(schedules))
        except RuntimeError as error:
            raise KernelError(str(error)) from None

    def _run_executable(
        self, case: str, arrays: Mapping[str, np.ndarray], schedules: Sequence[int]
    ) -> list[np.ndarray[Any, Any]]:
        inputs, outputs = self._scratch / "in", self._scratch / "out"
        for folder in (inputs, outputs):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for name, array in arrays.items():
            np.save(inputs / f"{name}.npy", array)
        command = [self._folder / f"rqk_emulation_{self.build}", case, ",".join(map(str, schedules)), self._scratch]
        # What the environment asks of sanitizers is meant for other programs.
        environment = {k: v for k, v in os.environ.items() if not k.endswith("SAN_OPTIONS")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace")
        if done.returncode != 0:
            raise KernelError(done.stderr or f"ended with status {done.returncode}")
        return [np.load(outputs / f"{i}.npy") for i in range(len(list(outputs.iterdir())))]


def ragged_grid(**sizes: Sequence[int]) -> list[Any]:
    """All combinations of named sizes, as pytest parameters with readable ids."""
    return [
        pytest.param(*values, id="-".join(f"{n}{v}" for n, v in zip(sizes, values, strict=True)))
        for values in product(*sizes.values())
    ]
