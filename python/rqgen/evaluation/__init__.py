"""How good it is, in numbers."""

from .classifier import ImageClassifier
from .precision import PrecisionEffect, evaluate_precision
from .reconstruction import ReconstructionQuality, evaluate_reconstruction

__all__ = [
    "ImageClassifier",
    "PrecisionEffect",
    "ReconstructionQuality",
    "evaluate_precision",
    "evaluate_reconstruction",
]
