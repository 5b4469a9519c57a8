"""The training loop that both stages share.

A stage brings a model and a loss; the loop brings the rest: Accelerate (device, mixed precision,
accumulation, clipping), the learning rate, averaged weights, logs, checkpoints, and resuming bit for bit.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor, nn

from rqgen.config import check_finite, to_dict
from rqgen.data.stream import Batch, BatchStream, Items

from .checkpoint import load_checkpoint, random_states, restore_random_states, save_checkpoint
from .optim import AveragedWeights, OptimizerConfig, build_optimizer, learning_rate
from .progress import training_progress

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass
class LoopConfig:
    """How long, how much at once, and what is written down."""

    steps: int = 1000
    """Updates of the weights."""
    batch_size: int = 64
    """Images of one forward pass."""
    accumulation: int = 1
    """Forward passes per update: an update sees batch_size * accumulation images."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    seed: int = 0
    """Of weights, data order, dropout and stochastic codes."""
    workers: int = 0
    """Processes that prepare batches (0: this one)."""
    channels_last: bool = False
    """Memory layout of convolutions; often faster."""
    ema_decay: float | None = None
    """Keep averaged weights with this decay and save those as the model; None: no averages."""
    window: int = 50
    """The loss terms are logged as means over the last so many updates."""
    log_every: int = 10
    image_every: int = 500
    """Draw image grids into TensorBoard; 0: never."""
    checkpoint_every: int = 500
    """0: never."""
    keep_checkpoints: int = 2
    tensorboard: bool = True
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        check_finite(self)
        positive = ("steps", "batch_size", "accumulation", "window", "log_every", "keep_checkpoints")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("seed", "workers", "image_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 < decay < 1 or null, got {self.ema_decay}")


# What may differ when a run is resumed: none of it changes the weights a step computes.
RESUMABLE_CHANGES = frozenset(
    {"workers", "log_every", "image_every", "checkpoint_every", "keep_checkpoints", "tensorboard"}
)


class StepResult(NamedTuple):
    """``loss`` to differentiate; ``terms`` are detached scalars to log."""

    loss: Tensor
    terms: dict[str, Tensor]


class Stage(Protocol[ModelT]):
    """What the loop needs of a stage."""

    name: str
    model: ModelT
    axis: str
    """What the entries of `usage` stand for, as logs call it: "depth" or "scale"."""

    def to(self, device: torch.device) -> None:
        """Moves whatever the stage holds beside the model."""

    def step(self, batch: Batch) -> StepResult: ...

    def usage(self) -> dict[str, Tensor]:
        """Values per depth (D,), or per scale, over the running window, such as codes used and perplexity."""

    def pictures(self, model: ModelT) -> dict[str, Tensor]:
        """Sheets of images, bytes (channels, H, W), drawn with ``model`` (the averaged weights, if any)."""


@dataclass
class TrainingResult(Generic[ModelT]):
    """``model`` in eval mode (averaged weights, if asked for); ``history`` one dictionary per logged step."""

    model: ModelT
    history: list[dict[str, float]]


