"""`rqgen demo`: train both stages on handwritten digits, evaluate them and plot the results."""

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
from rqgen.data.grid import is_saved_image
from rqgen.evaluation import EvaluationConfig, Run, evaluate
from rqgen.evaluation.metrics.inpainting import InpaintingOptions, lower_half
from rqgen.evaluation.run import protocol
from rqgen.files import remove_folder, write_json
from rqgen.models import Prior, Tokenizer
from rqgen.models.pretrained import CHECKPOINTS
from rqgen.report import (
    plot_coarse_to_fine,
    plot_code_usage,
    plot_edits,
    plot_losses,
    plot_reconstructions,
    plot_samples,
)
from rqgen.sampling import edit, generate
from rqgen.sampling.pipeline import DESCRIPTION, write_description
from rqgen.systems import DEFAULT, find_system
from rqgen.systems.system import DemoConfig
from rqgen.training import latest_checkpoint

from .check import installed_versions
from .models import check_images_fit
from .outputs import json_with, output_folder
from .runs import check_batch_size, check_prior, fit_prior, fit_tokenizer, sketch_tokenizer
from .settings import RECIPES

logger = logging.getLogger(__name__)

FIGURES = (
    "reconstructions.png",
    "coarse_to_fine.png",
    "code_usage.png",
    "losses.png",
    "samples.png",
    "edits.png",
)
# Held-out digits in reconstructions.png.
SHOWN = 30
# Held-out digits in edits.png.
EDITED = 10
# Held-out digits whose lower half is resampled for the metric.
INPAINTED = 200
# Metrics of metrics.json; those that fit the system are computed.
METRICS = ("reconstruction", "token_prediction", "classifier", "precision", "inpainting")


def load_demo(
    seed: int | None, overrides: Sequence[str] = (), *, system: str = DEFAULT, config: Path | None = None
) -> DemoConfig:
    """Return the settings of the recipes for digits without checkpoints and TensorBoard files, with one seed for both
    trainings and the sampling, changed by ``overrides``. The split does not depend on the seed: figures of different
    seeds show the same held-out digits."""
    parts = ("tokenizer.loop", "prior.loop", "sampling")
    seeds = [] if seed is None else [f"{part}.seed={seed}" for part in parts]
    return load(demo_of(system), config, [*seeds, *overrides], recipes=RECIPES)


def demo_of(system: str) -> type[DemoConfig]:
    """Return the class of a system's demo settings. ValueError for a system without a demo."""
    found = find_system(system).demo
    if found is None:
        raise ValueError(f"--system: expected a system with a demo, got '{system}', which has none")
    return found


