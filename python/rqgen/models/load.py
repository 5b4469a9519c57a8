"""Any saved model, by what its folder says it is."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rqgen.files import existing_folder
from rqgen.reading import read_json, shorten

from .multiscale_vqvae import MultiScaleVQVAE
from .pretrained import CONFIG_NAME, PretrainedModel
from .rqtransformer import RQTransformer
from .rqvae import RQVAE
from .var import VAR

_MODELS: dict[str, type[PretrainedModel]] = {
    model.model_type: model for model in (RQVAE, RQTransformer, MultiScaleVQVAE, VAR)
}


def load_pretrained(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> PretrainedModel:
    """Reads what `save_pretrained` wrote, of whichever kind. Errors: see `PretrainedModel.from_pretrained`."""
    path = existing_folder(Path(folder)) / CONFIG_NAME
    kind = RQVAE.model_type  # whose `from_pretrained` says what is wrong with a file without it
    if path.is_file():
        kind = read_json(path).get("model_type", kind)
        if not isinstance(kind, str) or kind not in _MODELS:
            raise ValueError(f"{path}: expected model_type one of {', '.join(_MODELS)}, got {shorten(kind)}")
    return _MODELS[kind].from_pretrained(folder, device)
