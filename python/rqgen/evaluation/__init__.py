"""How good it is, in numbers."""

from .classifier import ImageClassifier
from .reconstruction import ReconstructionQuality, evaluate_reconstruction

__all__ = ["ImageClassifier", "ReconstructionQuality", "evaluate_reconstruction"]