def train(
    stage: Stage[ModelT],
    items: Items,
    config: LoopConfig,
    folder: Path,
    *,
    description: dict[str, Any] | None = None,
    resume: Path | None = None,
    console: Console | None = None,
) -> TrainingResult[ModelT]:
    """Trains ``stage.model`` on ``items`` for ``config.steps`` updates.

    ``folder`` gets checkpoints/ and tensorboard/. ``description`` (plain data: the run's whole configuration)
    is kept in every checkpoint, and a resumed run must bring an equal one. ``resume``: a checkpoint to go on
    from; the weights of every later step equal those of a run that was never interrupted, bit for bit, on the
    same machine.

    Raises ValueError for a checkpoint of another configuration, FloatingPointError when the loss is no longer
    finite, RuntimeError under more than one process.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.accumulation)
    if accelerator.num_processes > 1:
        raise RuntimeError(
            f"training runs in one process, but {accelerator.num_processes} were launched: "
            "codebook averages are not exchanged between processes"
        )
    described = description if description is not None else {"loop": to_dict(config)}
    set_seed(config.seed)
    model = stage.model
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = None if config.ema_decay is None else AveragedWeights(model, config.ema_decay)
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model, config.optimizer))
    stage.to(accelerator.device)
    if averaged is not None:
        averaged.model.to(accelerator.device)
    step, history, window = 0, [], deque(maxlen=config.window)
    if resume is not None:
        state, info = load_checkpoint(resume, map_location=accelerator.device)
        refuse_other_run(info["description"], described, resume)
        step, history = state["step"], state["history"]
        window.extend(state["window"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        # Last: nothing above may draw.
        restore_random_states(state["random"])

    def checkpoint() -> None:
        state = {
            "step": step,
            "history": history,
            "window": list(window),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "averaged": None if averaged is None else averaged.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "random": random_states(),
        }
        info = {"step": step, "stage": stage.name, "description": described}
        save_checkpoint(folder / "checkpoints", step, state, info, keep=config.keep_checkpoints)

    stream = BatchStream(
        items,
        config.batch_size,
        seed=config.seed,
        start=step * config.accumulation,
        workers=config.workers,
    )
    batches = iter(stream)
    writer = _Writer(folder / "tensorboard", step) if config.tensorboard else None
    images_per_step = config.batch_size * config.accumulation
    wrapped.train()
    try:
        with training_progress(console) as progress:
            task = progress.add_task(stage.name, total=config.steps, completed=step, loss="...", speed="...", usage="")
            since, counted = time.perf_counter(), step
            while step < config.steps:
                rate = learning_rate(config.optimizer, step, config.steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                terms = _update(accelerator, stage, wrapped, optimizer, batches, config)
                step += 1
                if averaged is not None:
                    averaged.update(model)
                window.append(terms)
                if step % config.log_every == 0 or step == config.steps:
                    record = _record(step, rate, window, stage)
                    history.append(record)
                    speed = (step - counted) * images_per_step / max(1e-9, time.perf_counter() - since)
                    since, counted = time.perf_counter(), step
                    progress.update(
                        task, loss=f"{record['loss']:.4f}", speed=f"{speed:,.0f}", usage=_codes_used(record)
                    )
                    if writer is not None:
                        writer.scalars(record | {"images_per_second": speed}, step)
                progress.update(task, completed=step)
                if (
                    writer is not None
                    and config.image_every
                    and (step % config.image_every == 0 or step == config.steps)
                ):
                    writer.pictures(_draw(stage, model, averaged), step)
                if config.checkpoint_every and (step % config.checkpoint_every == 0 or step == config.steps):
                    checkpoint()
    finally:
        if writer is not None:
            writer.close()
    trained = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    result = averaged.model if averaged is not None else trained
    return TrainingResult(result.eval(), history)


def _update(
    accelerator: Accelerator,
    stage: Stage[Any],
    model: nn.Module,
    optimizer: Any,
    batches: Any,
    config: LoopConfig,
) -> dict[str, Tensor]:
    """One update of the weights from ``accumulation`` batches. Returns the mean of every logged term."""
    sums: dict[str, Tensor] = {}
    for _ in range(config.accumulation):
        batch = next(batches)
        device_batch = batch._replace(
            inputs=batch.inputs.to(accelerator.device, non_blocking=True),
            labels=batch.labels.to(accelerator.device, non_blocking=True),
        )
        with accelerator.accumulate(model):
            with accelerator.autocast():
                result = stage.step(device_batch)
            accelerator.backward(result.loss)
            if accelerator.sync_gradients and config.optimizer.clip_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in ({"loss": result.loss} | result.terms).items():
            sums[name] = sums.get(name, 0) + value.detach().float() / config.accumulation
    return sums


def _record(step: int, rate: float, window: deque[dict[str, Tensor]], stage: Stage[Any]) -> dict[str, float]:
    """One line of the history. This is the only place where numbers are read back from the device."""
    record: dict[str, float] = {"step": step, "learning_rate": rate}
    for name in window[-1]:
        record[name] = torch.stack([terms[name] for terms in window]).mean().item()
    if not all(value == value and abs(value) != float("inf") for value in record.values()):
        raise FloatingPointError(f"{stage.name}: the loss is not finite at step {step}: {record}")
    for name, values_d in stage.usage().items():
        record |= {f"{name}/{stage.axis}_{d + 1}": float(value) for d, value in enumerate(values_d.tolist())}
    return record


def _codes_used(record: dict[str, float]) -> str:
    used = [f"{value:.0f}" for name, value in record.items() if name.startswith("codes_used/")]
    return f"codes {'/'.join(used)}" if used else ""


@torch.no_grad()
def _draw(stage: Stage[Any], model: nn.Module, averaged: AveragedWeights | None) -> dict[str, Tensor]:
    if averaged is not None:
        return stage.pictures(averaged.model)
    model.eval()
    try:
        return stage.pictures(model)
    finally:
        model.train()


def refuse_other_run(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Raises ValueError where two descriptions of a run differ in what changes its weights."""
    for key, before, now in _differences(saved, current, ""):
        if key.rsplit(".", 1)[-1] not in RESUMABLE_CHANGES:
            raise ValueError(f"cannot resume {path}: '{key}' was {before!r} there and is {now!r} now")


def _differences(before: Any, now: Any, key: str) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for name in sorted(before.keys() | now.keys())
            for difference in _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if before == now else [(key, before, now)]


class _Writer:
    """TensorBoard files; a resumed run drops what the interrupted one wrote after its checkpoint."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def scalars(self, record: dict[str, float], step: int) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def pictures(self, sheets: dict[str, Tensor], step: int) -> None:
        for name, sheet_chw in sheets.items():
            self._writer.add_image(name, sheet_chw, step)

    def close(self) -> None:
        self._writer.close()
