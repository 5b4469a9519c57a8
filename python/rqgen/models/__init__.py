"""Models: RQ-VAE and RQ-Transformer, MultiScaleVQVAE and VAR."""

from .auto import load_pretrained
from .interfaces import CodeLosses, LevelLoss, Prior, Tokenizer
from .multiscale_vqvae import MultiScaleVQVAE, MultiScaleVQVAEConfig, MultiScaleVQVAELoss, MultiScaleVQVAEOutput
from .pretrained import PretrainedModel
from .rqtransformer import RQTransformer, RQTransformerConfig, RQTransformerOutput, SoftLabels, prior_loss
from .rqvae import RQVAE, RQVAEConfig, RQVAELoss, RQVAEOutput
from .var import VAR, VARConfig, VARLoss, VAROutput, var_loss

__all__ = [
    "RQVAE",
    "VAR",
    "CodeLosses",
    "LevelLoss",
    "MultiScaleVQVAE",
    "MultiScaleVQVAEConfig",
    "MultiScaleVQVAELoss",
    "MultiScaleVQVAEOutput",
    "PretrainedModel",
    "Prior",
    "RQTransformer",
    "RQTransformerConfig",
    "RQTransformerOutput",
    "RQVAEConfig",
    "RQVAELoss",
    "RQVAEOutput",
    "SoftLabels",
    "Tokenizer",
    "VARConfig",
    "VARLoss",
    "VAROutput",
    "load_pretrained",
    "prior_loss",
    "var_loss",
]
