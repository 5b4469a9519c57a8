"""Load any saved model, by the model type in its folder."""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path

import torch

from rqgen.reading import read_json, shorten

from .pretrained import CONFIG_NAME, MODELS, PretrainedModel, model_folder
from .rqvae import RQVAE


def load_pretrained(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> PretrainedModel:
    """Load a model that `save_pretrained` wrote, of any class. Errors: see `PretrainedModel.from_pretrained`."""
    source = model_folder(Path(folder))
    kind = RQVAE.model_type  # its `from_pretrained` names the fault of a folder or file that says nothing
    if source is not None:
        path = source / CONFIG_NAME
        kind = read_json(path).get("model_type", kind)
        if not isinstance(kind, str) or kind not in _known_models(kind):
            raise ValueError(f"{path}: expected model_type one of {', '.join(MODELS)}, got {shorten(kind)}")
    return MODELS[kind].from_pretrained(source or folder, device)


def _known_models(kind: str) -> dict[str, type[PretrainedModel]]:
    """Return all models by their type; those of this package that have not been imported yet are searched for in its
    files."""
    if kind not in MODELS:
        for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
            importlib.import_module(f"{__package__}.{module.name}")
    return MODELS
