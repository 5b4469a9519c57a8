"""Models: RQ-VAE and RQ-Transformer, MultiScaleVQVAE and VAR."""

from .load import load_pretrained
from .multiscale_vqvae import MultiScaleVQVAE, MultiScaleVQVAEConfig, MultiScaleVQVAELoss, MultiScaleVQVAEOutput
from .pretrained import PretrainedModel
from .rqtransformer import RQTransformer, RQTransformerConfig, RQTransformerOutput, SoftLabels, prior_loss
from .rqvae import RQVAE, RQVAEConfig, RQVAELoss, RQVAEOutput
from .var import VAR, VARConfig, VARLoss, VAROutput, var_loss

__all__ = [
    "RQVAE",
    "VAR",
    "MultiScaleVQVAE",
    "MultiScaleVQVAEConfig",
    "MultiScaleVQVAELoss",
    "MultiScaleVQVAEOutput",
    "PretrainedModel",
    "RQTransformer",
    "RQTransformerConfig",
    "RQTransformerOutput",
    "RQVAEConfig",
    "RQVAELoss",
    "RQVAEOutput",
    "SoftLabels",
    "VARConfig",
    "VARLoss",
    "VAROutput",
    "load_pretrained",
    "prior_loss",
    "var_loss",
]
