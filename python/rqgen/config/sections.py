"""Settings with a section for each entry of a registry."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from .fields import hints_of
from .hints import ConfigT, in_words, without_null
from .nodes import wrap
from .registry import OPTIONS, Opened, Registry, did_you_mean, one_of, opened
from .trees import canonical_value, refuse_unknown_keys
from .typed import SettingError, WrongValueError, build


def open_sections(registry: Registry[Any], *, chosen_by: str | None = None) -> Callable[[type[ConfigT]], type[ConfigT]]:
    """Add the options of a registry's entries to a settings dataclass, each as a section next to its fields.

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
                values[OPTIONS] = {**values.get(OPTIONS, {}), **given}
            init(self, *arguments, **values)

        def __getattr__(self: Any, name: str) -> Any:
            section = registry.sections().get(name)
            if section is None:
                raise AttributeError(f"{cls.__name__} has no setting {name!r}")
            options = vars(self).get(OPTIONS, {})
            return options[name] if name in options else section()

        cls.__init__ = __init__  # type: ignore[method-assign]
        cls.__getattr__ = __getattr__  # type: ignore[attr-defined]
        cls._opened = Opened(registry, chosen_by)  # type: ignore[attr-defined]
        return cls

    return add


def fill_sections(settings: Any) -> None:
    """Check and complete ``settings.options``, see `open_sections`. A section is given as its dataclass, as plain
    data, or by its shorthand.

    Raises:
        TypeError: ``settings.options`` is no mapping.
        ValueError: a section or a value is wrong; starts with the dotted name of a section or a field.
    """
    registry, chosen_by = opened(type(settings))
    given, sections = settings.options, registry.sections()
    if not isinstance(given, Mapping):
        raise TypeError(f"{OPTIONS}: expected a mapping of sections, got {type(given).__name__}")
    for name in given:
        if name not in sections:
            raise ValueError(f"{OPTIONS}: unknown section {name!r}; {did_you_mean(name, list(sections))}")
    chosen = None if chosen_by is None else getattr(settings, chosen_by)
    if chosen_by is not None and chosen not in registry.names():
        raise ValueError(f"{chosen_by}: {one_of(registry.names(), chosen)}")
    filled = {}
    for name, cls in sections.items():
        default = cls()
        options = _options(cls, given.get(name, default), name)
        shorthand = getattr(cls, "shorthand", None)
        if chosen is not None and shorthand is not None and getattr(default, shorthand) is None:
            value = getattr(options, shorthand)
            if (name == chosen) != (value is not None):
                hint = without_null(hints_of(cls)[shorthand])
                hint_at_choice = "" if name == chosen else f"; {chosen_by} is '{chosen}'"
                raise ValueError(
                    f"{name}: expected {in_words(hint)} for {chosen_by} '{name}' and none otherwise, got {value}"
                    f"{hint_at_choice}"
                )
        if chosen in (None, name) or options != default:
            filled[name] = options
    settings.options = filled


def _options(cls: type, value: Any, name: str) -> Any:
    if isinstance(value, cls):
        return value
    node = canonical_value(cls, wrap(value, name))
    if isinstance(node.value, dict):
        refuse_unknown_keys(cls, node.value, root=cls, prefix=f"{name}.")
    try:
        return build(cls, node, f"{name}.")
    except WrongValueError as error:
        raise ValueError(f"{error.path}: {error.reason}") from None
    except SettingError as error:
        raise ValueError(error.message) from error.__cause__
