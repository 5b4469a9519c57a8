"""Typed settings: dataclasses to and from plain dictionaries, YAML files and command-line overrides.

Every configuration of this package is a dataclass; OmegaConf's structured configs do the type checking.
This module adds what a reader of an error message needs: the full dotted path of a key that does not
exist, the file it came from, and the nearest name that does exist.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

ConfigT = TypeVar("ConfigT")

__all__ = ["check_finite", "from_dict", "load", "read_yaml", "to_dict"]


def from_dict(cls: type[ConfigT], mapping: Mapping[str, Any], *, where: str) -> ConfigT:
    """Builds the dataclass ``cls`` (nested ones too) from plain data; keys left out keep their defaults.

    ``where`` says in error messages where the data came from (a file's name, "command line").
    Raises ValueError for an unknown key, a value of the wrong type, a missing field that has no default, a number that
    is NaN or infinite, and for whatever ``__post_init__`` of the dataclasses refuses; TypeError when ``cls`` is not a
    dataclass or ``mapping`` not a mapping.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"cls: expected a dataclass, got {cls!r}")
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{where}: expected a mapping of settings, got {type(mapping).__name__}")
    _refuse_unknown_keys(cls, mapping, root=cls, where=where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(dict(mapping)))
        built = typing.cast(ConfigT, OmegaConf.to_object(merged))
        check_finite(built)
        return built
    except MissingMandatoryValue as error:
        raise ValueError(f"{where}: '{error.full_key}' has no default and must be given") from error
    except OmegaConfBaseException as error:
        reason = (error.msg or str(error)).splitlines()[0]
        at = f" at '{error.full_key}'" if error.full_key else ""
        raise ValueError(f"{where}: wrong value{at}: {reason}") from error
    except (ValueError, TypeError) as error:
        # OmegaConf appends lines about itself to what a dataclass said.
        reason = str(error).split("\n    full_key:")[0]
        raise ValueError(f"{where}: {reason}") from error


def check_finite(settings: Any, prefix: str = "") -> None:
    """Raises ValueError naming the first field of a dataclass, nested ones too, that is or holds NaN or infinity: no
    setting means that."""
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_finite(value, f"{name}.")
        for item in value if isinstance(value, (list, tuple)) else (value,):
            is_float = isinstance(item, numbers.Real) and not isinstance(item, numbers.Integral)
            if is_float and not math.isfinite(item):
                raise ValueError(f"{name}: expected a finite number, got {item}")


def to_dict(instance: Any) -> dict[str, Any]:
    """The dataclass instance as dictionaries, lists, strings, numbers, booleans and None, as JSON and YAML
    hold."""
    if isinstance(instance, type) or not dataclasses.is_dataclass(instance):
        raise TypeError(f"instance: expected an instance of a dataclass, got {instance!r}")
    return {field.name: _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def load(
    cls: type[ConfigT],
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Reads the YAML file at ``path`` (None: only defaults), then applies overrides written ``a.b=value``.

    ``defaults`` (plain data) stand before the dataclass's own and below the file: both are merged key by key.
    The value of an override is YAML (``null``, ``1e-4``, ``[1, 2]``, ``true``). A list replaces a list whole.
    Raises FileNotFoundError for a missing file, otherwise as `from_dict`.
    """
    settings: dict[str, Any] = dict(defaults or {})
    if path is not None:
        content = read_yaml(Path(path))
        # Checked on its own first, so that an error names the file and not the command line.
        _refuse_unknown_keys(cls, content, root=cls, where=str(path))
        settings = _merge(settings, content)
    where = str(path) if path is not None else "command line"
    for override in overrides:
        settings = _apply_override(cls, settings, override)
    if path is not None and overrides:
        where = f"{path} with overrides"
    return from_dict(cls, settings, where=where)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as plain data. Raises FileNotFoundError, or ValueError for anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"config file not found: {path}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of settings at the top, got {type(content).__name__}")
    return typing.cast("dict[str, Any]", content)


def _apply_override(cls: type, settings: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"override {override!r}: expected the form section.key=value")
    try:
        change = OmegaConf.from_dotlist([override])
        plain_change = typing.cast("dict[str, Any]", OmegaConf.to_container(change))
        _refuse_unknown_keys(cls, plain_change, root=cls, where=f"override {override!r}")
        return _merge(settings, plain_change)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"override {override!r}: {str(error).splitlines()[0]}") from error


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = OmegaConf.merge(OmegaConf.create(dict(below)), OmegaConf.create(dict(above)))
    return typing.cast("dict[str, Any]", OmegaConf.to_container(merged))


def _refuse_unknown_keys(cls: type, mapping: Mapping[str, Any], *, root: type, where: str, prefix: str = "") -> None:
    nested = _nested_dataclasses(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key, value in mapping.items():
        path = f"{prefix}{key}"
        if key not in names:
            raise ValueError(f"{where}: unknown key '{path}'; {_suggestion(str(key), names, prefix, root)}")
        if key in nested and isinstance(value, Mapping):
            _refuse_unknown_keys(nested[key], value, root=root, where=where, prefix=f"{path}.")


def _suggestion(key: str, names: list[str], prefix: str, root: type) -> str:
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
    nested = _nested_dataclasses(cls)
    paths = [f"{prefix}{field.name}" for field in dataclasses.fields(cls)]
    for name, inner in nested.items():
        paths += _all_paths(inner, f"{prefix}{name}.")
    return paths


def _nested_dataclasses(cls: type) -> dict[str, type]:
    """Field name -> dataclass, for fields declared as ``SomeDataclass`` or ``SomeDataclass | None``."""
    nested: dict[str, type] = {}
    for name, hint in typing.get_type_hints(cls).items():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        for candidate in typing.get_args(hint) if union else (hint,):
            if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
                nested[name] = candidate
    return nested


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
