"""Training of both stages: one loop, two sets of step functions."""

from .checkpoint import latest_checkpoint
from .loop import LoopConfig, StepResult, TrainingResult, train
from .optim import OptimizerConfig
from .prior import PriorConfig, PriorData, PriorStage, encode_dataset, measure_tau, prior_data
from .tokenizer import TokenizerStage
from .var import VARPriorConfig, VARStage, encode_token_maps, var_prior_items

__all__ = [
    "LoopConfig",
    "OptimizerConfig",
    "PriorConfig",
    "PriorData",
    "PriorStage",
    "StepResult",
    "TokenizerStage",
    "TrainingResult",
    "VARPriorConfig",
    "VARStage",
    "encode_dataset",
    "encode_token_maps",
    "latest_checkpoint",
    "measure_tau",
    "prior_data",
    "train",
    "var_prior_items",
]
