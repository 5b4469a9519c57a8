"""Settings: dataclasses from plain data, YAML files and command-line overrides, and back.

Every configuration of this package is a dataclass. A scalar in a file or an override is text until the setting's own
type reads it: `010` is the class "010" where a class name stands and 10 where a number does. Nothing is resolved or
executed: `${...}`, tags and merge keys have no meaning here. Every value remembers where it was written, so that an
error names the file, the line and the dotted key.

Three class attributes of a settings dataclass are read here: ``recipe`` (see `load`), ``shorthand``, the field that a
scalar stands for where the section is expected (`data.folder=PATH`), and ``moved``, which maps keys that older versions
wrote to where they stand now (`{"fit": "folder.fit"}`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import yaml

ConfigT = TypeVar("ConfigT")

__all__ = [
    "MAX_SEED",
    "Given",
    "Registry",
    "check_bounds",
    "check_finite",
    "check_seeds",
    "did_you_mean",
    "fill_sections",
    "find_file",
    "from_dict",
    "given",
    "load",
    "nested_dataclasses",
    "open_sections",
    "read_yaml",
    "scalar_text",
    "setting_names",
    "shorthands",
    "to_dict",
    "to_yaml",
]

MAX_SEED = 2**32 - 1
"""The largest seed that all generators take: NumPy's global one, which Accelerate seeds too, has 32 bits."""

_MAX_FILE_BYTES = 1_000_000
_MAX_NESTING = 50
_MAX_VALUES = 100_000
_INT64 = 2**63
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_TRUES, _FALSES = frozenset({"true", "True", "TRUE"}), frozenset({"false", "False", "FALSE"})
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INTEGER = re.compile(r"[-+]?[0-9]+")


# --- What the settings dataclasses check


def check_finite(settings: Any, prefix: str = "") -> None:
    """Raises ValueError naming the first field of a dataclass, nested ones too, that is or holds NaN or infinity: no
    setting means that."""
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_finite(value, f"{name}.")
        if field.name == _OPTIONS and isinstance(value, dict):
            for section, options in value.items():
                check_finite(options, f"{prefix}{section}.")
        for item in value if isinstance(value, (list, tuple)) else (value,):
            is_float = isinstance(item, numbers.Real) and not isinstance(item, numbers.Integral)
            if is_float and not math.isfinite(item):
                raise ValueError(f"{name}: expected a finite number, got {item}")


