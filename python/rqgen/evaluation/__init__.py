"""How good it is, in numbers."""

from .classifier import ImageClassifier
from .precision import PrecisionEffect, evaluate_precision
from .reconstruction import ReconstructionQuality, evaluate_reconstruction
from .scaling import PowerLaw, TokenPrediction, evaluate_token_prediction, fit_power_law

__all__ = [
    "ImageClassifier",
    "PowerLaw",
    "PrecisionEffect",
    "ReconstructionQuality",
    "TokenPrediction",
    "evaluate_precision",
    "evaluate_reconstruction",
    "evaluate_token_prediction",
    "fit_power_law",
]
