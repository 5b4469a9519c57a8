"""Files of the published layout: a pickle of state dicts, and a config.yaml next to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rqgen.config import read_yaml
from rqgen.models.pickles import check_state_dict, unpickle
from rqgen.reading import BINARY, JSON, TEXT, describe_file, require_file, shorten, unreadable

CHECKPOINT_NAME = "model.pt"
CONFIG_NAME = "config.yaml"
# The sections that are read; all others belong to the published trainer.
_SECTIONS = ("arch", "vqvae")


class Checkpoint(NamedTuple):
    """A published checkpoint as read from disk."""

    path: Path
    config_path: Path
    config: dict[str, Any]  # the whole config.yaml
    arch: dict[str, Any]  # its `arch`, type in lower case, for a prior completed with `vocab_size`
    state_dict: dict[str, Tensor]

    @property
    def both(self) -> str:
        """The two files, for errors that either may have caused."""
        return f"{self.path} with {self.config_path.name}"


def read_checkpoint(path: str | os.PathLike[str], *, ema: bool = False, name: str = "path") -> Checkpoint:
    """Read the checkpoint at `path` (or model.pt in that folder) and the config.yaml next to it. `name` is the argument
    that names it: the error for a missing file opens with it.

    Raises: see `rqgen.convert.load_kakaobrain`.
    """
    checkpoint_path = Path(path)
    if checkpoint_path.is_dir():
        checkpoint_path = checkpoint_path / CHECKPOINT_NAME
    config_path = checkpoint_path.parent / CONFIG_NAME
    require_file(checkpoint_path, name)
    content = unpickle(checkpoint_path)
    require_file(config_path, name)
    config = _read_config(config_path)
    for name in _SECTIONS:
        _refuse_interpolations(config.get(name), name, config_path)
    arch = config.get("arch")
    if not isinstance(arch, dict) or not isinstance(arch.get("type"), str):
        found = arch.get("type") if isinstance(arch, dict) else arch
        raise ValueError(f"{config_path}: expected a section `arch` with a `type`, got {shorten(found)}")
    arch = {**arch, "type": arch["type"].lower()}
    # The published training code copies the number of codes over from the data's section.
    if arch["type"] == "rq-transformer" and (vocab_size := _vocab_size(config, config_path)) is not None:
        arch.setdefault("vocab_size", vocab_size)
    state_dict = _select_state_dict(content, checkpoint_path, ema=ema)
    return Checkpoint(checkpoint_path, config_path, config, arch, state_dict)


def section(config: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    """Return a section of a published config.yaml; empty where there is none. Raise ValueError if it is not a
    mapping."""
    found = config.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{path}: {name}: expected a mapping, got {shorten(found)}")
    return found or {}


def _vocab_size(config: Mapping[str, Any], path: Path) -> int | list[int] | None:
    value = section(config, "dataset", path).get("vocab_size")
    _refuse_interpolations(value, "dataset.vocab_size", path)
    if value is not None and not all(type(size) is int for size in (value if isinstance(value, list) else [value])):
        raise ValueError(f"{path}: dataset.vocab_size: expected an integer, or one per depth, got {shorten(value)}")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except ValueError as error:
        found = describe_file(path)
        if found in (TEXT, JSON, BINARY) or found.startswith("a file of "):
            raise
        raise unreadable(path, "YAML file") from error


def _refuse_interpolations(value: Any, name: str, path: Path) -> None:
    """Raise ValueError for text such as ${dataset.vocab_size}, which OmegaConf would replace by another value."""
    inner: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        inner = [(f"{name}.{key}", one) for key, one in value.items()]
    elif isinstance(value, list):
        inner = [(f"{name}[{index}]", one) for index, one in enumerate(value)]
    elif isinstance(value, str) and "${" in value:
        raise ValueError(
            f"{path}: {name}: expected a value, got the interpolation {shorten(value)}; write its value in its place"
        )
    for inner_name, one in inner:
        _refuse_interpolations(one, inner_name, path)


def _select_state_dict(content: Any, path: Path, *, ema: bool) -> dict[str, Tensor]:
    key = "state_dict_ema" if ema else "state_dict"
    if not isinstance(content, Mapping) or key not in content:
        named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
        found = sorted(content)[:8] if named else type(content).__name__
        raise ValueError(f"{path}: expected a dictionary with the key {key!r}, got {found}")
    state_dict = content[key]
    if state_dict is None:
        raise ValueError(f"{path}: {key!r} is None: this checkpoint was trained without it")
    return check_state_dict(state_dict, path, key)
