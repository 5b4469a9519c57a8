"""Scalars, read as the type of their setting."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from .nodes import FALSES, INTEGER, NUMBER, TRUES, Node

_INT64 = 2**63
# The arithmetic of models is float32: a larger number would be infinite there.
FLOAT32_MAX = (2 - 2**-23) * 2.0**127


NOTHING = object()


def read_scalar(node: Node, hint: Any) -> Any:
    """The value of a scalar node; NOTHING where it has another type."""
    value = node.value
    if typing.get_origin(hint) is Literal:
        return next((one for one in typing.get_args(hint) if _same(value, one, exact=node.exact)), NOTHING)
    if not isinstance(hint, type):
        raise TypeError(f"settings of type {hint!r} are not supported")
    if hint is types.NoneType:
        return None if node.is_null else NOTHING
    if issubclass(hint, Enum):
        return next((one for one in hint if value is one or (not node.exact and _same(value, one.value))), NOTHING)
    if issubclass(hint, Path):
        usable = isinstance(value, (str, Path)) and str(value) and "\0" not in str(value)
        return hint(value) if usable else NOTHING
    if hint is str:
        return value if isinstance(value, str) else NOTHING
    if hint is bool:
        if isinstance(value, str) and not node.exact:
            return value in TRUES if value in TRUES or value in FALSES else NOTHING
        return value if isinstance(value, bool) else NOTHING
    if hint in (int, float):
        return _exact_number(value, hint) if node.exact else _number(value, hint)
    raise TypeError(f"settings of type {hint!r} are not supported")


def _same(value: Any, allowed: Any, *, exact: bool = False) -> bool:
    if type(value) is type(allowed) and value == allowed:
        return True
    return not exact and isinstance(value, str) and value == str(allowed)


def _exact_number(value: Any, kind: type) -> Any:
    """A number of Python or NumPy, of which only an integer is one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        return NOTHING
    return _number(int(value) if isinstance(value, numbers.Integral) else float(value), kind)


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return NOTHING
    if isinstance(value, str) and not NUMBER.fullmatch(value):
        return NOTHING
    try:
        number = float(value)
    except OverflowError:
        return NOTHING
    if not math.isfinite(number):
        return NOTHING
    if kind is float:
        return number if abs(number) <= FLOAT32_MAX else NOTHING
    if abs(number) > _INT64:
        return NOTHING
    if isinstance(value, str):
        try:
            exact = Decimal(value)
            value = int(exact) if exact == exact.to_integral_value() else 0.5
        except ArithmeticError:  # an exponent beyond what Decimal holds
            return NOTHING
    return int(value) if value == int(value) and -_INT64 <= value < _INT64 else NOTHING


def shape_of(node: Node) -> str:
    if isinstance(node.value, dict) or dataclasses.is_dataclass(node.value):
        return "mapping"
    return "list" if isinstance(node.value, list) else "scalar"


def too_large(node: Node, hint: Any) -> str:
    """Return what an error message says of the size that a number may have, where only its size is wrong."""
    value = node.value
    is_text = isinstance(value, str)
    if is_text and node.exact:
        return ""
    is_whole = INTEGER.fullmatch(value) if is_text else isinstance(value, numbers.Integral)
    if hint is int and is_whole and not isinstance(value, bool):
        return " of at most 64 bits"
    if hint is float and (NUMBER.fullmatch(value) if is_text else isinstance(value, (int, float))):
        try:
            is_large = FLOAT32_MAX < abs(float(value)) < math.inf
        except OverflowError:
            is_large = False
        return f" of at most {FLOAT32_MAX:.3g} (float32)" if is_large else ""
    return ""
