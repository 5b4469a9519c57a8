"""Stage 1: training of a tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from rqgen.data.grid import image_grid
from rqgen.data.stream import Batch
from rqgen.models import Tokenizer

from .loop import StepResult


class TokenizerStage:
    """Training by the tokenizer's own `loss`: reconstruction and commitment for an RQ-VAE (Lee et al. 2022, equations
    6-7; moving averages inside the model update the codebook), and the codebook loss too for a multi-scale VQ-VAE.

    ``examples`` (N, channels, H, W), if given, are shown with their reconstructions while training.
    """

    name = "tokenizer"

    def __init__(self, model: Tokenizer, examples: Tensor | None = None) -> None:
        self.model = model
        self.axis = model.layout.axis
        self._examples = examples

    def to(self, device: torch.device) -> None:
        if self._examples is not None:
            self._examples = self._examples.to(device)

    def step(self, batch: Batch) -> StepResult:
        loss = self.model.loss(batch.inputs)
        terms = {name: term for name, term in loss._asdict().items() if name not in ("total", "output")}
        return StepResult(loss.total, terms)

    def usage(self) -> dict[str, Tensor]:
        usage = self.model.usage
        return {} if usage is None else {"codes_used": usage.codes_used(), "perplexity": usage.perplexity()}

    def previews(self, model: Tokenizer) -> dict[str, Tensor]:
        if self._examples is None:
            return {}
        both = torch.cat([self._examples, model(self._examples).reconstruction.float()])
        return {"reconstructions": image_grid(both, columns=len(self._examples))}
