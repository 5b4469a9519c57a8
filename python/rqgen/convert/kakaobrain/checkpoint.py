"""Files of the published layout: a pickle of state dicts, and a config.yaml beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from ..published import unpickle

CHECKPOINT_NAME = "model.pt"
CONFIG_NAME = "config.yaml"


class Checkpoint(NamedTuple):
    """A published checkpoint as read from disk."""

    path: Path
    config_path: Path
    config: dict[str, Any]  # the whole config.yaml
    arch: dict[str, Any]  # its `arch`, type in lower case, for a prior completed with `vocab_size`
    state_dict: dict[str, Tensor]


def read_checkpoint(path: str | os.PathLike[str], *, ema: bool = False) -> Checkpoint:
    """Reads the checkpoint at `path` (or model.pt in that folder) and the config.yaml beside it.

    Raises: see `rqgen.convert.load_kakaobrain`.
    """
    checkpoint_path = Path(path)
    if checkpoint_path.is_dir():
        checkpoint_path = checkpoint_path / CHECKPOINT_NAME
    config_path = checkpoint_path.parent / CONFIG_NAME
    for file in (checkpoint_path, config_path):
        if not file.is_file():
            raise FileNotFoundError(f"path: no file {file}")
    config = _read_config(config_path)
    arch = config.get("arch")
    if not isinstance(arch, dict) or not isinstance(arch.get("type"), str):
        raise ValueError(f"{config_path}: expected a section `arch` with a `type`")
    arch = {**arch, "type": arch["type"].lower()}
    # The published training code copies the number of codes over from the data's section.
    vocab_size = (config.get("dataset") or {}).get("vocab_size")
    if arch["type"] == "rq-transformer" and vocab_size is not None:
        arch.setdefault("vocab_size", vocab_size)
    state_dict = _select_state_dict(unpickle(checkpoint_path), checkpoint_path, ema=ema)
    return Checkpoint(checkpoint_path, config_path, config, arch, state_dict)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(config).__name__}")
    return config


def _select_state_dict(content: Any, path: Path, *, ema: bool) -> dict[str, Tensor]:
    key = "state_dict_ema" if ema else "state_dict"
    if not isinstance(content, Mapping) or key not in content:
        found = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: expected a dictionary with the key {key!r}, got {found}")
    state_dict = content[key]
    if state_dict is None:
        raise ValueError(f"{path}: {key!r} is None: this checkpoint was trained without it")
    if not isinstance(state_dict, Mapping) or not all(isinstance(t, Tensor) for t in state_dict.values()):
        raise ValueError(f"{path}: {key!r}: expected tensors by name, got {type(state_dict).__name__}")
    return dict(state_dict)
