"""Drawing images from a prior and a tokenizer, and parts of images."""

from .cost import Cost, SamplingCost, sampling_cost
from .edit import EditOutput, edit
from .generate import GenerateOutput, generate

__all__ = ["Cost", "EditOutput", "GenerateOutput", "SamplingCost", "edit", "generate", "sampling_cost"]
