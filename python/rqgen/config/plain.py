"""Settings as plain data."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from .registry import OPTIONS


def to_dict(instance: Any) -> dict[str, Any]:
    """The dataclass instance as dictionaries, lists, strings, numbers, booleans and None, as JSON and YAML
    hold."""
    if isinstance(instance, type) or not dataclasses.is_dataclass(instance):
        raise TypeError(f"instance: expected an instance of a dataclass, got {instance!r}")
    plain = {one.name: _plain(getattr(instance, one.name)) for one in dataclasses.fields(instance)}
    options = plain.pop(OPTIONS) if hasattr(type(instance), "_opened") else {}
    return {**plain, **options}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    numpy = sys.modules.get("numpy")  # not imported here: `rqgen --help` does without
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    return value
