"""Quantizers of latent vectors."""

from .convolution import Convolution, silu
from .layout import CodeLayout, Codes, code_fingerprint
from .multiscale import MultiScaleConfig, MultiScaleDecoder, MultiScaleOutput, MultiScaleQuantizer
from .residual import QuantizerConfig, QuantizerOutput, ResidualQuantizer
from .usage import CodeUsage

__all__ = [
    "CodeLayout",
    "CodeUsage",
    "Codes",
    "Convolution",
    "MultiScaleConfig",
    "MultiScaleDecoder",
    "MultiScaleOutput",
    "MultiScaleQuantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "ResidualQuantizer",
    "code_fingerprint",
    "silu",
]
