"""Images, and parts of images, sampled from a prior and a tokenizer."""

from rqgen.inference import Engine, SamplingParams

from .arguments import KnownRows
from .cost import Cost, SamplingCost, sampling_cost
from .edit import EditOutput, edit
from .generate import GenerateOutput, generate
from .pipeline import Pipeline, PipelineOutput

__all__ = [
    "Cost",
    "EditOutput",
    "Engine",
    "GenerateOutput",
    "KnownRows",
    "Pipeline",
    "PipelineOutput",
    "SamplingCost",
    "SamplingParams",
    "edit",
    "generate",
    "sampling_cost",
]
