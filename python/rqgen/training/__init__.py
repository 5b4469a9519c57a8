"""Training of both stages: one loop, two sets of step functions."""

from .checkpoint import latest_checkpoint
from .encoding import encode_dataset
from .loop import LoopConfig, StepResult, TrainingResult, refuse_other_run, train
from .memory import check_memory
from .optim import OptimizerConfig
from .prior import PriorConfig, PriorData, PriorStage, measure_tau, prior_data
from .tokenizer import TokenizerStage
from .var import VARPriorConfig, VARStage, var_prior_items

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
    "check_memory",
    "encode_dataset",
    "latest_checkpoint",
    "measure_tau",
    "prior_data",
    "refuse_other_run",
    "train",
    "var_prior_items",
]
