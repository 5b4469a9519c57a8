"""Training loop of both stages.

A stage brings a model and a loss; the loop brings the rest: Accelerate (device, mixed precision,
accumulation, clipping), the learning rate, averaged weights, logs, checkpoints, and resuming bit for bit.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor, nn

from rqgen.config import check_bounds, check_seeds, to_dict
from rqgen.data.stream import Batch, BatchStream, Items
from rqgen.files import errors_name, write_text
from rqgen.models.pretrained import CHECKPOINTS, first_not_finite, load_tensors
from rqgen.reading import describe_file

from .adversary import Adversary
from .checkpoint import (
    STATE_FILE,
    latest_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
    tensors_in,
)
from .optim import AveragedWeights, ModelT, OptimizerConfig, build_optimizer, learning_rate
from .progress import RunProgress
from .resume import check_resumable, load_optimizer, load_scaler, read_state

logger = logging.getLogger(__name__)

# What a run writes to its folder, next to CHECKPOINTS.
TENSORBOARD, HISTORY = "tensorboard", "history.csv"


@dataclass
class LoopConfig:
    """Settings of a training run: its length, its batches, and the files that it writes."""

    steps: int = 1000
    """Updates of the weights. A resumed run may have more: from there on its learning rate is that of a run planned for
    the new number."""
    batch_size: int = 64
    """Images of one forward pass."""
    accumulation: int = 1
    """Forward passes per update: an update sees batch_size * accumulation images."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Arithmetic of the forward pass, by Accelerate's autocast; fp16 needs a GPU: on the CPU it is float32, with a
    warning."""
    seed: int = 0
    """Seed of weights, data order, dropout and stochastic codes."""
    workers: int = 0
    """Processes that prepare batches (0: this one)."""
    channels_last: bool = False
    """Use the channels-last memory layout in convolutions; often faster."""
    ema_decay: float | None = None
    """Keep averaged weights with this decay and save those as the model; None: no averages."""
    window: int = 50
    """Updates over which the logged loss terms are averaged."""
    log_every: int = 10
    """Steps between two entries of the history."""
    image_every: int = 500
    """Steps between two image grids in TensorBoard; 0: none."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; 0: never."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep; older ones are removed."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    history_csv: bool = True
    """Write the logged values to history.csv, with every checkpoint and at the end."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Settings of AdamW and its learning rate."""

    def __post_init__(self) -> None:
        check_seeds(self, "seed")
        check_bounds(
            self,
            steps=(1, 99_999_999),  # what a checkpoint's name holds
            batch_size=(1, 2**24),
            accumulation=(1, 2**20),
            workers=(0, 256),
            window=(1, 2**20),
            log_every=(1, 2**31),
            image_every=(0, 2**31),
            checkpoint_every=(0, 2**31),
            keep_checkpoints=(1, 2**31),
        )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 < decay < 1 or null, got {self.ema_decay}")


class StepResult(NamedTuple):
    """``loss`` to differentiate; ``terms`` are detached scalars to log."""

    loss: Tensor
    terms: dict[str, Tensor]


class Stage(Protocol[ModelT]):
    """Interface of a stage: a model, its loss, and values to log."""

    name: str
    model: ModelT
    axis: str
    """Name in logs of the axis of `usage`: "depth" or "scale"."""

    def to(self, device: torch.device) -> None:
        """Move the stage's tensors to a device, except those of the model."""

    def step(self, batch: Batch) -> StepResult: ...

    def usage(self) -> dict[str, Tensor]:
        """Return values per depth or scale, (D,), over the running window, such as codes used and perplexity."""

    def previews(self, model: ModelT) -> dict[str, Tensor]:
        """Return image grids, uint8 (channels, H, W), made with ``model`` (the averaged weights, if any)."""


@runtime_checkable
class AdversarialStage(Stage[ModelT], Protocol[ModelT]):
    """Interface of a stage whose model is trained against a second one, such as a discriminator."""

    @property
    def adversary(self) -> nn.Module:
        """The second model. Its state dict is a part of checkpoints, and all that a resumed run knows of it."""

    @property
    def adversary_optimizer(self) -> OptimizerConfig:
        """Settings of its optimizer."""

    def start(self, step: int) -> None:
        """Prepare for the batches of update number ``step``, from 0."""

    def oppose(self) -> StepResult | None:
        """Return the adversary's loss on the batch of the last `step`, after the model's own update; None before the
        adversary takes part. The terms are logged with those of `step`."""

    def remarks(self, record: dict[str, float]) -> list[str]:
        """Return lines for the log about a new record of the history."""


