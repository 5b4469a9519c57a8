"""Optimizer, learning rate schedule, and averaged weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from rqgen.config import check_fields

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass
class OptimizerConfig:
    """Settings of AdamW with a linear warm-up, then a cosine decay to ``final_lr_fraction`` of the peak."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    final_lr_fraction: float = 0.0
    """Learning rate at the last step, as a fraction of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up to the peak."""
    beta1: float = 0.9
    """Decay of AdamW's average of gradients."""
    beta2: float = 0.95
    """Decay of AdamW's average of squared gradients."""
    weight_decay: float = 0.0
    """Weight decay of parameters with two or more dimensions; there is none for biases and norms."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradients, which are scaled down to it; None: no clipping."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup_steps > 2**31:
            raise ValueError(f"warmup_steps: expected at most {2**31}, got {self.warmup_steps}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(f"final_lr_fraction: expected 0 .. 1, got {self.final_lr_fraction}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected 0 or more, got {self.warmup_steps}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm: expected a positive number or null, got {self.clip_norm}")


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of update number ``step`` (0-based) of ``steps``. It depends on nothing else: there is
    no state to save.

    ``peak * (step + 1) / warmup`` while warming up; then, with t from 0 to 1 over the remaining steps,
    ``peak * (f + (1 - f) * (1 + cos(pi t)) / 2)`` where f is ``final_lr_fraction``.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, in two groups: with weight decay (two or more dimensions) and
    without."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))


class AveragedWeights(Generic[ModelT]):
    """Exponential moving average of a model's parameters; buffers (codebooks, counts) are copied as they are.

    ``w = decay' w + (1 - decay') p`` after every update, with ``decay' = min(decay, (1 + n) / (10 + n))`` at
    update n, so that the first random weights are forgotten quickly.
    """

    def __init__(self, model: ModelT, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay: expected 0 < decay < 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averaged: list[Tensor] = list(self.model.parameters())
        current = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.model.load_state_dict(state["model"])
