"""Tiny models: one place that says what a small RQ-VAE, RQ-Transformer, multi-scale VQ-VAE or VAR looks like.

Each function takes changes of the config's fields. `quantizer` is a dict of changes as well. Models are in eval mode
and have the weights they are initialised with, from torch's global generator; `resample_weights` and `perturb_weights`
give priors weights with which condition and previous codes matter.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from rqgen.models import (
    RQVAE,
    VAR,
    MultiScaleVQVAE,
    MultiScaleVQVAEConfig,
    RQTransformer,
    RQTransformerConfig,
    RQVAEConfig,
    VARConfig,
)
from rqgen.models.transformer import TransformerConfig
from rqgen.quantizers import MultiScaleConfig, MultiScaleQuantizer, QuantizerConfig

CODES = 12
"""Codes of a codebook, unless changed."""
_AUTOENCODER = {
    "image_channels": 1,
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "norm_groups": 4,
}

Model = TypeVar("Model", bound=nn.Module)


def rqvae_config(*, quantizer: dict[str, Any] | None = None, **changes: Any) -> RQVAEConfig:
    """Config of a grey 8x8 image as 4x4 stacks of 2 codes; the quantizer's depth is that of `code_shape`."""
    settings = {
        **_AUTOENCODER,
        "resolution": 8,
        "attention_resolutions": [],
        "z_channels": 4,
        "embed_dim": 4,
        "code_shape": [4, 4, 2],
        **changes,
    }
    settings["code_shape"] = list(settings["code_shape"])
    codebook = {"codebook_size": CODES, "depth": settings["code_shape"][2], **(quantizer or {})}
    return RQVAEConfig(**settings, quantizer=QuantizerConfig(**codebook))


def rqvae(**changes: Any) -> RQVAE:
    return RQVAE(rqvae_config(**changes)).eval()


def rq_prior_config(
    vae: RQVAE | None = None, *, layers: int = 1, heads: int = 2, num_classes: int = 0, **changes: Any
) -> RQTransformerConfig:
    """Config of a prior over the codes of `vae`, or of 2x2 stacks of 2 codes of 4 channels.

    `layers` and `heads` are those of both stacks. With `num_classes` it has a class condition and a null condition.
    """
    stack = {"layers": layers, "heads": heads}
    settings: dict[str, Any] = {
        "code_shape": vae.code_shape if vae else (2, 2, 2),
        "codebook_size": vae.config.quantizer.codebook_size if vae else CODES,
        "code_dim": vae.config.code_dim if vae else 4,
        "embed_dim": 16,
        "spatial": TransformerConfig(**stack),
        "depth": TransformerConfig(**stack),
    }
    if num_classes:
        settings |= {"condition": "class", "condition_vocab_size": num_classes, "condition_dropout": 0.1}
    return RQTransformerConfig(**{**settings, **changes})


def rq_prior(vae: RQVAE | None = None, *, cls: type[RQTransformer] = RQTransformer, **changes: Any) -> RQTransformer:
    """A prior with the codebooks of `vae`, or normal ones where there is no `vae` (none where code_dim is 0)."""
    config = rq_prior_config(vae, **changes)
    if vae is not None:
        return cls(config, vae.codebooks).eval()
    books = () if config.shared_codebook else (config.code_shape[2],)
    shape = (*books, config.codebook_size, config.code_dim)
    return cls(config, torch.randn(shape) if config.code_dim else None).eval()


def multiscale_config(**changes: Any) -> MultiScaleConfig:
    """Config of a quantizer with token maps of 1x1, 2x2 and 4x4."""
    return MultiScaleConfig(**{"codebook_size": CODES, "scales": [1, 2, 4], "refinements": 2, **changes})


def multiscale_vqvae_config(*, quantizer: dict[str, Any] | None = None, **changes: Any) -> MultiScaleVQVAEConfig:
    """Config of a grey image of 8x8 pixels as token maps of 1x1, 2x2 and 4x4."""
    settings = {**_AUTOENCODER, "attention": False, "z_channels": 6, **changes}
    return MultiScaleVQVAEConfig(**settings, quantizer=multiscale_config(**(quantizer or {})))


def multiscale_vqvae(**changes: Any) -> MultiScaleVQVAE:
    return MultiScaleVQVAE(multiscale_vqvae_config(**changes)).eval()


def var_config(
    vae: MultiScaleVQVAE | None = None, *, quantizer: dict[str, Any] | None = None, **changes: Any
) -> VARConfig:
    """Config of a prior over the token maps of `vae`, or those of `multiscale_config(**quantizer)`."""
    settings = {
        "code_dim": vae.config.z_channels if vae else 6,
        "embed_dim": 16,
        "layers": 2,
        "heads": 2,
        "num_classes": 3,
        **changes,
    }
    return VARConfig(quantizer=vae.config.quantizer if vae else multiscale_config(**(quantizer or {})), **settings)


def var(vae: MultiScaleVQVAE | None = None, **changes: Any) -> VAR:
    """A prior with the quantizer of `vae`, or a new one."""
    config = var_config(vae, **changes)
    return VAR(config, vae.quantizer if vae else MultiScaleQuantizer(config.quantizer, config.code_dim)).eval()


def resample_weights(model: Model, std: float) -> Model:
    """Sample every parameter from a normal distribution of mean 0."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


@torch.no_grad()
def perturb_weights(model: Model, std: float) -> Model:
    """Add normal noise to every parameter that is trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(std * torch.randn_like(parameter))
    return model
