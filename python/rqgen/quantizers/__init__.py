"""Quantizers of latent vectors."""

from .convolution import Convolution, silu
from .multiscale import MultiScaleConfig, MultiScaleDecoder, MultiScaleOutput, MultiScaleQuantizer
from .residual import QuantizerConfig, QuantizerOutput, ResidualQuantizer
from .usage import CodeUsage

__all__ = [
    "CodeUsage",
    "Convolution",
    "MultiScaleConfig",
    "MultiScaleDecoder",
    "MultiScaleOutput",
    "MultiScaleQuantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "ResidualQuantizer",
    "silu",
]
