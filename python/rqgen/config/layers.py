"""Files of settings, what they start from, and overrides on the command line."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .fields import hints_of, nested_dataclasses, require_dataclass
from .hints import ConfigT, shape
from .nodes import Node, shortened
from .registry import did_you_mean
from .trees import canonical, merge, refuse_unknown_keys
from .typed import Given
from .yaml_text import compose, read_file


def find_file(name: str, recipes: Path | None = None, folder: Path | None = None) -> Path:
    """A path to a YAML file (relative to ``folder``), or else the file in ``recipes`` of this name without ".yaml".
    Raise FileNotFoundError."""
    path = Path(name) if folder is None else folder / name
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    names = [] if recipes is None else sorted(path.stem for path in recipes.glob("*.yaml"))
    if recipes is None or name not in names:
        hint = did_you_mean(name, names)
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
    """Read the YAML file at ``path`` (None: none), then apply overrides written ``a.b=value``.

    A file, and any section in one, may name what it starts from: `base: NAME` (a recipe, or a path relative to the
    file), or `base: null` for the dataclass's own defaults. Without it a file starts from the recipe that the class
    attribute ``recipe`` of the dataclass names, as settings without a file do, and a section from what lies below it.
    Recipes are the YAML files in the folder ``recipes`` (None: there are none). ``defaults`` (plain data) stand below
    all. Keys are merged one by one; a list replaces a list whole.

    The value of an override is read as YAML where a list or a section is expected, and taken as it stands (without
    its quotes, if it has any) where a scalar is.

    Raise FileNotFoundError for a missing file; ValueError for one that is not UTF-8, not YAML, longer than a megabyte,
    holds several documents, tags, merge keys, a key twice, or is nested too deeply, and for `base:` in a circle;
    otherwise as `from_dict`.
    """
    return given(cls, path, overrides, recipes=recipes).build(defaults)


def given(
    cls: type[ConfigT], path: Path | None, overrides: Sequence[str] = (), *, recipes: Path | None = None
) -> Given[ConfigT]:
    """As `load`, but not typed yet."""
    require_dataclass(cls)
    where = "command line" if path is None else str(path)
    tree = _recipe(cls, recipes, ()) if path is None else _layers(cls, Path(path), recipes, ())
    said: dict[str, Node] = {}
    for override in overrides:
        said = merge(cls, said, _read_override(cls, override), chooses=False)
    tree = merge(cls, tree, said)
    return Given(cls, tree, where, overrides=[_place(override) for override in overrides])


def _layers(cls: type, path: Path, recipes: Path | None, chain: tuple[Path, ...]) -> dict[str, Node]:
    """The settings of a file, above those of its base."""
    # Not Path.resolve, which until Python 3.13 ends in a RuntimeError for a link to itself.
    real = Path(os.path.realpath(path))
    if real in chain:
        circle = " -> ".join(one.name for one in (*chain, path))
        raise ValueError(f"{path}: base: the files name each other in a circle: {circle}")
    settings = canonical(cls, read_file(path).value)
    chain = (*chain, real)
    below = {} if "base" in settings else _recipe(cls, recipes, chain)
    return _above(cls, settings, below, path.parent, recipes, chain)


def _recipe(cls: type, recipes: Path | None, chain: tuple[Path, ...]) -> dict[str, Node]:
    """The settings that a dataclass's own recipe holds."""
    name = getattr(cls, "recipe", None)
    return {} if recipes is None or name is None else _layers(cls, find_file(name, recipes), recipes, chain)


def _above(
    cls: type,
    settings: Mapping[str, Node],
    below: dict[str, Node],
    folder: Path,
    recipes: Path | None,
    chain: tuple[Path, ...],
) -> dict[str, Node]:
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
    return merge(cls, below, own)


def _place(override: str) -> str:
    """Return the name of an override in error messages."""
    return f"override {shortened(repr(override))}"


def _read_override(cls: type, override: str) -> dict[str, Node]:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"{_place(override)}: expected the form section.key=value")
    names = _located(cls, names)
    where = _place(override)
    node = _override_value(_hint_at(cls, names), text.strip(), where)
    tree = {names[-1]: node}
    for name in reversed(names[:-1]):
        tree = {name: Node(tree, where)}
    refuse_unknown_keys(cls, tree, root=cls)
    return tree


def _located(cls: type, names: Sequence[str]) -> list[str]:
    """Translate a path: keys that moved, and a section's name that stands for its shorthand."""
    found: list[str] = []
    for name in names:
        for part in getattr(cls, "moved", {}).get(name, name).split("."):
            found.append(part)
            cls = nested_dataclasses(cls).get(part, object)
    shorthand = getattr(cls, "shorthand", None)
    return [*found, shorthand] if shorthand is not None else found


def _hint_at(cls: type, names: Sequence[str]) -> Any:
    """The type of the setting at a path; None where there is none."""
    for name in names[:-1]:
        cls = nested_dataclasses(cls).get(name, object)
    return hints_of(cls).get(names[-1]) if dataclasses.is_dataclass(cls) else None


def _override_value(hint: Any, text: str, where: str) -> Node:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if not quoted and all(shape(member) in ("scalar", "null") for member in members):
        return Node(text, where, plain=True)
    node, end = compose(text, where, lines=False)
    if text[end:].strip():
        raise ValueError(f"{where}: expected one value, got {text[end:].strip()!r} behind it")
    return Node("", where, plain=True) if node is None else node
