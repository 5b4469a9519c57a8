"""`rqgen demo`: both stages on handwritten digits, judged and shown."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rqgen.config import load
from rqgen.data import DigitImages, Split, open_dataset
from rqgen.evaluation import ImageClassifier, evaluate_reconstruction
from rqgen.files import claim_folder, write_json
from rqgen.models.pretrained import check_replaceable
from rqgen.report import plot_coarse_to_fine, plot_code_usage, plot_losses, plot_reconstructions, plot_samples
from rqgen.sampling.pipeline import write_description
from rqgen.systems import DEFAULT, find_system, system_of
from rqgen.systems.system import DemoConfig, DemoModels

from .check import installed_versions
from .runs import check_images_fit, fit_prior, fit_tokenizer
from .settings import RECIPES

logger = logging.getLogger(__name__)

# Held-out digits in reconstructions.png.
SHOWN = 30


def load_demo(
    seed: int | None, overrides: Sequence[str] = (), *, system: str = DEFAULT, config: Path | None = None
) -> DemoConfig:
    """The shipped digits recipes, short of what a demo can do without (checkpoints, TensorBoard files), with
    one seed for both trainings and the sampling; then ``overrides``. The split is not drawn anew: figures of different
    seeds are of the same held-out digits."""
    parts = ("tokenizer.loop", "prior.loop", "sampling")
    seeds = [] if seed is None else [f"{part}.seed={seed}" for part in parts]
    return load(demo_of(system), config, [*seeds, *overrides], recipes=RECIPES)


def demo_of(system: str) -> type[DemoConfig]:
    """The demo's settings of a system. ValueError where it has no demo."""
    found = find_system(system).demo
    if found is None:
        raise ValueError(f"--system: expected a system with a demo, got '{system}', which has none")
    return found


def run_demo(config: DemoConfig, out: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Trains, samples, judges. Writes into ``out``: reconstructions.png, coarse_to_fine.png, code_usage.png,
    losses.png, samples.png, metrics.json, and a `rqgen.Pipeline`: tokenizer/, prior/ and pipeline.json; what else a
    system writes and measures say its `System.demo_parts`. Returns what metrics.json holds. A demo that is there
    already is replaced, and said so. Checkpoints and logs, where the settings ask for any, go into training/.

    Sampled in float32. No sample is chosen or left out: all that are sampled are judged, and the first ten of each
    class are shown. Held-out digits train nothing, the classifier included.
    """
    check_images_fit(config.tokenizer.data, config.tokenizer.model)
    with claim_folder(out):
        for stage in ("tokenizer", "prior"):
            check_replaceable(out / stage)
        if (out / "metrics.json").exists():
            logger.info("%s: replacing the demo there", out)
        return _run_demo(config, out, console)


def _run_demo(config: DemoConfig, out: Path, console: Console | None) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    with _timed(seconds, "tokenizer"):
        tokenizer = fit_tokenizer(config.tokenizer, out / "training" / "tokenizer", console=console)
        vae = tokenizer.model
        vae.save_pretrained(out / "tokenizer")
    with _timed(seconds, "prior"):
        prior = fit_prior(config.prior, vae, out / "training" / "prior", console=console)
        prior.model.save_pretrained(out / "prior")
        write_description(out, prior.model.class_names)
    train_images, held_out = (digits(config, split) for split in ("train", "held_out"))
    classes = len(held_out.class_names)
    judge = ImageClassifier()
    models = DemoModels(config, prior.model, vae, held_out, judge, out)
    with _timed(seconds, "sampling"):
        samples, labels = models.sample_classes()
    with _timed(seconds, "evaluation"):
        quality = evaluate_reconstruction(vae, held_out)
        judge.fit(train_images.images, train_images.labels)
        recognised = judge.predict(samples) == labels
    of_the_system = {}
    for name, part in system_of(config.tokenizer).demo_parts.items():
        with _timed(seconds, name):
            of_the_system[name] = part(models)
    with _timed(seconds, "figures"):
        shown = held_out.images[:SHOWN].to(vae.device)
        plot_reconstructions(shown, vae(shown).reconstruction.detach(), out / "reconstructions.png")
        plot_coarse_to_fine(vae, shown[:10], out / "coarse_to_fine.png")
        plot_code_usage(quality.code_counts, out / "code_usage.png", axis=vae.layout.axis)
        plot_losses({"tokenizer": tokenizer.history, "prior": prior.history}, out / "losses.png")
        # Labels run 0, 1, ... 9, 0, ...: the transpose shows a class per row.
        rounds = samples[: 10 * classes].unflatten(0, (-1, classes)).transpose(0, 1)
        plot_samples(
            rounds.flatten(0, 1), out / "samples.png", columns=rounds.shape[1], row_labels=held_out.class_names
        )
    seconds["total"] = time.perf_counter() - started
    metrics = {
        "reconstruction_mse": quality.mse,
        "codes_used": quality.codes_used,
        "perplexity": quality.perplexity,
        "classifier_test_accuracy": judge.accuracy(held_out.images, held_out.labels),
        "sample_accuracy": recognised.double().mean().item(),
        "sample_accuracy_per_class": [recognised[labels == label].double().mean().item() for label in range(classes)],
        **of_the_system,
        "samples": config.sampling.count,
        "held_out_images": len(held_out),
        "seconds": {part: round(taken, 2) for part, taken in seconds.items()},
        "seed": config.sampling.seed,
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }
    write_json(out / "metrics.json", metrics)
    return metrics


def digits(config: DemoConfig, split: Split) -> DigitImages:
    """The images of one side of the demo's split."""
    dataset = open_dataset(config.tokenizer.data, split)
    assert isinstance(dataset, DigitImages)  # DemoConfig holds this
    return dataset


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started
