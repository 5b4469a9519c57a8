"""Settings from trees of nodes: types, defaults, settings that follow from others."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

from .fields import default_of, hints_of, nested_dataclasses, require_dataclass, shorthands
from .hints import ConfigT, in_words, names_in, shape
from .nodes import Node, leaves, node_at, untyped, without
from .registry import opened, suggestion
from .scalars import NOTHING, read_scalar, shape_of, too_large
from .trees import merge, refuse_unknown_keys, tree_of


def from_dict(cls: type[ConfigT], mapping: Mapping[str, Any], *, where: str) -> ConfigT:
    """Build the dataclass ``cls`` (nested ones too) from plain data; keys left out keep their defaults.

    ``where`` says in error messages where the data came from (a file's name, "command line"). A class method
    ``implied(given)`` of a dataclass gives settings that follow from those given (see `Given`), for keys left out.

    Raise ValueError for an unknown key, a value of the wrong type (a number that is not finite, an integer beyond 64
    bits), a missing field that has no default, and for all that ``__post_init__`` of the dataclasses refuses;
    TypeError when ``cls`` is not a dataclass or ``mapping`` not a mapping.
    """
    require_dataclass(cls)
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{where}: expected a mapping of settings, got {type(mapping).__name__}")
    return Given(cls, tree_of(cls, mapping, where), where).build()


class Given(Generic[ConfigT]):
    """Settings as they were given, before defaults and types: what files and overrides say, later ones first."""

    def __init__(
        self, cls: type[ConfigT], tree: dict[str, Node], where: str, prefix: str = "", overrides: Sequence[str] = ()
    ) -> None:
        """``overrides``: the places, as nodes name them, of what the command line says."""
        self._cls, self._tree, self._where, self._prefix, self._overrides = cls, tree, where, prefix, overrides
        refuse_unknown_keys(cls, tree, root=cls, prefix=prefix)

    def has(self, path: str) -> bool:
        """Return True if the setting at a dotted path was given."""
        return self._find(path)[0] is not None

    def read(self, path: str) -> Any:
        """The setting at a dotted path, typed; its default where it was not given. Errors as `from_dict`."""
        _, hint, default = self._find(path)

        def attempt(tree: dict[str, Node]) -> Any:
            node = node_at(tree, path)
            return default if node is None else convert(node, hint, f"{self._prefix}{path}")

        return self._attempted(attempt, self._tree)

    def unset(self, path: str) -> Any:
        """The default in the dataclass of the setting at a dotted path; MISSING where it has none."""
        *sections, last = path.split(".")
        cls: type = self._cls
        for name in sections:
            cls = nested_dataclasses(cls)[name]
        return default_of(cls, last)

    def error(self, path: str, message: str) -> ValueError:
        """Return the error to raise about the setting at a dotted path."""
        return SettingError(node_at(self._tree, path), f"{self._prefix}{path}: {message}", self._where)

    def followed(self) -> set[str]:
        """Dotted paths that were not given but follow from what was (see `from_dict`)."""
        return _followed(self._cls, self._tree, self._where, self._prefix)

    def build(self, below: Mapping[str, Any] | None = None, *, where: str | None = None) -> ConfigT:
        """The typed settings. ``below``: plain data, from ``where``, for keys that were not given."""
        tree = self._tree
        if below:
            lower = tree_of(self._cls, below, where or self._where)
            refuse_unknown_keys(self._cls, lower, root=self._cls, prefix=self._prefix)
            tree = merge(self._cls, lower, tree)
        return self._attempted(lambda some: build(self._cls, Node(some, self._where), self._prefix), tree)

    def _attempted(self, attempt: Callable[[dict[str, Node]], Any], tree: dict[str, Node]) -> Any:
        """Return `attempt(tree)`. An error names the place of the setting without which it would not be there."""
        try:
            return attempt(tree)
        except SettingError as error:
            culprit = self._culprit(attempt, tree, error)
            raise SettingError(culprit or error.node, error.message, self._where) from error.__cause__

    def _culprit(
        self, attempt: Callable[[dict[str, Node]], Any], tree: dict[str, Node], error: SettingError
    ) -> Node | None:
        """Find the setting to blame: of overrides, else of the file, else of what it starts from.

        Of several that are each at fault, the one that the message names comes first, then the last one given.
        """
        if self._prefix:
            return None  # the settings around these know more

        def order(node: Node) -> tuple[int, bool, int]:
            is_override = node.where in self._overrides
            layer = 2 if is_override else int(node.where == self._where)
            return layer, node is error.node, self._overrides.index(node.where) if is_override else 0

        given = [(path, node) for path in leaves(tree, "") if (node := node_at(tree, path)) is not None]
        for path, node in sorted(given, key=lambda one: order(one[1]), reverse=True):
            try:
                attempt(without(tree, path))
            except SettingError as other:
                if other.key == error.key:
                    continue
            except WrongValueError:
                pass  # the next error, of another setting
            except (ValueError, TypeError):
                continue  # this one must be given
            return node
        return None

    def _find(self, path: str) -> tuple[Node | None, Any, Any]:
        cls: type = self._cls
        node: Node | None = Node(self._tree, self._where)
        default: Any = dataclasses.MISSING
        *sections, last = path.split(".")
        for name in (*sections, last):
            inside = node.value if node is not None and isinstance(node.value, dict) else {}
            node, hint = inside.get(name), hints_of(cls)[name]
            # Below a section that is None by default: what its own class says.
            is_inside = default is not dataclasses.MISSING and default is not None
            default = getattr(default, name) if is_inside else default_of(cls, name)
            cls = nested_dataclasses(cls).get(name, object)
        return node, hint, default


def _with_implied(cls: type, tree: dict[str, Node], where: str, prefix: str) -> dict[str, Node]:
    """Put the settings that follow from a tree below it."""
    chosen_by = opened(cls).chosen_by
    if chosen_by is not None and chosen_by not in tree:
        given: Given[Any] = Given(cls, tree, where, prefix)
        # Whoever gives the path of a folder means it.
        named = [name for name, path in shorthands(cls).items() if given.has(path) and given.read(path) is not None]
        if named:
            tree = {chosen_by: Node(named[0], where), **tree}
    if hasattr(cls, "implied"):
        tree = merge(cls, tree_of(cls, cls.implied(Given(cls, tree, where, prefix)), where), tree)
    return tree


def _followed(cls: type, tree: dict[str, Node], where: str, prefix: str) -> set[str]:
    full = _with_implied(cls, tree, where, prefix)
    paths = leaves(full, prefix) - leaves(tree, prefix)
    tree = full
    for name, inner in nested_dataclasses(cls).items():
        if name in tree and isinstance(tree[name].value, dict):
            paths |= _followed(inner, tree[name].value, where, f"{prefix}{name}.")
    return paths


class SettingError(ValueError):
    """A setting that is refused: ``message`` starts with its dotted name. ``node`` is None where it was not given."""

    def __init__(self, node: Node | None, message: str, where: str) -> None:
        self.node, self.message = node, message
        super().__init__(str((node or Node(None, where)).error(message)))

    @property
    def key(self) -> str:
        """The dotted name."""
        return self.message.partition(":")[0]


class WrongValueError(ValueError):
    """A value that is not of the type ``hint``, at a dotted ``path``."""

    def __init__(self, node: Node, hint: Any, path: str, expected: str) -> None:
        self.node, self.hint, self.path = node, hint, path
        self.reason = f"expected {expected}, got {node.shown()}{suggestion(node.value, names_in(hint))}"
        super().__init__(str(node.error(f"wrong value at '{path}': {self.reason}")))


def build(cls: type[ConfigT], node: Node, prefix: str) -> ConfigT:
    """The node of a section as its dataclass; ``prefix`` leads to it."""
    if not isinstance(node.value, dict) or node.exact:
        if isinstance(node.value, cls):
            return node.value
        raise WrongValueError(node, cls, prefix.rstrip("."), in_words(cls))
    tree = _with_implied(cls, node.value, node.where, prefix)
    hints = hints_of(cls)
    fields = [one for one in dataclasses.fields(cls) if one.init]  # type: ignore[arg-type]
    for one in fields:
        if one.name not in tree and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise ValueError(f"{node.where}: '{prefix}{one.name}' has no default and must be given")
    names = [name for name in (*(one.name for one in fields), *opened(cls).registry.sections()) if name in tree]
    values = {name: convert(tree[name], hints[name], f"{prefix}{name}") for name in names}
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        # "steps: expected ...": that field's place is known better than the section's.
        name = re.split(r"[^\w.]", str(error))[0]
        if prefix and name.partition(".")[0] not in hints:
            raise SettingError(None, f"{prefix[:-1]}: {error}", node.where) from error
        raise SettingError(node_at(tree, name), f"{prefix}{error}", node.where) from error


def convert(node: Node, hint: Any, path: str, declared: Any = None) -> Any:
    """A node as a value of the type ``hint``, which may be one of several that a setting is ``declared`` with."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return untyped(node)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(node, arguments, hint, path)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, node, f"{path}.")
    value = node.value
    if shape(hint) != shape_of(node):
        found = NOTHING
    elif shape(hint) == "mapping":
        found = {key: convert(item, arguments[1], f"{path}.{key}") for key, item in value.items()}
    elif shape(hint) == "list":
        fixed = origin is tuple and arguments[-1] is not ...
        inner = arguments if fixed else [arguments[0]] * len(value)
        found = NOTHING
        if len(inner) == len(value):
            found = [convert(value[i], inner[i], f"{path}[{i}]") for i in range(len(value))]
            found = tuple(found) if origin is tuple else found
    else:
        found = read_scalar(node, hint)
    if found is NOTHING:
        raise WrongValueError(node, hint, path, in_words(declared or hint) + too_large(node, hint))
    return found


def _convert_union(node: Node, members: tuple[Any, ...], hint: Any, path: str) -> Any:
    if node.is_null and types.NoneType in members:
        return None
    fitting = [member for member in members if shape(member) in (shape_of(node), "any")]
    if len(fitting) == 1:
        return convert(node, fitting[0], path, hint)
    for member in fitting:
        try:
            return convert(node, member, path)
        except ValueError:
            continue
    raise WrongValueError(node, hint, path, in_words(hint))
