"""RQ-Transformer: an autoregressive prior over stacks of residual codes (Lee et al., arXiv 2203.01941)."""

from .classifier import CodeClassifier
from .config import RQTransformerConfig
from .loss import CodeLoss, PriorLoss, RQTransformerOutput, SoftLabels, prior_loss
from .model import RQTransformer

__all__ = [
    "CodeClassifier",
    "CodeLoss",
    "PriorLoss",
    "RQTransformer",
    "RQTransformerConfig",
    "RQTransformerOutput",
    "SoftLabels",
    "prior_loss",
]
