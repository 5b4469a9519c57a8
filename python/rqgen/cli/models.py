"""The models that a command names, loaded from their folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from rqgen.config import read_yaml
from rqgen.data import DataConfig
from rqgen.files import existing_folder
from rqgen.models import PretrainedModel, Prior, Tokenizer, load_pretrained
from rqgen.models.pretrained import CONFIG_NAME, WEIGHTS_NAME, model_folder, unfinished
from rqgen.reading import describe_file

from .errors import naming

ModelT = TypeVar("ModelT", bound=PretrainedModel, covariant=True)


@dataclass(frozen=True)
class Loaded(Generic[ModelT]):
    """A model and its folder."""

    model: ModelT
    folder: Path
    """The folder with config.json: of a training's folder, the one in it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", model_folder(self.folder) or self.folder)


@dataclass(frozen=True)
class Models:
    """A tokenizer and a prior; either may be missing."""

    tokenizer: Loaded[Tokenizer] | None = None
    prior: Loaded[Prior] | None = None

    def by_role(self) -> dict[str, Loaded[PretrainedModel]]:
        """Return the models that are there, by "tokenizer" and "prior"."""
        found: dict[str, Loaded[PretrainedModel]] = {}
        if self.tokenizer is not None:
            found["tokenizer"] = self.tokenizer
        if self.prior is not None:
            found["prior"] = self.prior
        return found


def default_device() -> str:
    """Return the device that commands use: "cuda" if there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(folder: Path, name: str) -> PretrainedModel:
    """Load the model in a folder, of any system, on the device that commands use. ``name`` is the option, or argument,
    that names it: errors open with it."""
    with naming({"folder": name}):
        return load_pretrained(folder, default_device())


def load_prior(folder: Path, name: str = "--prior") -> Prior:
    """Load the prior that the option ``name`` names. ValueError for another model."""
    model = load_model(folder, name)
    if not isinstance(model, Prior):
        raise ValueError(f"{name}: {folder} holds no prior, but a {model.model_type}")
    return model


def load_tokenizer(folder: Path, name: str = "--tokenizer") -> Tokenizer:
    """Load the tokenizer that the option ``name`` names. ValueError for another model."""
    return _as_tokenizer(load_model(folder, name), folder, name)


def _as_tokenizer(model: PretrainedModel, folder: Path, name: str) -> Tokenizer:
    if not isinstance(model, Tokenizer):
        raise ValueError(f"{name}: {folder} holds no tokenizer, but a {model.model_type}")
    return model


def load_models(folder: Path, tokenizer: Path | None = None) -> Models:
    """Load the models of RUN: a folder with tokenizer/ and prior/ (either may be missing, and each may be the folder
    of a training run), the folder of one training run, or a model's. Where there is no tokenizer next to a prior, the
    config.yaml of the prior's training names it. ``tokenizer`` is the folder to read in its place.

    Raises:
        FileNotFoundError: another folder, or the tokenizer of the prior's training is gone.
        TypeError, ValueError: a model of another kind, a damaged one, or two that do not belong together.
    """
    if not existing_folder(folder).is_dir():
        found = f": it is {describe_file(folder)}" if folder.exists() else ""
        raise FileNotFoundError(f"RUN: no folder {folder}{found}")
    parts = _parts(folder)
    # Both side by side come before a model/ next to them, as of a training into the same folder.
    alone = None if len(parts) == 2 and not (folder / CONFIG_NAME).is_file() else model_folder(folder)
    prior: Loaded[Prior] | None = None
    vae: Loaded[Tokenizer] | None = None
    if alone is not None:
        model = load_model(alone, "RUN")
        if isinstance(model, Prior):
            prior = Loaded(model, alone)
        else:
            vae = Loaded(_as_tokenizer(model, alone, "RUN"), alone)
    elif not parts:
        raise FileNotFoundError(
            f"RUN: {folder}: expected tokenizer/ and prior/, as `rqgen demo` writes them, or the folder of a model "
            f"({CONFIG_NAME} and {WEIGHTS_NAME}), got neither{unfinished(folder)}"
        )
    else:
        if (path := parts.get("prior")) is not None:
            prior = Loaded(load_prior(path, "RUN"), path)
        if tokenizer is None and (path := parts.get("tokenizer")) is not None:
            vae = Loaded(load_tokenizer(path, "RUN"), path)
    if tokenizer is None and vae is None:
        tokenizer = _tokenizer_of_training(folder if alone is not None else parts["prior"])
    if tokenizer is not None:
        vae = Loaded(load_tokenizer(tokenizer), tokenizer)
    if prior is not None and vae is not None:
        with naming({"vae": f"RUN: {vae.folder}" if tokenizer is None else "--tokenizer"}):
            prior.model.check_tokenizer(vae.model)
    return Models(vae, prior)


def _parts(folder: Path) -> dict[str, Path]:
    """Return the folders of both models in ``folder``, of those that are there."""
    parts = {name: folder / name for name in ("tokenizer", "prior")}
    return {name: part for name, part in parts.items() if existing_folder(part).is_dir()}


def _tokenizer_of_training(folder: Path) -> Path | None:
    """Return the tokenizer that config.yaml of a prior's training run names; None without such a file.
    FileNotFoundError where no model lies there."""
    for path in (folder / "config.yaml", folder.parent / "config.yaml"):
        if path.is_file() and isinstance(named := read_yaml(path).get("tokenizer"), str):
            if model_folder(Path(named)) is None:
                raise FileNotFoundError(f"--tokenizer: no model in {named}, which {path} names: give its folder")
            return Path(named)
    return None


def check_images_fit(data: DataConfig, model: Any, *, prefix: str = "data.") -> None:
    """Raise ValueError unless images of ``data`` are those that ``model``, a tokenizer's config, takes. ``prefix``
    leads to the data among the command's settings."""
    if model.image_shape != (data.resolution, data.resolution):
        raise ValueError(
            f"{prefix}resolution: {data.resolution}, but the tokenizer is for images of "
            f"{model.image_shape[0]}x{model.image_shape[1]}"
        )
    if data.channels != model.image_channels:
        raise ValueError(
            f"{prefix}channels: {data.channels}, but the tokenizer is for images of {model.image_channels} channels"
        )
