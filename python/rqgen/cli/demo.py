"""`rqgen demo`: both stages on handwritten digits, judged and drawn."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rqgen.config import load, read_yaml
from rqgen.data import DigitImages, Split, open_dataset
from rqgen.evaluation import ImageClassifier, evaluate_reconstruction
from rqgen.report import draw_coarse_to_fine, draw_code_usage, draw_losses, draw_reconstructions, draw_samples
from rqgen.sampling import generate

from .check import installed_versions
from .runs import PriorRun, TokenizerRun, check_images_fit, fit_prior, fit_tokenizer, shipped_config

# Held-out digits in reconstructions.png.
SHOWN = 30


@dataclass
class SamplingConfig:
    """How the judged images are drawn."""

    count: int = 500
    """Equally many of every class."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    cfg_scale: float | None = None
    batch_size: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 100 or self.count % 10:
            raise ValueError(f"count: expected a multiple of 10, at least 100, got {self.count}")


@dataclass
class DemoConfig:
    """Both training runs, which must read the same split of the same images, and the drawing."""

    tokenizer: TokenizerRun = field(default_factory=TokenizerRun)
    prior: PriorRun = field(default_factory=PriorRun)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.tokenizer.data != self.prior.data:
            raise ValueError("prior.data: expected the same settings as tokenizer.data: one split for both")
        if self.tokenizer.data.source != "digits":
            raise ValueError(f"data.source: the demo is about 'digits', got '{self.tokenizer.data.source}'")


def load_demo(seed: int, overrides: Sequence[str] = ()) -> DemoConfig:
    """The shipped digits recipes, short of what a demo can do without (checkpoints, TensorBoard files), with
    one seed for both trainings and the drawing; then ``overrides``. The split is not drawn anew: figures of different
    seeds are of the same held-out digits."""
    stages = ("tokenizer", "prior")
    seeds = [f"{stage}.loop.seed={seed}" for stage in stages]
    return load(
        DemoConfig,
        shipped_config("demo"),
        [*seeds, f"sampling.seed={seed}", *overrides],
        defaults={stage: read_yaml(shipped_config(f"digits_{stage}")) for stage in stages},
    )


def run_demo(config: DemoConfig, out: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Trains, draws, judges. Writes into ``out``: reconstructions.png, coarse_to_fine.png, code_usage.png,
    losses.png, samples.png, metrics.json, tokenizer/ and prior/. Returns what metrics.json holds.

    No sample is chosen or left out: all that are drawn are judged, and the first ten of each class are shown.
    Held-out digits train nothing, the classifier included.
    """
    check_images_fit(config.tokenizer.data, config.tokenizer.model)
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    with _timed(seconds, "tokenizer"):
        tokenizer = fit_tokenizer(config.tokenizer, out, console=console)
        vae = tokenizer.model
        vae.save_pretrained(out / "tokenizer")
    with _timed(seconds, "prior"):
        prior = fit_prior(config.prior, vae, out, console=console)
        prior.model.save_pretrained(out / "prior")
    train_images, held_out = (_digits(config, split) for split in ("train", "held_out"))
    classes = len(held_out.class_names)
    with _timed(seconds, "sampling"):
        labels = torch.arange(config.sampling.count, device=vae.device) % classes
        samples = generate(
            prior.model,
            vae,
            labels,
            temperature=config.sampling.temperature,
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
            cfg_scale=config.sampling.cfg_scale,
            seed=config.sampling.seed,
            batch_size=config.sampling.batch_size,
        ).images
    with _timed(seconds, "evaluation"):
        quality = evaluate_reconstruction(vae, held_out)
        judge = ImageClassifier().fit(train_images.images, train_images.labels)
        recognised = judge.predict(samples) == labels.cpu()
    with _timed(seconds, "figures"):
        shown = held_out.images[:SHOWN].to(vae.device)
        draw_reconstructions(shown, vae(shown).reconstruction.detach(), out / "reconstructions.png")
        draw_coarse_to_fine(vae, shown[:10], out / "coarse_to_fine.png")
        draw_code_usage(quality.code_counts, out / "code_usage.png")
        draw_losses({"tokenizer": tokenizer.history, "prior": prior.history}, out / "losses.png")
        # Labels run 0, 1, ... 9, 0, ...: the transpose shows a class per row.
        rounds = samples[: 10 * classes].unflatten(0, (-1, classes)).transpose(0, 1)
        draw_samples(rounds.flatten(0, 1), out / "samples.png", columns=rounds.shape[1])
    seconds["total"] = time.perf_counter() - started
    metrics = {
        "reconstruction_mse": quality.mse,
        "codes_used": quality.codes_used,
        "perplexity": quality.perplexity,
        "classifier_test_accuracy": judge.accuracy(held_out.images, held_out.labels),
        "sample_accuracy": recognised.double().mean().item(),
        "sample_accuracy_per_class": [
            recognised[labels.cpu() == label].double().mean().item() for label in range(classes)
        ],
        "samples": config.sampling.count,
        "held_out_images": len(held_out),
        "seconds": {part: round(taken, 2) for part, taken in seconds.items()},
        "seed": config.sampling.seed,
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }
    _write_json(metrics, out / "metrics.json")
    return metrics


def _digits(config: DemoConfig, split: Split) -> DigitImages:
    dataset = open_dataset(config.tokenizer.data, split)
    assert isinstance(dataset, DigitImages)  # DemoConfig holds this
    return dataset


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
