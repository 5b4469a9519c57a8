"""Scalars, read as the type of their setting."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from .nodes import FALSES, NUMBER, TRUES, Node

_INT64 = 2**63


NOTHING = object()


def read_scalar(node: Node, hint: Any) -> Any:
    """The value of a scalar node; NOTHING where it has another type."""
    value = node.value
    if typing.get_origin(hint) is Literal:
        return next((one for one in typing.get_args(hint) if _same(value, one)), NOTHING)
    if not isinstance(hint, type):
        raise TypeError(f"settings of type {hint!r} are not supported")
    if hint is types.NoneType:
        return None if node.is_null else NOTHING
    if issubclass(hint, Enum):
        return next((one for one in hint if value is one or _same(value, one.value)), NOTHING)
    if issubclass(hint, Path):
        usable = isinstance(value, (str, Path)) and str(value) and "\0" not in str(value)
        return hint(value) if usable else NOTHING
    if hint is str:
        return value if isinstance(value, str) else NOTHING
    if hint is bool:
        if isinstance(value, str):
            return value in TRUES if value in TRUES or value in FALSES else NOTHING
        return value if isinstance(value, bool) else NOTHING
    if hint in (int, float):
        return _number(value, hint)
    raise TypeError(f"settings of type {hint!r} are not supported")


def _same(value: Any, allowed: Any) -> bool:
    return (type(value) is type(allowed) and value == allowed) or (isinstance(value, str) and value == str(allowed))


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
        return number
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
