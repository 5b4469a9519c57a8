"""Checks that settings make of their fields."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from .fields import hints_of
from .hints import without_null
from .nodes import wrap
from .registry import OPTIONS
from .typed import WrongValueError, convert

MAX_SEED = 2**32 - 1
"""The largest seed that all generators take: NumPy's global one, which Accelerate seeds too, has 32 bits."""


def check_fields(settings: Any, prefix: str = "") -> None:
    """Check the fields of a dataclass, and of those in it, by their annotations, as values in files are.

    Text stands for no number here, and a float for no integer; a number of NumPy is one. Text for a path becomes a
    path. ``prefix`` is put before the names of fields in error messages.

    Raises:
        TypeError: a value of another type; the message starts with the field's dotted name.
        ValueError: a value of that type that a field does not take: not one of those listed, NaN, infinite, or larger
            than float32 or int64 hold.
    """
    hints = hints_of(type(settings))
    for field in dataclasses.fields(settings):
        value, path = getattr(settings, field.name), f"{prefix}{field.name}"
        if field.name == OPTIONS and isinstance(value, dict):
            for section, options in value.items():
                check_fields(options, f"{prefix}{section}.")
            continue
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{path}.")
        try:
            hint = hints[field.name] if value is None else without_null(hints[field.name])
            found = convert(wrap(value, path, exact=True), hint, path)
        except WrongValueError as error:
            kind = ValueError if _is_of_kind(error.node.value, error.hint) else TypeError
            raise kind(f"{error.path}: {error.reason}") from None
        if isinstance(value, str) and isinstance(found, Path):
            setattr(settings, field.name, found)


def check_finite(settings: Any, prefix: str = "") -> None:
    """Raise ValueError naming the first field of a dataclass, nested ones too, that is or holds NaN or infinity.

    For dataclasses whose fields are not checked by their types; `check_fields` checks this too.
    """
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


def _is_of_kind(value: Any, hint: Any) -> bool:
    """Return True if only the value is wrong, not its type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_of_kind(value, member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return any(type(value) is type(allowed) for allowed in typing.get_args(hint))
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if isinstance(value, list):
        return typing.get_origin(hint) is tuple
    return isinstance(hint, type) and not issubclass(hint, Enum) and isinstance(value, hint)


def check_bounds(settings: Any, **bounds: tuple[float, float]) -> None:
    """Raise ValueError for a field (None aside) outside its (lowest, highest), and as `check_fields`.

    The highest values are no advice: they keep a slip of the finger from filling memory or from building objects for
    hours before anything fails.
    """
    check_fields(settings)
    for name, (lowest, highest) in bounds.items():
        value = getattr(settings, name)
        if value is not None and value < lowest:
            raise ValueError(f"{name}: expected at least {lowest}, got {value}")
        if value is not None and value > highest:
            raise ValueError(f"{name}: expected at most {highest}, got {value}")


def check_seeds(settings: Any, *names: str) -> None:
    """Raise ValueError for a seed outside 0..MAX_SEED, and as `check_fields`: the one rule for all seeds."""
    check_fields(settings)
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= MAX_SEED:
            raise ValueError(f"{name}: expected a seed within 0..{MAX_SEED} (32 bits), got {value}")