@dataclass
class TrainingResult(Generic[ModelT]):
    """``model`` in eval mode (averaged weights, if asked for); ``history``: one dictionary per logged step."""

    model: ModelT
    history: list[dict[str, float]]


def train(
    stage: Stage[ModelT],
    items: Items,
    config: LoopConfig,
    folder: str | Path,
    *,
    description: dict[str, Any] | None = None,
    resume: str | Path | None = None,
    console: Console | None = None,
    started: Callable[[], None] | None = None,
) -> TrainingResult[ModelT]:
    """Train ``stage.model`` on ``items`` for ``config.steps`` updates.

    ``folder`` gets checkpoints/, tensorboard/ and history.csv. ``description`` (plain data: the run's whole
    configuration, ``config`` under "loop") is kept in every checkpoint, and a resumed run must bring an equal one, but
    for `RESUMABLE_CHANGES` and ``loop.steps``. ``resume``: a checkpoint to resume from; the weights of every later
    step equal those of an uninterrupted run, bit for bit, on the same machine. ``started`` is called before the first
    step: nothing refuses the run, or its checkpoint, any more.

    The second model of an `AdversarialStage` has an optimizer of its own: after each update of ``stage.model`` it is
    updated once, from losses on the same batches. Its state is a part of checkpoints.

    Raises:
        ValueError: a checkpoint of another configuration, of a later step than ``config.steps``, or a damaged one.
        TypeError: ``config`` is not a `LoopConfig`.
        FileExistsError: ``folder`` holds checkpoints, and none is resumed; it is a file, or holds something else in the
            place of its folders or of history.csv.
        FloatingPointError: the loss or the weights are no longer finite. No checkpoint holds such a state.
        RuntimeError: more than one process.
    """
    if not isinstance(config, LoopConfig):
        raise TypeError(f"config: expected LoopConfig, got {type(config).__name__}")
    folder, resume = Path(folder), None if resume is None else Path(resume)
    _check_places(folder)
    with _accelerator(config) as accelerator:
        return _train(accelerator, stage, items, config, folder, description, resume, console, started)


def _check_places(folder: Path) -> None:
    """Raise FileExistsError if something else stands where a run writes: before the first step, not at a checkpoint."""
    for path, is_right, expected in (
        (folder, Path.is_dir, "a folder"),
        (folder / CHECKPOINTS, Path.is_dir, "a folder"),
        (folder / TENSORBOARD, Path.is_dir, "a folder"),
        (folder / HISTORY, Path.is_file, "a file"),
    ):
        if os.path.lexists(path) and not is_right(path):
            raise FileExistsError(f"{path}: expected {expected} or nothing, got {describe_file(path)}")


@contextlib.contextmanager
def _accelerator(config: LoopConfig) -> Iterator[Accelerator]:
    """Yield a new accelerator. Accelerate keeps one precision per process and refuses a second one, so its state,
    including that of an accelerator of the caller, is set aside and restored at the end."""
    kept = [(state._shared_state, dict(state._shared_state)) for state in (AcceleratorState, GradientState)]
    try:
        for shared, _ in kept:
            shared.clear()
        yield Accelerator(mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.accumulation)
    finally:
        for shared, before in kept:
            shared.clear()
            shared.update(before)