def check_bounds(settings: Any, **bounds: tuple[int, int]) -> None:
    """Raises ValueError for a field (None aside) outside its (lowest, highest), and as `check_finite`.

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
    """Raises ValueError for a seed outside 0..MAX_SEED: the one rule for all seeds among the settings."""
    for name in names:
        if not 0 <= getattr(settings, name) <= MAX_SEED:
            raise ValueError(f"{name}: expected a seed within 0..{MAX_SEED} (32 bits), got {getattr(settings, name)}")


# --- Sections that a registry names


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
        """Adds a class under its ``name``, and returns it: usable as a decorator.

        Raises:
            TypeError: it lacks a method, or ``options`` is neither None nor a dataclass whose fields all have defaults.
            ValueError: ``name`` is no lower-case identifier, is an attribute of the settings beside which the options
                stand, or belongs to another class.
        """
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
        """Forgets an entry. Raises ValueError as `find`."""
        self.find(name, "name")
        del self._entries[name]

    def names(self) -> list[str]:
        """All names, in the order of registration."""
        return list(self._entries)

    def find(self, name: str, argument: str) -> EntryT:
        """The entry of a name. Raises ValueError that starts with ``argument`` and suggests the nearest name."""
        if name not in self._entries:
            raise ValueError(f"{argument}: unknown {self._kind} {name!r}; {did_you_mean(name, self.names())}")
        return self._entries[name]

    def sections(self) -> dict[str, type]:
        """Name -> options dataclass, of the entries that have options."""
        return {name: entry.options for name, entry in self._entries.items() if entry.options is not None}

    def reserve(self, names: Sequence[str]) -> None:
        """Keeps names from being registered. Raises ValueError where one is."""
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
    if shorthand is not None and shorthand not in _declared_hints(options):
        raise TypeError(f"{owner}.options: {options.__name__}.shorthand: {shorthand!r} is no field")


class _Opened(NamedTuple):
    registry: Registry[Any]
    chosen_by: str | None


_OPTIONS = "options"
_CLOSED = _Opened(Registry("section"), None)


def open_sections(registry: Registry[Any], *, chosen_by: str | None = None) -> Callable[[type[ConfigT]], type[ConfigT]]:
    """Adds the options of a registry's entries to a settings dataclass, each as a section beside its fields.

    A decorator above `@dataclass`. The class has a field ``options: dict[str, Any]`` (name -> options), whose keys
    stand in files and on the command line where a field would, and calls `fill_sections` first in its
    ``__post_init__``. Each section is also a keyword of its constructor, and an attribute.

    With ``chosen_by``, the name of a field, one entry is chosen: that field takes the registry's names. Options of the
    others are kept only where they differ from their defaults. A ``shorthand`` field of the options whose default is
    None must be given for the chosen entry and for no other; where it is given, ``chosen_by`` follows from it.
    """

    def add(cls: type[ConfigT]) -> type[ConfigT]:
        registry.reserve([*dir(cls), *(one.name for one in dataclasses.fields(cls))])  # type: ignore[arg-type]
        init = cls.__init__

        @functools.wraps(init)
        def __init__(self: Any, *arguments: Any, **values: Any) -> None:
            if given := {name: values.pop(name) for name in registry.sections() if name in values}:
                values[_OPTIONS] = {**values.get(_OPTIONS, {}), **given}
            init(self, *arguments, **values)

        def __getattr__(self: Any, name: str) -> Any:
            section = registry.sections().get(name)
            if section is None:
                raise AttributeError(f"{cls.__name__} has no setting {name!r}")
            options = vars(self).get(_OPTIONS, {})
            return options[name] if name in options else section()

        cls.__init__ = __init__  # type: ignore[method-assign,assignment]
        cls.__getattr__ = __getattr__  # type: ignore[attr-defined]
        cls._opened = _Opened(registry, chosen_by)  # type: ignore[attr-defined]
        return cls

    return add


def fill_sections(settings: Any) -> None:
    """Checks and completes ``settings.options``, see `open_sections`. A section is given as its dataclass, as plain
    data, or by its shorthand. Raises ValueError that starts with the name of a section or a field."""
    registry, chosen_by = _opened(type(settings))
    given, sections = settings.options, registry.sections()
    for name in given:
        if name not in sections:
            raise ValueError(f"{_OPTIONS}: unknown section {name!r}; {did_you_mean(name, list(sections))}")
    chosen = None if chosen_by is None else getattr(settings, chosen_by)
    if chosen_by is not None and chosen not in registry.names():
        raise ValueError(f"{chosen_by}: expected one of {', '.join(registry.names())}, got {chosen!r}")
    filled = {}
    for name, cls in sections.items():
        default = cls()
        options = _options(cls, given.get(name, default), name)
        shorthand = getattr(cls, "shorthand", None)
        if chosen is not None and shorthand is not None and getattr(default, shorthand) is None:
            value = getattr(options, shorthand)
            if (name == chosen) != (value is not None):
                hint = _without_null(_hints(cls)[shorthand])
                raise ValueError(
                    f"{name}: expected {_in_words(hint)} for {chosen_by} '{name}' and none otherwise, got {value}"
                )
        if chosen in (None, name) or options != default:
            filled[name] = options
    settings.options = filled


def _options(cls: type, value: Any, name: str) -> Any:
    if isinstance(value, cls):
        return value
    node = _canonical_value(cls, _wrap(value, name))
    if isinstance(node.value, dict):
        _refuse_unknown_keys(cls, node.value, root=cls, prefix=f"{name}.")
    return _build(cls, node, f"{name}.")


def shorthands(cls: type) -> dict[str, str]:
    """Section -> dotted path of the field that a scalar in its place stands for."""
    found = {name: getattr(section, "shorthand", None) for name, section in nested_dataclasses(cls).items()}
    return {name: f"{name}.{field}" for name, field in found.items() if field is not None}


def _opened(cls: type) -> _Opened:
    return getattr(cls, "_opened", _CLOSED)


# --- Values, and where they were written


@dataclass(frozen=True)
class _Node:
    """A value: text, a list or dictionary of nodes, or (from plain data) None, a boolean, a number, a Python object."""

    value: Any
    where: str
    line: int | None = None
    plain: bool = False
    """Text without quotes in YAML: the setting's type says what it is."""

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.where}: {message}" + (f" (line {self.line})" if self.line is not None else ""))

    @property
    def is_null(self) -> bool:
        return self.value is None or (self.plain and self.value in _NULLS)

    def shown(self) -> str:
        """The value as an error message shows it."""
        if self.is_null:
            return self.value or "null" if self.value != "" else "nothing"
        return _shortened(repr(_untyped(self, typed=False)))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _wrap(data: Any, where: str, depth: int = 0) -> _Node:
    """Plain Python data as nodes."""
    if depth > _MAX_NESTING:
        raise ValueError(f"{where}: nested more than {_MAX_NESTING} levels deep")
    if isinstance(data, Mapping):
        return _Node({str(key): _wrap(value, where, depth + 1) for key, value in data.items()}, where)
    if isinstance(data, (list, tuple)):
        return _Node([_wrap(value, where, depth + 1) for value in data], where)
    return _Node(data, where)


