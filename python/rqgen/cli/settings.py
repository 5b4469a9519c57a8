"""Settings of each command, from files and the command line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Any

from rqgen.config import Given, find_file, from_dict, given, shorthands, to_dict
from rqgen.data import DataConfig
from rqgen.data.settings import place_of, saved_settings
from rqgen.data.sources import SOURCES
from rqgen.models import PretrainedModel, Tokenizer

from .models import Loaded, Models

logger = logging.getLogger(__name__)

RECIPES = Path(str(resources.files("rqgen.cli"))) / "configs"
# Each stage has its own variations of training images; which images there are, and which train, the tokenizer says.
_VARIATIONS = ("horizontal_flip", "shift")
# If these differ, one stage may train on images that the other holds out.
_SPLIT = ("classes", "held_out_fraction", "split_seed", "folder.split")


def find_config(name: str | None) -> Path | None:
    """Return the file that ``--config`` names by its path, or by the name of a recipe. FileNotFoundError."""
    return None if name is None else find_file(name, RECIPES)


def load_encoding(tokenizer: Loaded[Tokenizer], config: Path | None, overrides: Sequence[str] = ()) -> DataConfig:
    """Return the images to encode: those of the tokenizer's training if none are named (then a line is logged);
    settings that are not given are as in `data_of_tokenizer`."""
    settings = given(DataConfig, config, overrides, recipes=RECIPES)
    data = settings.build(data_of_tokenizer(tokenizer, settings, ""), where=str(tokenizer.folder))
    warn_of_idle_options(data, "")
    if not _asked(settings, ""):
        source, place = data.place
        images = f"source={source}" + (f" {source}={place}" if place is not None else "")
        logger.info("no images were named: encoding those of the tokenizer's training, %s", images)
    return data


def data_of_tokenizer(tokenizer: Loaded[Tokenizer], settings: Given[Any], prefix: str) -> dict[str, Any]:
    """Return settings of the images that were not given: the size and channels that a tokenizer takes and, if the
    images are those of its training, all settings but their variations.

    ``prefix`` leads to the data among ``settings``. ValueError if nothing names the images.
    """
    known = _remembered(tokenizer)
    asked = _asked(settings, prefix)
    if known is None and not asked:
        raise ValueError(
            f"{prefix}source: the tokenizer in {tokenizer.folder} does not name the images of its training; "
            f"{_ways_to_name_images(prefix)}"
        )
    return _known_data(known, asked, _size(tokenizer.model))


def _size(vae: Tokenizer) -> dict[str, Any]:
    height, _ = vae.image_shape
    return {"resolution": height, "channels": vae.image_channels}


def _known_data(known: DataConfig | None, asked: dict[str, Any], size: dict[str, Any]) -> dict[str, Any]:
    if known is None or (asked and not _are_same(asked, known)):
        return size
    kept = {name: value for name, value in to_dict(known).items() if name not in _VARIATIONS}
    return {**kept, **size}


def data_of_models(models: Models, settings: Given[Any], prefix: str) -> tuple[dict[str, Any], str | None]:
    """Return settings of the images to evaluate models by, as `data_of_tokenizer` gives them; those that the prior was
    trained on come before the tokenizer's. The second result says why nothing names the images; None if something
    does."""
    known, where = None, Path()
    for loaded in (models.prior, models.tokenizer):
        if loaded is not None and known is None:
            known, where = _remembered(loaded), loaded.folder
    size: dict[str, Any] = {}
    if models.tokenizer is not None:
        size = _size(models.tokenizer.model)
    elif known is not None:
        size = {"resolution": known.resolution, "channels": known.channels}
    asked = _asked(settings, prefix)
    if known is None and not asked:
        return size, f"{where} does not name the images of its training; {_ways_to_name_images(prefix)}"
    return _known_data(known, asked, size), None


def warn_of_other_split(data: DataConfig, trained: Loaded[PretrainedModel], *, role: str = "tokenizer") -> None:
    """Log where the images are those that a model was trained on, but others are held out."""
    known = _remembered(trained)
    if known is None or data.place != known.place:
        return
    for name in _SPLIT:
        ours, theirs = attrgetter(name)(data), attrgetter(name)(known)
        if ours != theirs:
            logger.warning(
                "data.%s: %s, but the %s's was %s: what one stage holds out, the other may train on",
                *(name, ours, role, theirs),
            )


def warn_of_idle_options(data: DataConfig, prefix: str) -> None:
    """Log options of sources other than the chosen one: they have no effect."""
    for name, value in data.idle_options().items():
        logger.warning("%s%s: %s has no effect: %ssource is '%s'", *(prefix, name, value, prefix, data.source))


def _ways_to_name_images(prefix: str) -> str:
    short = shorthands(DataConfig)
    others = [f"{prefix}source={name}" for name in SOURCES.names() if name not in short]
    *ways, last = [*(f"{prefix}{name}=PATH" for name in short), *others]
    return f"give {', '.join(ways)} or {last}"


def _asked(settings: Given[Any], prefix: str) -> dict[str, Any]:
    """Return the settings that name the images: the source, and paths in the sections of sources."""
    names = ["source", *shorthands(DataConfig).values()]
    found = {name: settings.read(prefix + name) for name in names if settings.has(prefix + name)}
    return {name: value for name, value in found.items() if value is not None}


def _are_same(asked: dict[str, Any], known: DataConfig) -> bool:
    """Return True if settings name the known images."""
    short = shorthands(DataConfig)
    source = asked.get("source") or next(name for name, path in short.items() if path in asked)
    if source != known.source:
        return False
    path = short.get(source)
    if path not in asked:
        return True
    options: Any = from_dict(SOURCES.sections()[source], {path.partition(".")[2]: asked[path]}, where=path)
    return place_of(source, options) == known.place[1]


def _remembered(trained: Loaded[PretrainedModel]) -> DataConfig | None:
    """Return the settings of the images of a model's training; None where it does not name them."""
    data, where = trained.model.data, f"{trained.folder}/config.json: data"
    return None if data is None else from_dict(DataConfig, saved_settings(data), where=where)
