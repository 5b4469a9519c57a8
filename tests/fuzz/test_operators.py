"""A sample of the generated calls; faults that are planted are reported."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import rqkernels

SCRIPT = Path(__file__).with_name("operators.py")


def fuzz(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_hostile_arguments_are_refused_by_name() -> None:
    ran = fuzz("--calls", 400, "--seed", 12)
    assert ran.stdout == "400 calls, seed 12: nothing\n", ran.stdout + ran.stderr
    assert ran.returncode == 0


def test_every_function_is_called() -> None:
    called = runpy.run_path(str(SCRIPT))["FUNCTIONS"]
    assert set(called) == set(rqkernels.__all__) - {"BlockWeights", "ResidualCodes", "info", "reference"}


def test_what_goes_wrong_is_told() -> None:
    # Long enough for the other calls on a busy machine: a hang is judged by the clock.
    ran = fuzz("--calls", 12, "--seed", 12, "--plant", "--timeout", 15)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    told = dict(re.findall(r"^call (\d+): (\w+): ", ran.stdout, re.MULTILINE))
    assert told == {"2": "crash", "4": "hang", "6": "class", "7": "unnamed", "8": "refused", "9": "wrong"}
    assert ran.stdout.endswith("12 calls, seed 12: 1 class, 1 crash, 1 hang, 1 refused, 1 unnamed, 1 wrong\n")
