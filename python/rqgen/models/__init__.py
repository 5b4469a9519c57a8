"""Models: RQ-VAE and RQ-Transformer."""

from .pretrained import PretrainedModel
from .rqtransformer import RQTransformer, RQTransformerConfig, RQTransformerOutput, prior_loss
from .rqvae import RQVAE, RQVAEConfig, RQVAELoss, RQVAEOutput

__all__ = [
    "RQVAE",
    "PretrainedModel",
    "RQTransformer",
    "RQTransformerConfig",
    "RQTransformerOutput",
    "RQVAEConfig",
    "RQVAELoss",
    "RQVAEOutput",
    "prior_loss",
]
