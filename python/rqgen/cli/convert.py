"""`rqgen convert`: published checkpoints to our format."""

from __future__ import annotations

from rqgen.convert import load_kakaobrain, load_var

from .errors import naming
from .outputs import output_model
from .requests import ConvertKakaobrainRequest, ConvertVARRequest


def convert_kakaobrain(request: ConvertKakaobrainRequest) -> str:
    """Convert a published RQ-VAE or RQ-Transformer. Return the name of the model's type."""
    with output_model(request.destination, "DST"):
        with naming({"path": "SRC"}):
            model = load_kakaobrain(request.source, tokenizer=request.tokenizer)
        model.save_pretrained(request.destination)
        return model.model_type


def convert_var(request: ConvertVARRequest) -> None:
    """Convert a published VAR and its tokenizer."""
    folders = [request.destination / "tokenizer", request.destination / "prior"]
    with output_model(folders[0], "DST"), output_model(folders[1], "DST"):
        for model, folder in zip(load_var(request.vae, request.var, request.config), folders, strict=True):
            model.save_pretrained(folder)