def _untyped(node: _Node, *, typed: bool = True) -> Any:
    """Plain Python data of a node; unquoted text becomes what YAML 1.2's core schema says, or stays text."""
    if isinstance(node.value, dict):
        return {key: _untyped(value, typed=typed) for key, value in node.value.items()}
    if isinstance(node.value, list):
        return [_untyped(value, typed=typed) for value in node.value]
    if not (node.plain and typed):
        return node.value
    text = node.value
    if text in _NULLS:
        return None
    if text in _TRUES or text in _FALSES:
        return text in _TRUES
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= 30 else float(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    if re.fullmatch(r"0o[0-7]{1,21}|0x[0-9a-fA-F]{1,16}", text):
        return int(text, 0)
    return text


# --- YAML text to nodes


def _compose(text: str, where: str, *, lines: bool) -> tuple[_Node | None, int]:
    """The one document in a YAML text (None where it is empty), and the index where its content ends."""
    try:
        return _Composer(text, where, lines=lines).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}: " if lines and mark is not None else ""
        reason = error.problem or error.context or "not YAML"
        hint = " (YAML indents with spaces)" if r"'\t'" in reason else ""
        raise ValueError(f"{where}: not a readable YAML {_kind(lines)}: {at}{reason}{hint}") from error
    except yaml.reader.ReaderError as error:
        character = f"character #x{error.character:02x} at position {error.position}"
        raise ValueError(f"{where}: not a readable YAML {_kind(lines)}: {character} is not allowed") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # chr() of a bad escape
        if isinstance(error, _Refused):
            raise
        raise ValueError(f"{where}: not a readable YAML {_kind(lines)}: {' '.join(str(error).split())}") from error


def _kind(lines: bool) -> str:
    return "file" if lines else "value"


class _Refused(ValueError):
    """YAML that is well-formed but not read here."""


class _Composer:
    """Builds nodes from PyYAML's events: its own composer would give types to scalars and keep the last of two equal
    keys."""

    def __init__(self, text: str, where: str, *, lines: bool) -> None:
        self._where, self._lines = where, lines
        self._events = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self._anchors: dict[str, tuple[_Node, int]] = {}
        self._count = 0

    def document(self) -> tuple[_Node | None, int]:
        root, end = None, 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise self._refused(event, "holds several documents; one is expected")
                root, end = self._node(next(self._events), 0)
        return root, end

    def _refused(self, event: yaml.Event, message: str) -> _Refused:
        return _Refused(str(_Node(None, self._where, self._line(event)).error(message)))

    def _line(self, event: yaml.Event) -> int | None:
        return event.start_mark.line + 1 if self._lines else None

    def _node(self, event: yaml.Event, depth: int, line: int | None = None) -> tuple[_Node, int]:
        if depth > _MAX_NESTING:
            raise self._refused(event, f"nested more than {_MAX_NESTING} levels deep")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise self._refused(event, f"alias *{event.anchor} stands before the end of its anchor")
            node, size = self._anchors[event.anchor]
            self._grow(event, size)
            return node, event.end_mark.index
        before, line = self._count, line or self._line(event)
        self._grow(event, 1)
        if event.tag is not None:
            raise self._refused(event, f"tags are not read, got {event.tag.replace('tag:yaml.org,2002:', '!!')}")
        value: Any
        end = event.end_mark.index
        if isinstance(event, yaml.SequenceStartEvent):
            value = []
            for item in self._until(yaml.SequenceEndEvent):
                value.append(self._node(item, depth + 1)[0])
            end = self._end
        elif isinstance(event, yaml.MappingStartEvent):
            value = {}
            for key in self._until(yaml.MappingEndEvent):
                name = self._key(key, value)
                value[name] = self._node(next(self._events), depth + 1, self._line(key))[0]
            end = self._end
        else:
            value = event.value
        node = _Node(value, self._where, line, isinstance(event, yaml.ScalarEvent) and event.style is None)
        if event.anchor is not None:
            self._anchors[event.anchor] = node, self._count - before
        return node, end

    def _until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        while not isinstance(event := next(self._events), end):
            yield event
        self._end = event.end_mark.index

    def _key(self, event: yaml.Event, seen: Mapping[str, Any]) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            raise self._refused(event, "expected a name as key")
        if event.value == "<<" and event.style is None:
            raise self._refused(event, "merge keys (<<) are not read; a file names the one below it with `base:`")
        if event.value in seen:
            raise self._refused(event, f"key '{event.value}' stands twice in one mapping")
        return event.value

    def _grow(self, event: yaml.Event, count: int) -> None:
        # Aliases of aliases count each time: a few lines could stand for billions of values.
        self._count += count
        if self._count > _MAX_VALUES:
            raise self._refused(event, f"stands for more than {_MAX_VALUES} values")


