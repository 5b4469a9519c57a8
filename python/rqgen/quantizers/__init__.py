"""Quantizers of latent vectors."""

from .multiscale import MultiScaleConfig, MultiScaleDecoder, MultiScaleOutput, MultiScaleQuantizer
from .residual import QuantizerConfig, QuantizerOutput, ResidualQuantizer
from .usage import CodeUsage

__all__ = [
    "CodeUsage",
    "MultiScaleConfig",
    "MultiScaleDecoder",
    "MultiScaleOutput",
    "MultiScaleQuantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "ResidualQuantizer",
]
