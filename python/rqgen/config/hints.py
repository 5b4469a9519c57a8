"""Types of settings: their shape, and their names in error messages."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar

ConfigT = TypeVar("ConfigT")


@functools.cache
def declared_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def shape(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if hint is Any:
        return "any"
    if origin in (list, tuple, Sequence):
        return "list"
    if origin in (dict, Mapping) or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return "mapping"
    return "null" if hint is types.NoneType else "scalar"


def without_null(hint: Any) -> Any:
    """Return X for `X | None`, and other types as they are."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    members = [member for member in typing.get_args(hint) if member is not types.NoneType]
    return members[0] if len(members) == 1 else hint


def names_in(hint: Any) -> list[str]:
    """Return the names that a type lists."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [name for member in typing.get_args(hint) for name in names_in(member)]
    if typing.get_origin(hint) is Literal:
        return [name for name in typing.get_args(hint) if isinstance(name, str)]
    is_enum = isinstance(hint, type) and issubclass(hint, Enum)
    return [one.value for one in hint if isinstance(one.value, str)] if is_enum else []


def in_words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = [in_words(member) for member in arguments if member is not types.NoneType]
        return " or ".join(words + ["null"] * (types.NoneType in arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(str(one.value) for one in hint)}"
    if origin in (list, Sequence):
        return "a list such as [a, b]" if arguments[0] is str else "a list such as [1, 2]"
    if origin is tuple:
        return "a list such as [1, 2]" if arguments[-1] is ... else f"a list of {len(arguments)} values"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"settings ({hint.__name__})"
    if isinstance(hint, type) and issubclass(hint, Path):
        return "a path"
    words_of = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
    return words_of.get(hint, "a mapping")
