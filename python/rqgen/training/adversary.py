"""Training of a stage's second model against its first: an optimizer of its own, and a part of checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rqgen.models.pretrained import load_tensors

from .optim import build_optimizer, learning_rate
from .resume import load_optimizer, load_scaler

if TYPE_CHECKING:
    from .loop import AdversarialStage, LoopConfig

logger = logging.getLogger(__name__)


class Adversary:
    """The second model of a stage, its optimizer and, for fp16, its gradient scaler.

    The scaler is not that of the first model: gradients of the one are accumulated while the other is updated, which
    may change the scale, and an overflow of the one says nothing of the other.

    ``updates`` counts the updates of its weights. Its learning rate is that of a run which begins with the first one
    and ends with this run.
    """

    def __init__(self, stage: AdversarialStage[Any], config: LoopConfig, accelerator: Accelerator) -> None:
        """``stage`` is on its device. Its second model goes to train mode."""
        self._stage, self._config, self._accelerator = stage, config, accelerator
        self.model = stage.adversary.train()
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = build_optimizer(self.model, stage.adversary_optimizer)
        self._scaler = None if accelerator.scaler is None else torch.amp.GradScaler(accelerator.device.type)
        self.updates = self._step = 0

    def start(self, step: int) -> None:
        """Prepare for the batches of update number ``step`` of the run, from 0."""
        self._step = step
        self._stage.start(step)

    def learn(self) -> dict[str, Tensor]:
        """Accumulate gradients on the batch of the stage's last step, and update the weights if it is the last batch of
        an update. Return terms to log; none before the model takes part."""
        with self._accelerator.autocast():
            opposed = self._stage.oppose()
        if opposed is None:
            return {}
        loss = opposed.loss / self._config.accumulation
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        if self._accelerator.sync_gradients:
            self._update()
        return opposed.terms

    def watch(self, record: dict[str, float]) -> None:
        """Say in the log what the stage remarks about a new record of the history."""
        for remark in self._stage.remarks(record):
            logger.warning("%s: step %d: %s", self._stage.name, record["step"], remark)

    def _update(self) -> None:
        settings = self._stage.adversary_optimizer
        start = self._step - self.updates
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.updates, self._config.steps - start)
        if settings.clip_norm is not None:
            if self._scaler is not None:
                self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._optimizer.zero_grad()
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any], *, where: str) -> None:
        """Restore what `state_dict` gave. Raise ValueError that names the entry that does not fit."""
        if (state["scaler"] is None) != (self._scaler is None):
            found = "not expected" if self._scaler is None else "missing"
            raise ValueError(f"{where}.scaler: {found} with these settings")
        load_tensors(self.model, state["model"], where=f"{where}.model", same_dtype=True)
        load_optimizer(self._optimizer, state["optimizer"], where=f"{where}.optimizer")
        if self._scaler is not None:
            load_scaler(self._scaler, state["scaler"], where=f"{where}.scaler")
        self.updates = state["updates"]
