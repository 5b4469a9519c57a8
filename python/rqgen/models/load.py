"""Any saved model, by what its folder says it is."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch

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
    path = Path(folder) / CONFIG_NAME
    kind = None
    if path.is_file():
        # A file without it is refused below, by `from_pretrained`, which says what is wrong with it.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            kind = json.loads(path.read_text(encoding="utf-8"))["model_type"]
        if kind is not None and kind not in _MODELS:
            raise ValueError(f"{path}: expected model_type one of {', '.join(_MODELS)}, got {kind!r}")
    return _MODELS.get(kind, RQVAE).from_pretrained(folder, device)