def _read_file(path: Path) -> _Node:
    """The mapping in a YAML file; an empty file holds no settings."""
    if not path.is_file():
        raise FileNotFoundError(f"config file not found: {path}")
    try:
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise ValueError(f"{path}: {size} bytes are too many for a YAML file of settings")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not a readable YAML file: expected UTF-8 text, got byte 0x{error.object[error.start]:02x} "
            f"at position {error.start}"
        ) from error
    except OSError as error:
        raise ValueError(f"{path}: not a readable YAML file: {error.strerror}") from error
    root, _ = _compose(text, str(path), lines=True)
    if root is None:
        return _Node({}, str(path))
    if not isinstance(root.value, dict):
        got = "null" if root.is_null else type(root.value).__name__
        raise ValueError(f"{path}: expected a mapping, got {got}")
    return root


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as plain data by YAML 1.2's core schema; for files that no dataclass describes.

    Raises FileNotFoundError, or ValueError for a file that cannot be read (see `load`).
    """
    return typing.cast("dict[str, Any]", _untyped(_read_file(path)))


# --- Nodes to typed values


def from_dict(cls: type[ConfigT], mapping: Mapping[str, Any], *, where: str) -> ConfigT:
    """Builds the dataclass ``cls`` (nested ones too) from plain data; keys left out keep their defaults.

    ``where`` says in error messages where the data came from (a file's name, "command line"). A class method
    ``implied(given)`` of a dataclass gives settings that follow from those given (see `Given`), for keys left out.

    Raises ValueError for an unknown key, a value of the wrong type (a number that is not finite, an integer beyond 64
    bits), a missing field that has no default, and for whatever ``__post_init__`` of the dataclasses refuses;
    TypeError when ``cls`` is not a dataclass or ``mapping`` not a mapping.
    """
    _require_dataclass(cls)
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{where}: expected a mapping of settings, got {type(mapping).__name__}")
    return Given(cls, _tree(cls, mapping, where), where).build()


class Given(Generic[ConfigT]):
    """Settings as they were given, before defaults and types: what files and overrides say, later ones first."""

    def __init__(self, cls: type[ConfigT], tree: dict[str, _Node], where: str, prefix: str = "") -> None:
        self._cls, self._tree, self._where, self._prefix = cls, tree, where, prefix
        _refuse_unknown_keys(cls, tree, root=cls, prefix=prefix)

    def has(self, path: str) -> bool:
        """Whether the setting at a dotted path was given."""
        return self._find(path)[0] is not None

    def read(self, path: str) -> Any:
        """The setting at a dotted path, typed; its default where it was not given. Errors as `from_dict`."""
        node, hint, default = self._find(path)
        return default if node is None else _convert(node, hint, f"{self._prefix}{path}")

    def unset(self, path: str) -> Any:
        """The default in the dataclass of the setting at a dotted path; MISSING where it has none."""
        *sections, last = path.split(".")
        cls: type = self._cls
        for name in sections:
            cls = nested_dataclasses(cls)[name]
        return _default(cls, last)

    def error(self, path: str, message: str) -> ValueError:
        """What to raise about the setting at a dotted path."""
        node = self._find(path)[0] or _Node(None, self._where)
        return node.error(f"{self._prefix}{path}: {message}")

    def followed(self) -> set[str]:
        """Dotted paths that were not given but follow from what was (see `from_dict`)."""
        return _followed(self._cls, self._tree, self._where, self._prefix)

    def build(self, below: Mapping[str, Any] | None = None, *, where: str | None = None) -> ConfigT:
        """The typed settings. ``below``: plain data, from ``where``, for keys that were not given."""
        tree = self._tree
        if below:
            lower = _tree(self._cls, below, where or self._where)
            _refuse_unknown_keys(self._cls, lower, root=self._cls, prefix=self._prefix)
            tree = _merge(self._cls, lower, tree)
        return _build(self._cls, _Node(tree, self._where), self._prefix)

    def _find(self, path: str) -> tuple[_Node | None, Any, Any]:
        cls: type = self._cls
        node: _Node | None = _Node(self._tree, self._where)
        default: Any = dataclasses.MISSING
        *sections, last = path.split(".")
        for name in (*sections, last):
            inside = node.value if node is not None and isinstance(node.value, dict) else {}
            node, hint = inside.get(name), _hints(cls)[name]
            default = getattr(default, name) if default is not dataclasses.MISSING else _default(cls, name)
            cls = nested_dataclasses(cls).get(name, object)
        return node, hint, default


def _default(cls: type, name: str) -> Any:
    if name in (sections := _opened(cls).registry.sections()):
        return sections[name]()
    one = next(one for one in dataclasses.fields(cls) if one.name == name)
    return one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default


def _with_implied(cls: type, tree: dict[str, _Node], where: str, prefix: str) -> dict[str, _Node]:
    """A tree, and below it the settings that follow from it."""
    chosen_by = _opened(cls).chosen_by
    if chosen_by is not None and chosen_by not in tree:
        given = Given(cls, tree, where, prefix)
        # Whoever gives the path of a folder means it.
        named = [name for name, path in shorthands(cls).items() if given.has(path) and given.read(path) is not None]
        if named:
            tree = {chosen_by: _Node(named[0], where), **tree}
    if hasattr(cls, "implied"):
        tree = _merge(cls, _tree(cls, cls.implied(Given(cls, tree, where, prefix)), where), tree)
    return tree


def _followed(cls: type, tree: dict[str, _Node], where: str, prefix: str) -> set[str]:
    full = _with_implied(cls, tree, where, prefix)
    paths = _leaves(full, prefix) - _leaves(tree, prefix)
    tree = full
    for name, inner in nested_dataclasses(cls).items():
        if name in tree and isinstance(tree[name].value, dict):
            paths |= _followed(inner, tree[name].value, where, f"{prefix}{name}.")
    return paths


def _leaves(tree: Mapping[str, _Node], prefix: str) -> set[str]:
    paths: set[str] = set()
    for name, node in tree.items():
        path = f"{prefix}{name}"
        paths |= _leaves(node.value, f"{path}.") if isinstance(node.value, dict) else {path}
    return paths


def _build(cls: type[ConfigT], node: _Node, prefix: str) -> ConfigT:
    if not isinstance(node.value, dict):
        if isinstance(node.value, cls):
            return node.value
        raise node.error(
            f"wrong value at '{prefix.rstrip('.')}': expected settings ({cls.__name__}), got {node.shown()}"
        )
    tree = _with_implied(cls, node.value, node.where, prefix)
    hints = _hints(cls)
    fields = [one for one in dataclasses.fields(cls) if one.init]  # type: ignore[arg-type]
    for one in fields:
        if one.name not in tree and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise ValueError(f"{node.where}: '{prefix}{one.name}' has no default and must be given")
    names = [name for name in (*(one.name for one in fields), *_opened(cls).registry.sections()) if name in tree]
    values = {name: _convert(tree[name], hints[name], f"{prefix}{name}") for name in names}
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        # "steps: expected ...": that field's place is known better than the section's.
        name = re.match(r"\w*", str(error))[0]  # type: ignore[index]
        path = prefix if name in hints or not prefix else f"{prefix[:-1]}: "
        raise tree.get(name, node).error(f"{path}{error}") from error


def _convert(node: _Node, hint: Any, path: str, declared: Any = None) -> Any:
    """A node as a value of the type ``hint``, which may be one of several that a setting is ``declared`` with."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _untyped(node)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(node, arguments, hint, path)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, node, f"{path}.")
    value = node.value
    if _shape(hint) != _shape_of(node):
        found = _NOTHING
    elif _shape(hint) == "mapping":
        found = {key: _convert(item, arguments[1], f"{path}.{key}") for key, item in value.items()}
    elif _shape(hint) == "list":
        fixed = origin is tuple and arguments[-1] is not ...
        inner = arguments if fixed else [arguments[0]] * len(value)
        found = _NOTHING
        if len(inner) == len(value):
            found = [_convert(value[i], inner[i], f"{path}[{i}]") for i in range(len(value))]
            found = tuple(found) if origin is tuple else found
    else:
        found = _scalar(node, hint)
    if found is _NOTHING:
        too_long = hint is int and isinstance(node.value, str) and _INTEGER.fullmatch(node.value)
        size = " of at most 64 bits" if too_long else ""
        raise node.error(f"wrong value at '{path}': expected {_in_words(declared or hint)}{size}, got {node.shown()}")
    return found


_NOTHING = object()


def _scalar(node: _Node, hint: Any) -> Any:
    """The value of a scalar node; _NOTHING where it has another type."""
    value = node.value
    if typing.get_origin(hint) is Literal:
        return next((one for one in typing.get_args(hint) if _same(value, one)), _NOTHING)
    if not isinstance(hint, type):
        raise TypeError(f"settings of type {hint!r} are not supported")
    if hint is types.NoneType:
        return None if node.is_null else _NOTHING
    if issubclass(hint, Enum):
        return next((one for one in hint if value is one or _same(value, one.value)), _NOTHING)
    if issubclass(hint, Path):
        usable = isinstance(value, (str, Path)) and str(value) and "\0" not in str(value)
        return hint(value) if usable else _NOTHING
    if hint is str:
        return value if isinstance(value, str) else _NOTHING
    if hint is bool:
        if isinstance(value, str):
            return value in _TRUES if value in _TRUES or value in _FALSES else _NOTHING
        return value if isinstance(value, bool) else _NOTHING
    if hint in (int, float):
        return _number(value, hint)
    raise TypeError(f"settings of type {hint!r} are not supported")


def _same(value: Any, allowed: Any) -> bool:
    return (type(value) is type(allowed) and value == allowed) or (isinstance(value, str) and value == str(allowed))


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return _NOTHING
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return _NOTHING
    try:
        number = float(value)
    except OverflowError:
        return _NOTHING
    if not math.isfinite(number):
        return _NOTHING
    if kind is float:
        return number
    if abs(number) > _INT64:
        return _NOTHING
    if isinstance(value, str):
        try:
            exact = Decimal(value)
            value = int(exact) if exact == exact.to_integral_value() else 0.5
        except ArithmeticError:  # an exponent beyond what Decimal holds
            return _NOTHING
    return int(value) if value == int(value) and -_INT64 <= value < _INT64 else _NOTHING


def _convert_union(node: _Node, members: tuple[Any, ...], hint: Any, path: str) -> Any:
    if node.is_null and types.NoneType in members:
        return None
    fitting = [member for member in members if _shape(member) in (_shape_of(node), "any")]
    if len(fitting) == 1:
        return _convert(node, fitting[0], path, hint)
    for member in fitting:
        try:
            return _convert(node, member, path)
        except ValueError:
            continue
    raise node.error(f"wrong value at '{path}': expected {_in_words(hint)}, got {node.shown()}")


def _shape(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if hint is Any:
        return "any"
    if origin in (list, tuple, Sequence):
        return "list"
    if origin in (dict, Mapping) or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return "mapping"
    return "null" if hint is types.NoneType else "scalar"


def _shape_of(node: _Node) -> str:
    if isinstance(node.value, dict) or dataclasses.is_dataclass(node.value):
        return "mapping"
    return "list" if isinstance(node.value, list) else "scalar"


def _without_null(hint: Any) -> Any:
    members = [member for member in typing.get_args(hint) if member is not types.NoneType]
    return members[0] if len(members) == 1 else hint


def _in_words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = [_in_words(member) for member in arguments if member is not types.NoneType]
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


# --- Files and overrides


def find_file(name: str, recipes: Path | None = None, folder: Path | None = None) -> Path:
    """A path to a YAML file (relative to ``folder``), or else the file in ``recipes`` of this name without ".yaml".
    Raises FileNotFoundError."""
    path = Path(name) if folder is None else folder / name
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    names = [] if recipes is None else sorted(path.stem for path in recipes.glob("*.yaml"))
    if recipes is None or name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"shipped ones: {', '.join(names)}"
        raise FileNotFoundError(f"config: no file and no shipped configuration is called '{name}'; {hint}")
    return recipes / f"{name}.yaml"


def load(
    cls: type[ConfigT],
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
    recipes: Path | None = None,
) -> ConfigT:
    """Reads the YAML file at ``path`` (None: none), then applies overrides written ``a.b=value``.

    A file, and any section in one, may name what it starts from: `base: NAME` (a recipe, or a path relative to the
    file), or `base: null` for the dataclass's own defaults. Without it a file starts from the recipe that the class
    attribute ``recipe`` of the dataclass names, as settings without a file do, and a section from what lies below it.
    Recipes are the YAML files in the folder ``recipes`` (None: there are none). ``defaults`` (plain data) stand below
    all. Keys are merged one by one; a list replaces a list whole.

    The value of an override is read as YAML where a list or a section is expected, and taken as it stands (without
    its quotes, if it has any) where a scalar is.

    Raises FileNotFoundError for a missing file; ValueError for one that is not UTF-8, not YAML, longer than a megabyte,
    holds several documents, tags, merge keys, a key twice, or is nested too deeply, and for `base:` in a circle;
    otherwise as `from_dict`.
    """
    return given(cls, path, overrides, recipes=recipes).build(defaults)


def given(
    cls: type[ConfigT], path: Path | None, overrides: Sequence[str] = (), *, recipes: Path | None = None
) -> Given[ConfigT]:
    """As `load`, but not typed yet."""
    _require_dataclass(cls)
    where = "command line" if path is None else str(path)
    tree = _recipe(cls, recipes, ()) if path is None else _layers(cls, Path(path), recipes, ())
    for override in overrides:
        tree = _merge(cls, tree, _read_override(cls, override))
    return Given(cls, tree, where)


def _layers(cls: type, path: Path, recipes: Path | None, chain: tuple[Path, ...]) -> dict[str, _Node]:
    """The settings of a file, above those of its base."""
    # Not Path.resolve, which until Python 3.13 ends in a RuntimeError for a link to itself.
    real = Path(os.path.realpath(path))
    if real in chain:
        circle = " -> ".join(one.name for one in (*chain, path))
        raise ValueError(f"{path}: base: the files name each other in a circle: {circle}")
    settings = _canonical(cls, _read_file(path).value)
    chain = (*chain, real)
    below = {} if "base" in settings else _recipe(cls, recipes, chain)
    return _above(cls, settings, below, path.parent, recipes, chain)


def _recipe(cls: type, recipes: Path | None, chain: tuple[Path, ...]) -> dict[str, _Node]:
    """The settings that a dataclass's own recipe holds."""
    name = getattr(cls, "recipe", None)
    return {} if recipes is None or name is None else _layers(cls, find_file(name, recipes), recipes, chain)


def _above(
    cls: type,
    settings: Mapping[str, _Node],
    below: dict[str, _Node],
    folder: Path,
    recipes: Path | None,
    chain: tuple[Path, ...],
) -> dict[str, _Node]:
    """``settings``, a mapping in a file in ``folder``, above ``below`` or what its `base:` names in its place."""
    own = dict(settings)
    if (base := own.pop("base", None)) is not None:
        below = {}
        if not (base.is_null or base.value == "none"):
            if not isinstance(base.value, str):
                raise base.error(f"base: expected a recipe's name or a path, got {base.shown()}")
            try:
                below = _layers(cls, find_file(base.value, recipes, folder), recipes, chain)
            except FileNotFoundError as error:
                raise base.error(f"base: {error}") from error
    sections = nested_dataclasses(cls)
    for key, node in own.items():
        if key in sections and isinstance(node.value, dict):
            lower = below.get(key)
            lower_tree = lower.value if lower is not None and isinstance(lower.value, dict) else {}
            tree = _above(sections[key], node.value, lower_tree, folder, recipes, chain)
            own[key] = dataclasses.replace(node, value=tree)
            # Replaced, not merged: where a base is named the section starts from that alone.
            below = {name: value for name, value in below.items() if name != key}
    return _merge(cls, below, own)


def _merge(cls: type, below: Mapping[str, _Node], above: Mapping[str, _Node]) -> dict[str, _Node]:
    sections, merged = nested_dataclasses(cls), dict(below)
    for key, node in above.items():
        lower = below.get(key)
        if key in sections and node.plain and node.value == "" and node.line is not None:
            continue  # a section all of whose lines are comments
        if key in sections and isinstance(node.value, dict) and lower is not None and isinstance(lower.value, dict):
            node = dataclasses.replace(node, value=_merge(sections[key], lower.value, node.value))
        merged[key] = node
    return merged


def _read_override(cls: type, override: str) -> dict[str, _Node]:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"override {_shortened(repr(override))}: expected the form section.key=value")
    names = _located(cls, names)
    where = f"override {_shortened(repr(override))}"
    node = _override_value(_hint_at(cls, names), text.strip(), where)
    tree = {names[-1]: node}
    for name in reversed(names[:-1]):
        tree = {name: _Node(tree, where)}
    _refuse_unknown_keys(cls, tree, root=cls)
    return tree


def _located(cls: type, names: Sequence[str]) -> list[str]:
    """Translates a path: keys that moved, and a section's name that stands for its shorthand."""
    found: list[str] = []
    for name in names:
        for part in getattr(cls, "moved", {}).get(name, name).split("."):
            found.append(part)
            cls = nested_dataclasses(cls).get(part, object)
    shorthand = getattr(cls, "shorthand", None)
    return [*found, shorthand] if shorthand is not None else found


def _tree(cls: type, mapping: Mapping[str, Any], where: str) -> dict[str, _Node]:
    """Plain data as a tree of nodes."""
    return _canonical(cls, _wrap(mapping, where).value)


def _canonical(cls: type, tree: Mapping[str, _Node], prefix: str = "") -> dict[str, _Node]:
    """Translates a tree: keys of older versions, and scalars in the place of a section."""
    moved, sections = getattr(cls, "moved", {}), nested_dataclasses(cls)
    found: dict[str, _Node] = {}
    for key, node in tree.items():
        name, _, inner = moved.get(key, key).partition(".")
        if inner:
            node = dataclasses.replace(node, value={inner: node}, plain=False)
        if name in sections:
            node = _canonical_value(sections[name], node, f"{prefix}{name}.")
        if name in found:
            before, value = found[name].value, node.value
            both = isinstance(before, dict) and isinstance(value, dict)
            if twice := (before.keys() & value.keys() if both else {name}):
                path = f"{prefix}{name}.{min(twice)}" if both else f"{prefix}{name}"
                raise node.error(f"'{path}' is given twice, once by a key of older versions")
            node = dataclasses.replace(node, value={**before, **value})
        found[name] = node
    return found


def _canonical_value(cls: type, node: _Node, prefix: str = "") -> _Node:
    """The value of a section."""
    shorthand = getattr(cls, "shorthand", None)
    nothing = node.plain and node.value == "" and node.line is not None  # all of its lines are comments
    if shorthand is not None and not (nothing or isinstance(node.value, (dict, cls))):
        node = dataclasses.replace(node, value={shorthand: node}, plain=False)
    if isinstance(node.value, dict):
        node = dataclasses.replace(node, value=_canonical(cls, node.value, prefix))
    return node


def _hint_at(cls: type, names: Sequence[str]) -> Any:
    """The type of the setting at a path; None where there is none."""
    for name in names[:-1]:
        cls = nested_dataclasses(cls).get(name, object)
    return _hints(cls).get(names[-1]) if dataclasses.is_dataclass(cls) else None


def _override_value(hint: Any, text: str, where: str) -> _Node:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if not quoted and all(_shape(member) in ("scalar", "null") for member in members):
        return _Node(text, where, plain=True)
    node, end = _compose(text, where, lines=False)
    if text[end:].strip():
        raise ValueError(f"{where}: expected one value, got {text[end:].strip()!r} behind it")
    return _Node("", where, plain=True) if node is None else node


def _refuse_unknown_keys(cls: type, tree: Mapping[str, _Node], *, root: type, prefix: str = "") -> None:
    nested = nested_dataclasses(cls)
    names = setting_names(cls)
    for key, node in tree.items():
        if key not in names:
            raise node.error(f"unknown key '{prefix}{key}'; {_suggestion(key, names, prefix, root)}")
        if key in nested and isinstance(node.value, dict):
            _refuse_unknown_keys(nested[key], node.value, root=root, prefix=f"{prefix}{key}.")


def _suggestion(key: str, names: list[str], prefix: str, root: type) -> str:
    if key == "base":
        return "a file names what it starts from with `base:`, the command line with --config"
    by_leaf = {path.rsplit(".", 1)[-1]: path for path in reversed(_all_paths(root, ""))}
    if key in by_leaf:  # the right name in the wrong section
        return f"did you mean '{by_leaf[key]}'?"
    here = {name: f"{prefix}{name}" for name in names}
    for candidates, likeness in ((here, 0.6), (by_leaf, 0.6), (here, 0.4)):
        close = difflib.get_close_matches(key, list(candidates), n=1, cutoff=likeness)
        if close:
            return f"did you mean '{candidates[close[0]]}'?"
    return f"known here: {', '.join(names)}"


def _all_paths(cls: type, prefix: str) -> list[str]:
    nested = nested_dataclasses(cls)
    paths = [f"{prefix}{name}" for name in setting_names(cls)]
    for name, inner in nested.items():
        paths += _all_paths(inner, f"{prefix}{name}.")
    return paths


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of an error message about an unknown name: the nearest one, or the first of all that there are."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(known[:20])}"


def _require_dataclass(cls: Any) -> None:
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"cls: expected a dataclass, got {cls!r}")


