"""Metrics of models."""

from .classifier import ImageClassifier
from .distances import KernelDistance, frechet_distance, kernel_distance
from .features import FeatureStatistics
from .precision import PrecisionEffect, evaluate_precision
from .reconstruction import ReconstructionQuality, evaluate_reconstruction
from .run import Evaluation, Run, evaluate
from .scaling import PowerLaw, fit_power_law
from .scores import InceptionScore, PrecisionRecall, inception_score, precision_recall
from .settings import EvaluationConfig, SamplingConfig
from .token_prediction import TokenPrediction, evaluate_token_prediction

__all__ = [
    "Evaluation",
    "EvaluationConfig",
    "FeatureStatistics",
    "ImageClassifier",
    "InceptionScore",
    "KernelDistance",
    "PowerLaw",
    "PrecisionEffect",
    "PrecisionRecall",
    "ReconstructionQuality",
    "Run",
    "SamplingConfig",
    "TokenPrediction",
    "evaluate",
    "evaluate_precision",
    "evaluate_reconstruction",
    "evaluate_token_prediction",
    "fit_power_law",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]
