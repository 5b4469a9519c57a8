"""The settings of a dataclass: names, types, defaults, sections."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, Literal

from .hints import declared_hints
from .registry import OPTIONS, opened


def require_dataclass(cls: Any) -> None:
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"cls: expected a dataclass, got {cls!r}")


def hints_of(cls: type) -> dict[str, Any]:
    """Setting -> type, of a registry's sections too."""
    hints = declared_hints(cls)
    if not hasattr(cls, "_opened"):
        return hints
    registry, chosen_by = opened(cls)
    hints = {**hints, **registry.sections()}
    if chosen_by is not None:
        hints[chosen_by] = Literal[tuple(registry.names())]
    return hints


def setting_names(cls: type) -> list[str]:
    """The names of all settings of a dataclass, a registry's sections (see `open_sections`) last."""
    names = [one.name for one in dataclasses.fields(cls)]
    if hasattr(cls, "_opened"):
        names = [name for name in names if name != OPTIONS] + list(opened(cls).registry.sections())
    return names


@functools.cache
def _declared_dataclasses(cls: type) -> dict[str, type]:
    nested: dict[str, type] = {}
    for name, hint in declared_hints(cls).items() if dataclasses.is_dataclass(cls) else ():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        for candidate in typing.get_args(hint) if union else (hint,):
            if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
                nested[name] = candidate
    return nested


def nested_dataclasses(cls: type) -> dict[str, type]:
    """Setting -> dataclass, for fields declared as ``SomeDataclass`` or ``SomeDataclass | None``, and for the sections
    that a registry names (see `open_sections`)."""
    return {**_declared_dataclasses(cls), **opened(cls).registry.sections()}


def shorthands(cls: type) -> dict[str, str]:
    """Section -> dotted path of the field that a scalar in its place stands for."""
    found = {name: getattr(section, "shorthand", None) for name, section in nested_dataclasses(cls).items()}
    return {name: f"{name}.{field}" for name, field in found.items() if field is not None}


def default_of(cls: type, name: str) -> Any:
    if name in (sections := opened(cls).registry.sections()):
        return sections[name]()
    one = next(one for one in dataclasses.fields(cls) if one.name == name)
    return one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default