@functools.cache
def _declared_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _hints(cls: type) -> dict[str, Any]:
    """Setting -> type, of a registry's sections too."""
    hints = _declared_hints(cls)
    if not hasattr(cls, "_opened"):
        return hints
    registry, chosen_by = _opened(cls)
    hints = {**hints, **registry.sections()}
    if chosen_by is not None:
        hints[chosen_by] = Literal[tuple(registry.names())]  # type: ignore[valid-type]
    return hints


def setting_names(cls: type) -> list[str]:
    """The names of all settings of a dataclass, a registry's sections (see `open_sections`) last."""
    names = [one.name for one in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if hasattr(cls, "_opened"):
        names = [name for name in names if name != _OPTIONS] + list(_opened(cls).registry.sections())
    return names


@functools.cache
def _declared_dataclasses(cls: type) -> dict[str, type]:
    nested: dict[str, type] = {}
    for name, hint in _declared_hints(cls).items() if dataclasses.is_dataclass(cls) else ():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        for candidate in typing.get_args(hint) if union else (hint,):
            if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
                nested[name] = candidate
    return nested


def nested_dataclasses(cls: type) -> dict[str, type]:
    """Setting -> dataclass, for fields declared as ``SomeDataclass`` or ``SomeDataclass | None``, and for the sections
    that a registry names (see `open_sections`)."""
    return {**_declared_dataclasses(cls), **_opened(cls).registry.sections()}


# --- And back


def to_dict(instance: Any) -> dict[str, Any]:
    """The dataclass instance as dictionaries, lists, strings, numbers, booleans and None, as JSON and YAML
    hold."""
    if isinstance(instance, type) or not dataclasses.is_dataclass(instance):
        raise TypeError(f"instance: expected an instance of a dataclass, got {instance!r}")
    plain = {one.name: _plain(getattr(instance, one.name)) for one in dataclasses.fields(instance)}
    options = plain.pop(_OPTIONS) if hasattr(type(instance), "_opened") else {}
    return {**plain, **options}


def to_yaml(settings: Mapping[str, Any]) -> str:
    """Plain data (see `to_dict`) as a YAML file that `load` reads back equal, whatever its strings are; it starts from
    no other file."""
    return _dump({"base": None, **settings}, default_flow_style=False)


def scalar_text(value: Any) -> str:
    """One value, or a list of them, as it stands behind a key in YAML."""
    return _dump(value, default_flow_style=True).removesuffix("...\n").strip()


class _Dumper(yaml.SafeDumper):
    """Quotes strings with control characters and Unicode's line breaks, which PyYAML would else read back as blanks."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)


def _dump(content: Any, *, default_flow_style: bool) -> str:
    # Without a width PyYAML folds long strings into lines.
    return yaml.dump(
        content,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=math.inf,
        default_flow_style=default_flow_style,
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return value
