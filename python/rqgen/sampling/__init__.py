"""Drawing images from a prior and a tokenizer."""

from .generate import GenerateOutput, generate

__all__ = ["GenerateOutput", "generate"]