def run_demo(config: DemoConfig, out: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Train, sample and evaluate. Write into ``out``: reconstructions.png, coarse_to_fine.png, code_usage.png,
    losses.png, samples.png, metrics.json, and a `rqgen.Pipeline`: tokenizer/, prior/ and pipeline.json; where the prior
    can edit images, also edits.png. Return the content of metrics.json. A demo in the folder is replaced, with a line
    in the log. Checkpoints and logs, if the settings ask for any, go into training/.

    The numbers are those of `rqgen.evaluation.metrics`, of held-out digits and of digits sampled in float32;
    "precisions" also samples in lower precisions. No sample is selected or left out: all are evaluated, and the first
    ten of each class are plotted. Held-out digits train no model, the classifier included."""
    check_demo(config)
    is_metrics = json_with("reconstruction_mse", "versions")
    files = {
        **dict.fromkeys(FIGURES, is_saved_image),
        "metrics.json": is_metrics,
        DESCRIPTION: json_with("class_names"),
    }
    is_ours = is_metrics(out / "metrics.json")
    stages = ("tokenizer", "prior")
    with output_folder(out, "--out", files=files, folders=["training"], models=stages, is_ours=is_ours):
        checkpoints = [out / "training" / stage / CHECKPOINTS for stage in stages]
        if is_ours:
            logger.info("%s: replacing the demo there", out)
            for folder in filter(Path.is_dir, checkpoints):
                remove_folder(folder)
        elif any(latest_checkpoint(folder) for folder in checkpoints):
            raise FileExistsError(
                f"--out: {out / 'training'} holds checkpoints of a demo that did not end, and no demo is resumed: "
                "remove this folder, or choose another --out"
            )
        return _run_demo(config, out, console)


def check_demo(config: DemoConfig) -> None:
    """Raise ValueError for settings with which the demo would fail after a training: before it."""
    check_images_fit(config.tokenizer.data, config.tokenizer.model)
    train, held_out = (digits(config, split) for split in ("train", "held_out"))
    if len(held_out) == 0:
        fraction = config.tokenizer.data.held_out_fraction
        raise ValueError(
            f"tokenizer.data.held_out_fraction: expected a share that holds out at least one image, got {fraction:g}"
        )
    check_batch_size(config.tokenizer.loop, len(train), prefix="tokenizer.")
    vae = sketch_tokenizer(config.tokenizer, train.class_names)
    prior = check_prior(config.prior, vae, train, prefix="prior.")
    if len(train.class_names) < 2:
        raise ValueError(f"tokenizer.data.classes: expected two or more classes, got {len(train.class_names)}")
    if prior.num_classes == 0:
        raise ValueError(
            f"prior.prior.condition: expected class, as samples are evaluated by class, got {prior.condition_kind}"
        )
    try:
        config.sampling.params().resolve(prior, torch.zeros(1, dtype=torch.int64))
    except ValueError as error:
        raise ValueError(f"sampling.{error}") from error


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
    run = run_of(config, vae, prior.model)
    with _timed(seconds, "sampling"):
        samples, _ = run.samples()
    found = evaluate(run, [name for name in METRICS if run.why_not(name) is None])
    held_out = digits(config, "held_out")
    classes = len(held_out.class_names)
    with _timed(seconds, "figures"):
        shown = held_out.images[:SHOWN].to(vae.device)
        plot_reconstructions(shown, vae(shown).reconstruction.detach(), out / "reconstructions.png")
        plot_coarse_to_fine(vae, shown[:10], out / "coarse_to_fine.png")
        plot_code_usage(run.reconstruction.code_counts, out / "code_usage.png", axis=vae.layout.axis)
        plot_losses({"tokenizer": tokenizer.history, "prior": prior.history}, out / "losses.png")
        # Labels run 0, 1, ... 9, 0, ...: the transpose shows a class per row.
        rounds = samples[: 10 * classes].unflatten(0, (-1, classes)).transpose(0, 1)
        plot_samples(
            rounds.flatten(0, 1), out / "samples.png", columns=rounds.shape[1], row_labels=held_out.class_names
        )
        if edits := _edits(run, prior.model, held_out):
            plot_edits(edits, out / "edits.png")
    total = time.perf_counter() - started
    # Metrics that sample images of their own have their own times.
    with_samples = {"precision": "precisions", "inpainting": "inpainting"}
    for name, taken in found.seconds.items():
        part = with_samples.get(name, "evaluation")
        seconds[part] = seconds.get(part, 0.0) + taken
    seconds["total"] = total
    metrics = {
        **_flat(found.results),
        "protocol": protocol(run),
        "samples": config.sampling.count,
        "held_out_images": len(held_out),
        "seconds": {part: round(taken, 2) for part, taken in seconds.items()},
        "seed": config.sampling.seed,
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }
    write_json(out / "metrics.json", metrics)
    return metrics


def run_of(config: DemoConfig, vae: Tokenizer, prior: Prior) -> Run:
    """Return the evaluation of a demo's models by held-out digits and by sampled ones."""
    settings = EvaluationConfig(
        data=config.tokenizer.data,
        sampling=config.sampling,
        batch_size=128,
        options={"inpainting": InpaintingOptions(count=INPAINTED)},
    )
    return Run(settings, tokenizer=vae, prior=prior, generate=generate, edit=edit)


def summary(metrics: dict[str, Any], out: Path) -> str:
    """Return the figures of a demo in a sentence, and the file to look at."""
    return (
        f"held-out reconstruction error {metrics['reconstruction_mse']:.4f}; "
        f"a classifier of real digits recognises {metrics['sample_accuracy']:.1%} of the sampled ones "
        f"and {metrics['classifier_test_accuracy']:.1%} of real held-out ones; "
        f"{metrics['seconds']['total']:.0f} s. Look at {out / 'samples.png'}"
    )


def _flat(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return results under the keys of metrics.json."""
    reconstruction = results["reconstruction"]
    flat = {
        "reconstruction_mse": reconstruction["mse"],
        "codes_used": reconstruction["codes_used"],
        "perplexity": reconstruction["perplexity"],
        **results["classifier"],
        "token_prediction": results["token_prediction"],
        "precisions": results.get("precision"),
        "inpainting": results.get("inpainting"),
    }
    return {name: value for name, value in flat.items() if value is not None}


def _edits(run: Run, prior: Prior, held_out: DigitImages) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return edits of the first held-out digits: the lower half resampled and, if the prior can edit any region, all
    but the middle, and the right half as the next class. Empty for a prior that cannot edit."""
    images, labels = held_out.images[:EDITED].to(prior.device), held_out.labels[:EDITED]
    height, width = images.shape[2:]
    lower, around, right = lower_half(images), torch.ones_like(lower_half(images)), torch.zeros_like(lower_half(images))
    around[height // 4 : -(height // 4), width // 4 : -(width // 4)] = False
    right[:, width // 2 :] = True
    following = (labels + 1) % len(held_out.class_names)
    edits = [("in-painted", lower, labels), ("out-painted", around, labels), ("next class", right, following)]
    possible = edits[: {"nothing": 0, "rows": 1, "regions": 3}[prior.edits]]
    return [(name, images, mask, run.edit(images, mask, wanted).images) for name, mask, wanted in possible]


def digits(config: DemoConfig, split: Split) -> DigitImages:
    """Return the images of one side of the demo's split."""
    dataset = open_dataset(config.tokenizer.data, split)
    assert isinstance(dataset, DigitImages)  # DemoConfig holds this
    return dataset


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started
