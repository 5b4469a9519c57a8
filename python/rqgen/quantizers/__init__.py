"""Quantizers of latent vectors."""

from rqgen.quantizers.residual import QuantizerConfig, QuantizerOutput, ResidualQuantizer
from rqgen.quantizers.usage import CodeUsage

__all__ = ["CodeUsage", "QuantizerConfig", "QuantizerOutput", "ResidualQuantizer"]
