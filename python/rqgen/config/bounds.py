"""Checks that settings make of their fields."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

from .registry import OPTIONS

MAX_SEED = 2**32 - 1
"""The largest seed that all generators take: NumPy's global one, which Accelerate seeds too, has 32 bits."""


def check_finite(settings: Any, prefix: str = "") -> None:
    """Raise ValueError naming the first field of a dataclass, nested ones too, that is or holds NaN or infinity: no
    setting means that."""
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_finite(value, f"{name}.")
        if field.name == OPTIONS and isinstance(value, dict):
            for section, options in value.items():
                check_finite(options, f"{prefix}{section}.")
        for item in value if isinstance(value, (list, tuple)) else (value,):
            is_float = isinstance(item, numbers.Real) and not isinstance(item, numbers.Integral)
            if is_float and not math.isfinite(item):
                raise ValueError(f"{name}: expected a finite number, got {item}")


def check_bounds(settings: Any, **bounds: tuple[int, int]) -> None:
    """Raise ValueError for a field (None aside) outside its (lowest, highest), and as `check_finite`.

    The highest values are no advice: they keep a slip of the finger from filling memory or from building objects for
    hours before anything fails.
    """
    check_finite(settings)
    for name, (lowest, highest) in bounds.items():
        value = getattr(settings, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name}: expected at least {lowest}, got {value}")
        if value is not None and value > highest:
            raise ValueError(f"{name}: expected at most {highest}, got {value}")


def check_seeds(settings: Any, *names: str) -> None:
    """Raise ValueError for a seed outside 0..MAX_SEED: the one rule for all seeds among the settings."""
    for name in names:
        if not 0 <= getattr(settings, name) <= MAX_SEED:
            raise ValueError(f"{name}: expected a seed within 0..{MAX_SEED} (32 bits), got {getattr(settings, name)}")