def _train(
    accelerator: Accelerator,
    stage: Stage[ModelT],
    items: Items,
    config: LoopConfig,
    folder: Path,
    description: dict[str, Any] | None,
    resume: Path | None,
    console: Console | None,
    started: Callable[[], None] | None,
) -> TrainingResult[ModelT]:
    if accelerator.num_processes > 1:
        raise RuntimeError(
            f"training runs in one process, but {accelerator.num_processes} were launched: "
            "codebook averages are not exchanged between processes"
        )
    if resume is None and (old := latest_checkpoint(folder / CHECKPOINTS)):
        raise FileExistsError(f"{folder} already holds a run, such as {old.name}: resume it, or choose another folder")
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate does not say so.
        logger.warning("loop.mixed_precision: fp16 needs a GPU; on the CPU everything is computed in float32")
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
    adversary = Adversary(stage, config, accelerator) if isinstance(stage, AdversarialStage) else None
    run = _Run(stage, config, described, model, optimizer, averaged, accelerator.scaler, folder, adversary)
    if resume is not None:
        run.restore(resume, accelerator.device)
    if started is not None:
        started()

    stream = BatchStream(
        items,
        config.batch_size,
        seed=config.seed,
        start=run.step * config.accumulation,
        workers=config.workers,
    )
    batches = iter(stream)
    writer = _Writer(folder / TENSORBOARD, run.step) if config.tensorboard else None
    images_per_step = config.batch_size * config.accumulation
    wrapped.train()
    try:
        with RunProgress(console, stage.name, config.steps, start=run.step) as progress:
            since, counted = time.perf_counter(), run.step
            while run.step < config.steps:
                rate = learning_rate(config.optimizer, run.step, config.steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with run.errors_say_step():
                    terms = _update(accelerator, stage, wrapped, optimizer, batches, config, adversary, run.step)
                run.step += 1
                if averaged is not None:
                    averaged.update(model)
                if run.window and terms.keys() != run.window[-1].keys():
                    run.window.clear()  # an adversary takes part from now on, or no longer
                run.window.append(terms)
                step, last = run.step, run.step == config.steps
                if step % config.log_every == 0 or last:
                    record = run.record(rate)
                    speed = (step - counted) * images_per_step / max(1e-9, time.perf_counter() - since)
                    since, counted = time.perf_counter(), step
                    progress.report(loss=record["loss"], speed=speed, usage=_codes_used(record), more=_logits(record))
                    if adversary is not None:
                        adversary.watch(record)
                    if writer is not None:
                        writer.scalars(record | {"images_per_second": speed}, step)
                progress.update(step)
                if writer is not None and config.image_every and (step % config.image_every == 0 or last):
                    writer.images(_previews(stage, model, averaged), step)
                if config.checkpoint_every and (step % config.checkpoint_every == 0 or last):
                    run.save()
        run.check_finite()
        run.write_history()
    finally:
        if writer is not None:
            writer.close()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # mixed precision had set a `forward` on the model
    result = averaged.model if averaged is not None else model
    return TrainingResult(result.eval(), run.history)


class _Run:
    """State of a run, and its checkpoints."""

    def __init__(
        self,
        stage: Stage[Any],
        config: LoopConfig,
        description: dict[str, Any],
        model: nn.Module,
        optimizer: Any,
        averaged: AveragedWeights[Any] | None,
        scaler: Any,
        folder: Path,
        adversary: Adversary | None,
    ) -> None:
        self._stage, self._config, self._description, self._folder = stage, config, description, folder
        self._model, self._optimizer, self._averaged, self._scaler = model, optimizer, averaged, scaler
        self._adversary = adversary
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.window: deque[dict[str, Tensor]] = deque(maxlen=config.window)

    def state(self) -> dict[str, Any]:
        state = {
            "step": self.step,
            "history": self.history,
            "window": list(self.window),
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "averaged": None if self._averaged is None else self._averaged.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "random": random_states(),
        }
        return state if self._adversary is None else state | {"adversary": self._adversary.state_dict()}

    def restore(self, path: Path, device: torch.device) -> None:
        """Restore a checkpoint of the same run. Raise ValueError for another run's, or a damaged one."""
        state, info = read_state(path, map_location=device)
        changed = check_resumable(info, self._description, path)
        where = str(path / STATE_FILE)
        for name, ours in (
            ("averaged", self._averaged),
            ("scaler", self._scaler),
            ("adversary", self._adversary),
        ):
            if (state[name] is None) != (ours is None):
                raise ValueError(
                    f"{where}: {name}: {'not expected' if ours is None else 'missing'} with these settings"
                )
        # A prior's codebooks come with its tokenizer.
        given = {name: self._model.state_dict()[name].clone() for name in getattr(self._model, "given_later", ())}
        load_tensors(self._model, state["model"], where=f"{where}: model", same_dtype=True)
        for name, tensor in given.items():
            if not torch.equal(tensor, self._model.state_dict()[name]):
                raise ValueError(f"{where}: model: {name} differs from that of the given tokenizer")
        load_optimizer(self._optimizer, state["optimizer"], where=f"{where}: optimizer")
        if self._averaged is not None:
            load_tensors(self._averaged.model, state["averaged"]["model"], where=f"{where}: averaged", same_dtype=True)
            self._averaged.updates = state["averaged"]["updates"]
        if self._scaler is not None:
            load_scaler(self._scaler, state["scaler"], where=f"{where}: scaler")
        if self._adversary is not None:
            self._adversary.restore(state["adversary"], where=f"{where}: adversary")
        self.step, self.history = state["step"], state["history"]
        self.window.extend(state["window"])
        for key, before, now in changed:
            logger.info("%s: '%s' was %s and is %s from now on", path.name, key, before, now)
        # Last, because the code above must not advance the generators afterwards.
        restore_random_states(state["random"])

    def save(self) -> None:
        """Write a checkpoint and the history. Raise FloatingPointError, and write nothing, if its state is not
        finite: good checkpoints would be removed in favour of a useless one."""
        state = self.state()
        checked = ("model", "optimizer", "averaged", "window", "adversary")
        self._refuse_not_finite({name: state.get(name) for name in checked})
        info = {"step": self.step, "stage": self._stage.name, "description": self._description}
        save_checkpoint(self._folder / CHECKPOINTS, self.step, state, info, keep=self._config.keep_checkpoints)
        self.write_history()

    def check_finite(self) -> None:
        """Raise FloatingPointError unless the weights are finite."""
        averaged = None if self._averaged is None else self._averaged.state_dict()
        adversary = None if self._adversary is None else self._adversary.model.state_dict()
        self._refuse_not_finite({"model": self._model.state_dict(), "averaged": averaged, "adversary": adversary})

    def _refuse_not_finite(self, state: dict[str, Any]) -> None:
        name = first_not_finite(dict(tensors_in(state)))
        if name is not None:
            raise FloatingPointError(f"{self._stage.name}: {name} is not finite at step {self.step}; {self._good()}")

    @contextlib.contextmanager
    def errors_say_step(self) -> Iterator[None]:
        """Add the step and the newest good checkpoint to a FloatingPointError."""
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(f"{self._stage.name}: {error} at step {self.step + 1}; {self._good()}") from error

    def _good(self) -> str:
        newest = latest_checkpoint(self._folder / CHECKPOINTS)
        return "no checkpoint was saved before" if newest is None else f"the newest good checkpoint is {newest}"

    def write_history(self) -> None:
        """Write the history to history.csv."""
        if self._config.history_csv:
            names = list(dict.fromkeys(name for record in self.history for name in record))
            text = io.StringIO()
            writer = csv.DictWriter(text, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)
            write_text(self._folder / HISTORY, text.getvalue())

    def record(self, rate: float) -> dict[str, float]:
        """Add a record to the history and return it. Numbers are read back from the device here only."""
        record: dict[str, float] = {"step": self.step, "learning_rate": rate}
        for name in self.window[-1]:
            record[name] = torch.stack([terms[name] for terms in self.window]).mean().item()
        if not all(map(math.isfinite, record.values())):
            raise FloatingPointError(
                f"{self._stage.name}: the loss is not finite at step {self.step}: {record}; {self._good()}"
            )
        for name, values_d in self._stage.usage().items():
            record |= {f"{name}/{self._stage.axis}_{d + 1}": float(value) for d, value in enumerate(values_d.tolist())}
        self.history.append(record)
        return record


def _update(
    accelerator: Accelerator,
    stage: Stage[Any],
    model: nn.Module,
    optimizer: Any,
    batches: Any,
    config: LoopConfig,
    adversary: Adversary | None,
    step: int,
) -> dict[str, Tensor]:
    """Update the weights once from ``accumulation`` batches, then those of an adversary. Return the mean of every
    logged term."""
    sums: dict[str, Tensor] = {}
    if adversary is not None:
        adversary.start(step)
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
            terms = {"loss": result.loss} | result.terms
            if adversary is not None:
                terms |= adversary.learn()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach().float() / config.accumulation
    return sums


def _logits(record: dict[str, float]) -> str:
    """The mean logits of a discriminator in words, "" without one."""
    if "real_logits" not in record:
        return ""
    return f"logits {record['real_logits']:+.2f}/{record['fake_logits']:+.2f}"


def _codes_used(record: dict[str, float]) -> str:
    used = [f"{value:.0f}" for name, value in record.items() if name.startswith("codes_used/")]
    return f"codes {'/'.join(used)}" if used else ""


@torch.no_grad()
def _previews(stage: Stage[Any], model: nn.Module, averaged: AveragedWeights[Any] | None) -> dict[str, Tensor]:
    if averaged is not None:
        return stage.previews(averaged.model)
    # Accelerate's mixed precision is a `forward` set on the instance, which sampling would take for a changed model.
    # Previews are sampled without it, with and without averaged weights.
    forward = model.__dict__.pop("forward", None)
    model.eval()
    try:
        return stage.previews(model)
    finally:
        model.train()
        if forward is not None:
            model.forward = forward


class _Writer:
    """TensorBoard files. Entries that an earlier run wrote for steps after the first one of this run are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with errors_name(folder):
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, record: dict[str, float], step: int) -> None:
        with errors_name(self._folder):
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, step)

    def images(self, sheets: dict[str, Tensor], step: int) -> None:
        with errors_name(self._folder):
            for name, sheet_chw in sheets.items():
                self._writer.add_image(name, sheet_chw, step)

    def close(self) -> None:
        with errors_name(self._folder):
            self._writer.close()
