"""`rqgen list`: list systems, data sources, metrics and recipes, with options and help."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rqgen.config import Registry, did_you_mean, scalar_text
from rqgen.data.sources import SOURCES
from rqgen.evaluation.metrics import METRICS
from rqgen.systems import all_systems

from .field_help import field_help, first_paragraph
from .settings import RECIPES

_WIDTH = 100


def listing(kind: str | None) -> list[str]:
    """Return one of the lists of `KINDS` (None: all), as lines. ValueError for another kind."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"list: unknown kind '{kind}'; {did_you_mean(kind, list(KINDS))}")
    lines: list[str] = []
    for name, found in KINDS.items():
        if kind in (None, name):
            lines += [*([""] if lines else []), f"{name}:", *found()]
    return lines


def _systems() -> Iterator[str]:
    for system in all_systems():
        yield f"  {system.name}"
        for model in (system.tokenizer, system.prior):
            yield from _wrapped(f"{model.__name__}: {first_paragraph(model)}", 4)


def _registered(registry: Registry[Any], prefix: str) -> Iterator[str]:
    for name in registry.names():
        entry = registry.find(name, "name")
        yield from _entry(name, first_paragraph(type(entry)))
        if entry.options is not None:
            help_of, default = field_help(entry.options), entry.options()
            for one in dataclasses.fields(entry.options):
                value = getattr(default, one.name)
                shown = scalar_text(str(value) if isinstance(value, Path) else value)
                yield f"    {prefix}{name}.{one.name} [{shown}]"
                yield from _wrapped(help_of.get(one.name, ""), 6)


def _recipes() -> Iterator[str]:
    for path in sorted(RECIPES.glob("*.yaml")):
        comment = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
        yield from _entry(path.stem, " ".join(comment))


def _entry(name: str, text: str) -> Iterator[str]:
    yield f"  {name}"
    yield from _wrapped(text, 4)


def _wrapped(text: str, indent: int) -> list[str]:
    text = text.replace("``", "`").replace("None", "null")
    lines = textwrap.wrap(text, _WIDTH - indent, break_on_hyphens=False, break_long_words=False)
    return [" " * indent + line for line in lines]


KINDS: dict[str, Callable[[], Iterator[str]]] = {
    "systems": _systems,
    "sources": lambda: _registered(SOURCES, "data."),
    "metrics": lambda: _registered(METRICS, ""),
    "recipes": _recipes,
}
