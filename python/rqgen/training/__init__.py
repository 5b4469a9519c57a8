"""Training of both stages: one loop, two sets of step functions."""

from .checkpoint import latest_checkpoint
from .encoding import encode_dataset
from .loop import LoopConfig, StepResult, TrainingResult, train
from .memory import check_memory
from .optim import OptimizerConfig
from .prior import PriorConfig, PriorData, PriorStage, measure_tau, prior_data
from .resume import check_resumable, newest_whole_checkpoint, refuse_other_run
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
    "check_resumable",
    "encode_dataset",
    "latest_checkpoint",
    "measure_tau",
    "newest_whole_checkpoint",
    "prior_data",
    "refuse_other_run",
    "train",
    "var_prior_items",
]
