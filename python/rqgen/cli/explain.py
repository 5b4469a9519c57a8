"""`rqgen config`: print every setting of a command with its help, its default and its value, as a YAML file."""

from __future__ import annotations

import dataclasses
import functools
import re
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rqgen.config import Given, given, load, nested_dataclasses, scalar_text, setting_names, suggestion
from rqgen.data import DataConfig
from rqgen.evaluation import EvaluationConfig
from rqgen.systems import DEFAULT, find_system

from .demo import demo_of
from .field_help import field_help, first_paragraph
from .runs import load_run
from .scaling import ScalingConfig
from .settings import RECIPES, find_config

_WIDTH = 100
# Name of a command without "train" -> its name.
COMMANDS = {
    "tokenizer": "train tokenizer",
    "prior": "train prior",
    "encode": "encode",
    "evaluate": "evaluate",
    "demo": "demo",
    "scaling": "scaling",
}


def explain(words: Sequence[str], *, system: str = DEFAULT, config: str | None = None) -> str:
    """Return the settings of a command as a YAML file that its ``--config`` takes. ``words``: the command (`COMMANDS`;
    by default train tokenizer), then overrides.

    A default is the value without a file and overrides. A setting that follows from others is marked; one that a
    missing tokenizer decides is commented out. ValueError for another command; otherwise as `load`."""
    named = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    command = " ".join(named) or "tokenizer"
    stage = next((stage for stage, whole in COMMANDS.items() if command in (stage, whole)), None)
    if stage is None or words[: len(named)] != named:
        raise ValueError(
            f"config: expected one of {', '.join(COMMANDS.values())}, then KEY=VALUE; got {' '.join(words)}"
            f"{suggestion(' '.join(named), COMMANDS.values())}"
        )
    chosen, path = find_system(system), find_config(config)
    classes = {
        "tokenizer": chosen.tokenizer_run,
        "prior": chosen.prior_run,
        "encode": DataConfig,
        "evaluate": EvaluationConfig,
        "scaling": ScalingConfig,
    }
    cls: type[Any] = demo_of(system) if stage == "demo" else classes[stage]
    default: Any = load(cls, None, recipes=RECIPES)
    settings = given(cls, path, overrides, recipes=RECIPES)
    value = plain = settings.build()
    if stage == "prior" and settings.read("codes") is None and settings.read("tokenizer").is_dir():
        value = load_run(cls, config, overrides)
    elsewhere = {"prior": "data.", "encode": "", "evaluate": "data."}.get(stage)
    keys = {key for key in _leaves(value) if not settings.has(key)}
    unknown = {key for key in keys if elsewhere is not None and key.startswith(elsewhere)} if value is plain else set()
    following = settings.followed() | {key for key in keys if _derived(settings, value, key)}
    lines = [
        f"# Settings of `rqgen {COMMANDS[stage]}`" + (f" --system {system}" if system != DEFAULT else "") + ".",
        "# In brackets: the default.",
        "# A setting that follows others keeps following them if its line is left out.",
        *(["# Commented out: settings that the model decides."] if unknown else []),
        "base: null",
        *_section(value, default, unknown=unknown, following=following),
    ]
    return "\n".join(lines) + "\n"


def _derived(settings: Given[Any], value: Any, key: str) -> bool:
    """Return True if the dataclass filled in a setting that was not given."""
    return functools.reduce(getattr, key.split("."), value) is not None and settings.unset(key) is None


def _section(
    value: Any, default: Any, prefix: str = "", *, unknown: Collection[str], following: Collection[str]
) -> list[str]:
    cls: type = type(value)
    nested, help_of = nested_dataclasses(cls), field_help(cls)
    indent = "  " * prefix.count(".")
    lines = []
    for name in setting_names(cls):
        key, now, usual = f"{prefix}{name}", getattr(value, name), getattr(default, name, None)
        if name in nested and now is not None:
            inside = _section(now, usual, f"{key}.", unknown=unknown, following=following)
            unset = all(line.lstrip().startswith("#") or not line.strip() for line in inside)
            lines += ["", *_comment(help_of.get(name) or first_paragraph(nested[name]), indent)]
            lines += [f"{indent}{'# ' if unset else ''}{name}:", *inside]
            continue
        if name in nested:  # an unused section: its settings are comments
            unused = nested[name]()
            inside = _section(unused, unused, f"{key}.", unknown=(), following=())
            said = help_of.get(name) or first_paragraph(nested[name])
            lines += ["", *_comment(f"{said} Its settings stand below. [{_text(usual)}]", indent)]
            lines += [f"{indent}{name}: null", *(f"{indent}# {line.removeprefix(indent)}".rstrip() for line in inside)]
            continue
        mark = "; follows" if key in following else ""
        lines += _comment(f"{help_of.get(name, '')} [{_text(usual)}{mark}]".strip(), indent)
        lines.append(f"{indent}{'# ' if key in unknown else ''}{name}: {_text(now)}")
    return lines


def _comment(text: str, indent: str) -> list[str]:
    text = re.sub(r"\bNone\b", "null", text).replace("``", "`")
    text = text[:1].upper() + text[1:] if re.match(r"[a-z]{2,}\b", text) else text
    lines = textwrap.wrap(text, _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {line}" for line in lines]


def _text(value: Any) -> str:
    return scalar_text(str(value) if isinstance(value, Path) else value)


def _leaves(settings: Any, prefix: str = "") -> set[str]:
    """Return dotted paths of all settings, those of unused sections included."""
    found: set[str] = set()
    for name in setting_names(type(settings)):
        value = getattr(settings, name)
        found |= _leaves(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else {prefix + name}
    return found
