"""From files and the command line to the settings of each command."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rqgen.config import Given, find_file, from_dict, given, to_dict
from rqgen.data import DataConfig
from rqgen.models import Tokenizer

logger = logging.getLogger(__name__)

RECIPES = Path(str(resources.files("rqgen.cli"))) / "configs"
# How training images are varied is each stage's own; what they are, and which train, is the tokenizer's.
_VARIATIONS = ("horizontal_flip", "shift")
# And where these differ, one stage may train on what the other holds out.
_SPLIT = ("classes", "held_out_fraction", "split_seed")


def find_config(name: str | None) -> Path | None:
    """The file that ``--config`` names: a path, or the name of a shipped recipe. FileNotFoundError."""
    return None if name is None else find_file(name, RECIPES)


def load_encoding(vae: Tokenizer, folder: Path, config: Path | None, overrides: Sequence[str] = ()) -> DataConfig:
    """The images to encode: those that the tokenizer learnt from, where none are named (then a line is logged), and
    what is not said of them as in `data_of_tokenizer`."""
    settings = given(DataConfig, config, overrides, recipes=RECIPES)
    data = settings.build(data_of_tokenizer(vae, settings, "", folder), where=str(folder))
    if not _asked(settings, ""):
        images = f"source={data.source}" + (f" folder={data.folder}" if data.folder is not None else "")
        logger.info("no images were named: taking those that the tokenizer learnt from, %s", images)
    return data


def data_of_tokenizer(vae: Tokenizer, settings: Given[Any], prefix: str, folder: Path) -> dict[str, Any]:
    """What a tokenizer says of the images where nothing else does: their size and channels, and, if they are those
    that it learnt from, all but how they are varied.

    ``prefix`` leads to the data among ``settings``. ValueError where nothing says which images.
    """
    height, _ = vae.config.image_shape
    size = {"resolution": height, "channels": vae.config.image_channels}
    known = _remembered(vae, folder)
    asked = _asked(settings, prefix)
    if known is None and not asked:
        raise ValueError(
            f"{prefix}source: the tokenizer in {folder} does not say which images it learnt from; "
            f"give {prefix}folder=PATH, {prefix}source=digits or {prefix}source=photos"
        )
    if known is None or (asked and not _are_same(settings, prefix, asked, known)):
        return size
    kept = {name: value for name, value in to_dict(known).items() if name not in _VARIATIONS}
    return {**kept, **size}


def warn_of_other_split(data: DataConfig, vae: Tokenizer, folder: Path) -> None:
    """Logs where a stage reads the images that its tokenizer learnt from, but holds out others."""
    known = _remembered(vae, folder)
    if known is None or _place(data.source, data.folder) != _place(known.source, known.folder):
        return
    for name in _SPLIT:
        ours, theirs = getattr(data, name), getattr(known, name)
        if ours != theirs:
            logger.warning(
                "data.%s: %s, but the tokenizer's was %s: what one stage holds out, the other may train on",
                *(name, ours, theirs),
            )


def _asked(settings: Given[Any], prefix: str) -> set[str]:
    names = ("source", "folder")
    return {name for name in names if settings.has(prefix + name) and settings.read(prefix + name) is not None}


def _are_same(settings: Given[Any], prefix: str, asked: set[str], known: DataConfig) -> bool:
    folder = settings.read(f"{prefix}folder") if "folder" in asked else known.folder
    source = settings.read(f"{prefix}source") if "source" in asked else "folder" if asked else known.source
    return _place(source, folder) == _place(known.source, known.folder)


def _place(source: Any, folder: Any) -> tuple[Any, Path | None]:
    return source, None if folder is None else Path(os.path.realpath(folder))


def _remembered(vae: Tokenizer, folder: Path) -> DataConfig | None:
    return None if vae.data is None else from_dict(DataConfig, vae.data, where=f"{folder}/config.json: data")
