"""Metrics of models."""

from .classifier import ImageClassifier
from .precision import PrecisionEffect, evaluate_precision
from .reconstruction import ReconstructionQuality, evaluate_reconstruction
from .run import Evaluation, Run, evaluate
from .scaling import PowerLaw, fit_power_law
from .settings import EvaluationConfig, SamplingConfig
from .token_prediction import TokenPrediction, evaluate_token_prediction

__all__ = [
    "Evaluation",
    "EvaluationConfig",
    "ImageClassifier",
    "PowerLaw",
    "PrecisionEffect",
    "ReconstructionQuality",
    "Run",
    "SamplingConfig",
    "TokenPrediction",
    "evaluate",
    "evaluate_precision",
    "evaluate_reconstruction",
    "evaluate_token_prediction",
    "fit_power_law",
]
