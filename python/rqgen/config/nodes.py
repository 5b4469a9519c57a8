"""Values of settings, each with the place where it was written."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_NESTING = 50
NULLS = frozenset({"", "~", "null", "Null", "NULL"})
TRUES, FALSES = frozenset({"true", "True", "TRUE"}), frozenset({"false", "False", "FALSE"})
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
INTEGER = re.compile(r"[-+]?[0-9]+")


@dataclass(frozen=True)
class Node:
    """A value: text, a list or dictionary of nodes, or (from plain data) None, a boolean, a number, a Python object."""

    value: Any
    where: str
    line: int | None = None
    plain: bool = False
    """Text without quotes in YAML: the setting's type says what it is."""
    exact: bool = False
    """A value of a field in Python: its type must be the declared one, and no text stands for a number."""
    below: Node | None = None
    """The value in whose place this one was given."""

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.where}: {message}" + (f" (line {self.line})" if self.line is not None else ""))

    @property
    def is_null(self) -> bool:
        return self.value is None or (self.plain and self.value in NULLS)

    def shown(self) -> str:
        """The value as an error message shows it."""
        if self.exact:
            return shortened(str(self.value) if isinstance(self.value, numbers.Real) else repr(untyped(self)))
        if self.is_null:
            return self.value or "null" if self.value != "" else "nothing"
        return shortened(repr(untyped(self, typed=False)))


def shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def wrap(data: Any, where: str, depth: int = 0, *, exact: bool = False) -> Node:
    """Plain Python data as nodes."""
    if depth > MAX_NESTING:
        raise ValueError(f"{where}: nested more than {MAX_NESTING} levels deep")
    if isinstance(data, Mapping):
        entries = {str(key): wrap(value, where, depth + 1, exact=exact) for key, value in data.items()}
        return Node(entries, where, exact=exact)
    if isinstance(data, (list, tuple)):
        return Node([wrap(value, where, depth + 1, exact=exact) for value in data], where, exact=exact)
    return Node(data, where, exact=exact)


def untyped(node: Node, *, typed: bool = True) -> Any:
    """Plain Python data of a node; unquoted text becomes what YAML 1.2's core schema says, or stays text."""
    if isinstance(node.value, dict):
        return {key: untyped(value, typed=typed) for key, value in node.value.items()}
    if isinstance(node.value, list):
        return [untyped(value, typed=typed) for value in node.value]
    if not (node.plain and typed):
        return node.value
    text = node.value
    if text in NULLS:
        return None
    if text in TRUES or text in FALSES:
        return text in TRUES
    if INTEGER.fullmatch(text):
        return int(text) if len(text) <= 30 else float(text)
    if NUMBER.fullmatch(text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    if re.fullmatch(r"0o[0-7]{1,21}|0x[0-9a-fA-F]{1,16}", text):
        return int(text, 0)
    return text


def leaves(tree: Mapping[str, Node], prefix: str) -> set[str]:
    paths: set[str] = set()
    for name, node in tree.items():
        path = f"{prefix}{name}"
        paths |= leaves(node.value, f"{path}.") if isinstance(node.value, dict) else {path}
    return paths


def node_at(tree: Mapping[str, Node], path: str) -> Node | None:
    """Return the node at a dotted path, or the one above it that holds no tree; None where there is none."""
    node = None
    for name in path.split("."):
        inside = tree if node is None else node.value
        if not isinstance(inside, Mapping):
            return node
        if (node := inside.get(name)) is None:
            return None
    return node


def without(tree: Mapping[str, Node], path: str) -> dict[str, Node]:
    """Return a tree with what lies below the node at a dotted path in its place, and without sections that are then
    empty."""
    name, _, rest = path.partition(".")
    left = {key: node for key, node in tree.items() if key != name}
    if rest:
        if inside := without(tree[name].value, rest):
            left[name] = dataclasses.replace(tree[name], value=inside)
    elif (below := tree[name].below) is not None:
        left[name] = below
    return {key: left[key] for key in tree if key in left}
