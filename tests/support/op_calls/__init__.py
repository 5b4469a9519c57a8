"""Calls of every operator, one module for each: whatever calls all of them takes its calls from here.

A module is named like the operator's folder in csrc/ops and holds

    RAGGED                  calls in shapes that fit no tile, also for CUDA graphs (`Call.captured`):
                            tests/rqkernels/test_cuda.py, benchmarks/gpu_check.py
    typical(device, quick)  calls in the shapes of the benchmarks: gpu_check's profile, quick benchmarks
    FUNCTIONS               the public functions, each with valid arguments: tests/rqkernels/test_arguments.py,
                            tests/rqkernels/test_references.py, tests/fuzz/operators.py
    DERIVATIVES             calls to differentiate: tests/rqkernels/test_derivatives.py

Needs torch and rqkernels alone. This folder's parent is on the path of pytest (pyproject.toml) and of the scripts that
read it; tests/ itself must never be: its folders would hide rqkernels and rqgen.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ._data import rows
from ._shapes import Shape, codebook_at, shapes
from ._types import Agreement, Call, Derivative, Function, Twin

OPS = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def calls_of(op: str) -> ModuleType:
    """The module of an operator."""
    return importlib.import_module(f"{__name__}.{op}")


def functions() -> dict[str, Function]:
    """The public functions of all operators, by name."""
    return {name: function for op in OPS for name, function in calls_of(op).FUNCTIONS.items()}


def derivatives() -> dict[str, Derivative]:
    """Calls to differentiate, of all operators, by what they are called in tests."""
    return {name: derivative for op in OPS for name, derivative in calls_of(op).DERIVATIVES.items()}


__all__ = [
    "OPS",
    "Agreement",
    "Call",
    "Derivative",
    "Function",
    "Shape",
    "Twin",
    "calls_of",
    "codebook_at",
    "derivatives",
    "functions",
    "rows",
    "shapes",
]
