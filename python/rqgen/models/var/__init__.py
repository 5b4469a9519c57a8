"""VAR: a prior that predicts whole token maps, scale after scale (Tian et al., arXiv 2404.02905)."""

from .blocks import AdaptiveBlock, Modulation, ScaleAttention
from .config import VARConfig
from .loss import VARLoss, VAROutput, var_loss
from .model import VAR

__all__ = [
    "VAR",
    "AdaptiveBlock",
    "Modulation",
    "ScaleAttention",
    "VARConfig",
    "VARLoss",
    "VAROutput",
    "var_loss",
]
