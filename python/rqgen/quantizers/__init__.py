"""Quantizers of latent vectors."""

from .residual import QuantizerConfig, QuantizerOutput, ResidualQuantizer
from .usage import CodeUsage

__all__ = ["CodeUsage", "QuantizerConfig", "QuantizerOutput", "ResidualQuantizer"]
