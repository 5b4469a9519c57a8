"""Models: RQ-VAE and RQ-Transformer."""

from rqgen.models.pretrained import PretrainedModel
from rqgen.models.rqvae import RQVAE, RQVAEConfig, RQVAELoss, RQVAEOutput

__all__ = ["RQVAE", "PretrainedModel", "RQVAEConfig", "RQVAELoss", "RQVAEOutput"]
