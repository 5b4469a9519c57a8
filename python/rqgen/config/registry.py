"""Entries of one kind by name, and the sections of settings that they open."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from .hints import declared_hints


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of an error message about an unknown name: the nearest one, or the first of all that there are."""
    close = _nearest(name, known)
    return f"there are: {', '.join(known[:20])}" if close is None else f"did you mean '{close}'?"


def one_of(known: Iterable[object], got: object) -> str:
    """The end of an error message about a value that is none of a few: all of them, the value, and the nearest one."""
    listed = list(known)
    return f"expected one of {', '.join(map(str, listed))}, got {got!r}{suggestion(got, listed)}"


def suggestion(got: object, known: Iterable[object]) -> str:
    """The end of an error message that lists ``known``: the name among them that is nearest to ``got``, if any is."""
    close = _nearest(got, [one for one in known if isinstance(one, str)]) if isinstance(got, str) else None
    return "" if close in (None, got) else f"; did you mean '{close}'?"


def _nearest(name: str, known: Sequence[str]) -> str | None:
    by_lower = {one.lower(): one for one in reversed(known)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


class Registered(Protocol):
    """A class that a `Registry` takes: it has a name, and a dataclass of options or None."""

    name: ClassVar[str]
    options: ClassVar[type | None]


EntryT = TypeVar("EntryT", bound=Registered)


class Registry(Generic[EntryT]):
    """Entries of one kind, such as data sources, by name. ``kind`` names one entry in error messages."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, EntryT] = {}
        self._reserved: frozenset[str] = frozenset()

    def register(self, entry: type[EntryT]) -> type[EntryT]:
        """Add a class under its ``name``, and return it: usable as a decorator.

        Raises:
            TypeError: it is no class or lacks a method, or ``options`` is neither None nor a dataclass whose fields all
                have defaults.
            ValueError: ``name`` is no lower-case identifier, is an attribute of the settings next to which the options
                stand, or belongs to another class.
        """
        if not isinstance(entry, type):
            raise TypeError(f"entry: expected a class, got {entry!r}")
        name, options = getattr(entry, "name", None), getattr(entry, "options", None)
        if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name)):
            raise ValueError(f"{entry.__name__}.name: expected a lower-case identifier such as 'mine', got {name!r}")
        if name in self._reserved:
            raise ValueError(f"{entry.__name__}.name: {name!r} is a setting that every {self._kind} has")
        there = type(self._entries[name]) if name in self._entries else entry
        if (there.__module__, there.__qualname__) != (entry.__module__, entry.__qualname__):
            raise ValueError(
                f"{entry.__name__}.name: the {self._kind} {name!r} is {there.__module__}.{there.__qualname__} already"
            )
        if options is not None:
            _require_options(entry.__name__, options)
        self._entries[name] = entry()
        return entry

    def remove(self, name: str) -> None:
        """Forget an entry. Raise ValueError as `find`."""
        self.find(name, "name")
        del self._entries[name]

    def names(self) -> list[str]:
        """All names, in the order of registration."""
        return list(self._entries)

    def find(self, name: str, argument: str) -> EntryT:
        """The entry of a name. Raise ValueError that starts with ``argument`` and suggests the nearest name."""
        if name not in self._entries:
            raise ValueError(f"{argument}: unknown {self._kind} {name!r}; {did_you_mean(name, self.names())}")
        return self._entries[name]

    def sections(self) -> dict[str, type]:
        """Name -> options dataclass, of the entries that have options."""
        return {name: entry.options for name, entry in self._entries.items() if entry.options is not None}

    def reserve(self, names: Sequence[str]) -> None:
        """Keep names from being registered. Raise ValueError where one is."""
        for name in names:
            if name in self._entries:
                raise ValueError(f"{name}: a {self._kind} has this name")
        self._reserved |= frozenset(names)


def _require_options(owner: str, options: Any) -> None:
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        raise TypeError(f"{owner}.options: expected a dataclass or None, got {options!r}")
    for one in dataclasses.fields(options):
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise TypeError(f"{owner}.options: {options.__name__}.{one.name} has no default")
    shorthand = getattr(options, "shorthand", None)
    if shorthand is not None and shorthand not in declared_hints(options):
        raise TypeError(f"{owner}.options: {options.__name__}.shorthand: {shorthand!r} is no field")


class Opened(NamedTuple):
    registry: Registry[Any]
    chosen_by: str | None


OPTIONS = "options"
_CLOSED = Opened(Registry("section"), None)


def opened(cls: type) -> Opened:
    return getattr(cls, "_opened", _CLOSED)
