"""`rqgen convert`: published checkpoints to our format."""

from __future__ import annotations

from rqgen.convert import load_kakaobrain, load_var
from rqgen.files import claim
from rqgen.models.pretrained import check_replaceable

from .requests import ConvertKakaobrainRequest, ConvertVARRequest


def convert_kakaobrain(request: ConvertKakaobrainRequest) -> str:
    """Convert a published RQ-VAE or RQ-Transformer. Return the name of the model's type."""
    check_replaceable(request.destination)
    with claim(request.destination):
        model = load_kakaobrain(request.source, tokenizer=request.tokenizer)
        model.save_pretrained(request.destination)
        return model.model_type


def convert_var(request: ConvertVARRequest) -> None:
    """Convert a published VAR and its tokenizer."""
    folders = [request.destination / "tokenizer", request.destination / "prior"]
    for folder in folders:
        check_replaceable(folder)
    with claim(folders[0]), claim(folders[1]):
        for model, folder in zip(load_var(request.vae, request.var, request.config), folders, strict=True):
            model.save_pretrained(folder)
