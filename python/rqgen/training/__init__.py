"""Training of tokenizers and priors: one loop, and a stage for each kind of model."""

from .checkpoint import latest_checkpoint
from .codes import CodesStage, code_items
from .encoding import encode_dataset
from .loop import LoopConfig, StepResult, TrainingResult, train
from .losses import AdversarialConfig, PerceptualConfig
from .memory import check_memory
from .optim import OptimizerConfig
from .prior import PriorConfig, PriorData, PriorStage, measure_tau, prior_data
from .resume import check_resumable, newest_whole_checkpoint, refuse_other_run
from .tokenizer import TokenizerStage, tokenizer_stage
from .var import VARPriorConfig

__all__ = [
    "AdversarialConfig",
    "CodesStage",
    "LoopConfig",
    "OptimizerConfig",
    "PerceptualConfig",
    "PriorConfig",
    "PriorData",
    "PriorStage",
    "StepResult",
    "TokenizerStage",
    "TrainingResult",
    "VARPriorConfig",
    "check_memory",
    "check_resumable",
    "code_items",
    "encode_dataset",
    "latest_checkpoint",
    "measure_tau",
    "newest_whole_checkpoint",
    "prior_data",
    "refuse_other_run",
    "tokenizer_stage",
    "train",
]
