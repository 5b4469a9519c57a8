"""Trees of nodes: keys of older versions, unknown keys, one tree above another."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from .fields import nested_dataclasses, setting_names, shorthands
from .nodes import Node, node_at, wrap
from .registry import opened


def tree_of(cls: type, mapping: Mapping[str, Any], where: str) -> dict[str, Node]:
    """Plain data as a tree of nodes."""
    return canonical(cls, wrap(mapping, where).value)


def canonical(cls: type, tree: Mapping[str, Node], prefix: str = "") -> dict[str, Node]:
    """Translate a tree: keys of older versions, and scalars in the place of a section."""
    moved, sections = getattr(cls, "moved", {}), nested_dataclasses(cls)
    found: dict[str, Node] = {}
    for key, node in tree.items():
        name, _, inner = moved.get(key, key).partition(".")
        if inner:
            node = dataclasses.replace(node, value={inner: node}, plain=False)
        if name in sections:
            node = canonical_value(sections[name], node, f"{prefix}{name}.")
        if name in found:
            before, value = found[name].value, node.value
            both = isinstance(before, dict) and isinstance(value, dict)
            if twice := (before.keys() & value.keys() if both else {name}):
                path = f"{prefix}{name}.{min(twice)}" if both else f"{prefix}{name}"
                raise node.error(f"'{path}' is given twice, once by a key of older versions")
            node = dataclasses.replace(node, value={**before, **value})
        found[name] = node
    return found


def canonical_value(cls: type, node: Node, prefix: str = "") -> Node:
    """The value of a section."""
    shorthand = getattr(cls, "shorthand", None)
    nothing = node.plain and node.value == "" and node.line is not None  # all of its lines are comments
    if shorthand is not None and not (nothing or isinstance(node.value, (dict, cls))):
        node = dataclasses.replace(node, value={shorthand: node}, plain=False)
    if isinstance(node.value, dict):
        node = dataclasses.replace(node, value=canonical(cls, node.value, prefix))
    return node


def merge(cls: type, below: Mapping[str, Node], above: Mapping[str, Node], *, chooses: bool = True) -> dict[str, Node]:
    """Put one tree above another. With ``chooses`` the path of a section in ``above`` chooses this section, unless
    ``above`` chooses another."""
    sections, merged = nested_dataclasses(cls), dict(below)
    for key, node in above.items():
        lower = below.get(key)
        if key in sections and node.plain and node.value == "" and node.line is not None:
            continue  # a section all of whose lines are comments
        if key in sections and isinstance(node.value, dict) and lower is not None and isinstance(lower.value, dict):
            node = dataclasses.replace(node, value=merge(sections[key], lower.value, node.value, chooses=chooses))
        elif lower is not None:
            node = dataclasses.replace(node, below=lower)
        merged[key] = node
    chosen_by = opened(cls).chosen_by
    if chooses and chosen_by is not None and chosen_by in below and chosen_by not in above:
        for name, path in shorthands(cls).items():
            if (given := node_at(above, path)) is not None and not given.is_null:
                merged[chosen_by] = dataclasses.replace(given, value=name, below=below[chosen_by])
    return merged


def refuse_unknown_keys(cls: type, tree: Mapping[str, Node], *, root: type, prefix: str = "") -> None:
    nested = nested_dataclasses(cls)
    names = setting_names(cls)
    for key, node in tree.items():
        if key not in names:
            raise node.error(f"unknown key '{prefix}{key}'; {_suggestion(key, names, prefix, root)}")
        if key in nested and isinstance(node.value, dict):
            refuse_unknown_keys(nested[key], node.value, root=root, prefix=f"{prefix}{key}.")


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
