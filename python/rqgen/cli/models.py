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
from rqgen.models.pretrained import CONFIG_NAME, WEIGHTS_NAME

from .errors import naming

ModelT = TypeVar("ModelT", bound=PretrainedModel, covariant=True)


@dataclass(frozen=True)
class Loaded(Generic[ModelT]):
    """A model and its folder."""

    model: ModelT
    folder: Path


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


def load_prior(folder: Path) -> Prior:
    """Load the prior that ``--prior`` names. ValueError for another model."""
    model = load_model(folder, "--prior")
    if not isinstance(model, Prior):
        raise ValueError(f"--prior: {folder} holds no prior, but a {model.model_type}")
    return model


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer that ``--tokenizer`` names. ValueError for another model."""
    model = load_model(folder, "--tokenizer")
    if not isinstance(model, Tokenizer):
        raise ValueError(f"--tokenizer: {folder} holds no tokenizer, but a {model.model_type}")
    return model


def load_models(folder: Path, tokenizer: Path | None = None) -> Models:
    """Load the models of a folder: one with tokenizer/ and prior/ (either may be missing, and each may be the folder
    of a training run), the folder of one training run (a prior's config.yaml names its tokenizer), or a model's.
    ``tokenizer`` is the folder to read in place of the tokenizer that is found.

    Raises FileNotFoundError for another folder, ValueError for a model of another kind.
    """
    alone, prior = model_folder(folder), None
    if alone is not None:
        model = load_model(alone, "RUN")
        if not isinstance(model, Prior):
            found = load_tokenizer(alone) if tokenizer is None else load_tokenizer(tokenizer)
            return Models(tokenizer=Loaded(found, alone if tokenizer is None else tokenizer))
        prior = Loaded(model, alone)
        tokenizer = tokenizer or _tokenizer_of_training(folder)
    else:
        folders = {name: model_folder(folder / name) for name in ("tokenizer", "prior")}
        if not any(folders.values()):
            raise FileNotFoundError(
                f"{folder}: expected tokenizer/ and prior/, as `rqgen demo` writes them, or the folder of a model "
                f"({CONFIG_NAME} and {WEIGHTS_NAME})"
            )
        if (path := folders["prior"]) is not None:
            prior = Loaded(load_prior(path), path)
        tokenizer = tokenizer or folders["tokenizer"]
    return Models(None if tokenizer is None else Loaded(load_tokenizer(tokenizer), tokenizer), prior)


def model_folder(path: Path) -> Path | None:
    """Return the folder of a model: ``path`` itself, or model/ in it as in a training run; None without a model."""
    for folder in (path, path / "model"):
        if (existing_folder(folder) / CONFIG_NAME).is_file():
            return folder
    return None


def _tokenizer_of_training(folder: Path) -> Path | None:
    """Return the tokenizer that config.yaml of a prior's training run names, if it exists."""
    for path in (folder / "config.yaml", folder.parent / "config.yaml"):
        if path.is_file():
            named = read_yaml(path).get("tokenizer")
            if isinstance(named, str) and model_folder(Path(named)) is not None:
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
