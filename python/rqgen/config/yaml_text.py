"""YAML text to nodes and back. Nothing is resolved or executed."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from .nodes import MAX_NESTING, Node, untyped

_MAX_FILE_BYTES = 1_000_000
_MAX_VALUES = 100_000


def compose(text: str, where: str, *, lines: bool) -> tuple[Node | None, int]:
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
    """Build nodes from PyYAML's events: its own composer would give types to scalars and keep the last of two equal
    keys."""

    def __init__(self, text: str, where: str, *, lines: bool) -> None:
        self._where, self._lines = where, lines
        self._events = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._count = 0

    def document(self) -> tuple[Node | None, int]:
        root, end = None, 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise self._refused(event, "holds several documents; one is expected")
                root, end = self._node(next(self._events), 0)
        return root, end

    def _refused(self, event: yaml.Event, message: str) -> _Refused:
        return _Refused(str(Node(None, self._where, self._line(event)).error(message)))

    def _line(self, event: yaml.Event) -> int | None:
        return event.start_mark.line + 1 if self._lines else None

    def _node(self, event: yaml.Event, depth: int, line: int | None = None) -> tuple[Node, int]:
        if depth > MAX_NESTING:
            raise self._refused(event, f"nested more than {MAX_NESTING} levels deep")
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
        node = Node(value, self._where, line, isinstance(event, yaml.ScalarEvent) and event.style is None)
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


def read_file(path: Path) -> Node:
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
    root, _ = compose(text, str(path), lines=True)
    if root is None:
        return Node({}, str(path))
    if not isinstance(root.value, dict):
        got = "null" if root.is_null else type(root.value).__name__
        raise ValueError(f"{path}: expected a mapping, got {got}")
    return root


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as plain data by YAML 1.2's core schema; for files that no dataclass describes.

    Raise FileNotFoundError, or ValueError for a file that cannot be read (see `load`).
    """
    return typing.cast("dict[str, Any]", untyped(read_file(path)))


def to_yaml(settings: Mapping[str, Any]) -> str:
    """Plain data (see `to_dict`) as a YAML file that `load` reads back equal, with any strings in it; it starts from
    no other file."""
    return _dump({"base": None, **settings}, default_flow_style=False)


def scalar_text(value: Any) -> str:
    """One value, or a list of them, as it stands behind a key in YAML."""
    return _dump(value, default_flow_style=True).removesuffix("...\n").strip()


# A class of our own, so that PyYAML's stays as it is. Strings with control characters and Unicode's line breaks are
# quoted: PyYAML would read them back as blanks.
_Dumper: Any = type("_Dumper", (yaml.SafeDumper,), {})

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
