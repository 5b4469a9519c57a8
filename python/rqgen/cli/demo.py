"""`rqgen demo`: both stages on handwritten digits, judged and drawn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rqgen.config import check_finite, load, read_yaml
from rqgen.data import DigitImages, Split, open_dataset
from rqgen.evaluation import ImageClassifier, evaluate_precision, evaluate_reconstruction
from rqgen.models import RQVAE, VAR, MultiScaleVQVAE, RQTransformer
from rqgen.report import (
    draw_coarse_to_fine,
    draw_code_usage,
    draw_edits,
    draw_losses,
    draw_reconstructions,
    draw_samples,
)
from rqgen.sampling import EditOutput, edit, generate

from .check import installed_versions
from .runs import (
    PriorRun,
    TokenizerRun,
    VARPriorRun,
    VARTokenizerRun,
    check_images_fit,
    check_one_split,
    find_system,
    fit_prior,
    fit_tokenizer,
    shipped_config,
    write_json,
)

# Held-out digits in reconstructions.png.
SHOWN = 30
# And in edits.png.
EDITED = 10
# And judged with their lower half drawn anew.
INPAINTED = 200


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
        check_finite(self)
        if self.count < 100 or self.count % 10:
            raise ValueError(f"count: expected a multiple of 10, at least 100, got {self.count}")

    def draws(self) -> dict[str, Any]:
        """What `generate` and `edit` take of it alike."""
        names = ("temperature", "top_k", "top_p", "cfg_scale", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass
class DemoConfig:
    """Both training runs, which must read the same split of the same images, and the drawing."""

    tokenizer: TokenizerRun = field(default_factory=TokenizerRun)
    prior: PriorRun = field(default_factory=PriorRun)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_one_split(self.tokenizer.data, self.prior.data)
        if self.tokenizer.data.source != "digits":
            raise ValueError(f"data.source: the demo is about 'digits', got '{self.tokenizer.data.source}'")


@dataclass
class VARDemoConfig(DemoConfig):
    """The same for VAR."""

    tokenizer: VARTokenizerRun = field(default_factory=VARTokenizerRun)
    prior: VARPriorRun = field(default_factory=VARPriorRun)


# Of each system the settings, and the shipped configuration of them.
DEMOS = {"rq": (DemoConfig, "demo"), "var": (VARDemoConfig, "var_demo")}


def load_demo(seed: int, overrides: Sequence[str] = (), *, system: str = "rq") -> DemoConfig:
    """The shipped digits recipes, short of what a demo can do without (checkpoints, TensorBoard files), with
    one seed for both trainings and the drawing; then ``overrides``. The split is not drawn anew: figures of different
    seeds are of the same held-out digits."""
    stages = ("tokenizer", "prior")
    seeds = [f"{stage}.loop.seed={seed}" for stage in stages]
    chosen = find_system(system)
    settings, config = DEMOS[chosen.name]
    return load(
        settings,
        shipped_config(config),
        [*seeds, f"sampling.seed={seed}", *overrides],
        defaults={stage: read_yaml(shipped_config(chosen.config(stage))) for stage in stages},
    )


def run_demo(config: DemoConfig, out: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Trains, draws, judges. Writes into ``out``: reconstructions.png, coarse_to_fine.png, code_usage.png,
    losses.png, samples.png, metrics.json, tokenizer/ and prior/; of a VAR also edits.png. Returns what metrics.json
    holds.

    Of a VAR "inpainting" tells about held-out digits whose lower half was drawn anew, given their label: how many the
    classifier reads as that, and the mean squared error of the upper half after the tokenizer (`EditOutput.decoded`)
    beside that of the same pixels when the tokenizer gets the digit whole.

    Drawn in float32. The shorter precisions that the device has are compared with it: on the codes of held-out
    digits (see `rqgen.evaluation.evaluate_precision`), and by how many of as many drawn digits are recognised.
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
    train_images, held_out = (digits(config, split) for split in ("train", "held_out"))
    classes = len(held_out.class_names)
    with _timed(seconds, "sampling"):
        samples, labels = draw_classes(prior.model, vae, config.sampling, classes)
    with _timed(seconds, "evaluation"):
        quality = evaluate_reconstruction(vae, held_out)
        judge = ImageClassifier().fit(train_images.images, train_images.labels)
        recognised = judge.predict(samples) == labels
    of_the_system = {}
    if isinstance(prior.model, RQTransformer):
        with _timed(seconds, "precisions"):
            of_the_system["precisions"] = _compare_precisions(config, prior.model, vae, held_out, judge)
    else:
        with _timed(seconds, "inpainting"):
            of_the_system["inpainting"] = _judge_inpainting(prior.model, vae, held_out, config.sampling, judge)
    with _timed(seconds, "figures"):
        shown = held_out.images[:SHOWN].to(vae.device)
        draw_reconstructions(shown, vae(shown).reconstruction.detach(), out / "reconstructions.png")
        draw_coarse_to_fine(vae, shown[:10], out / "coarse_to_fine.png")
        draw_code_usage(quality.code_counts, out / "code_usage.png", axis=vae.quantizer.axis)
        draw_losses({"tokenizer": tokenizer.history, "prior": prior.history}, out / "losses.png")
        # Labels run 0, 1, ... 9, 0, ...: the transpose shows a class per row.
        rounds = samples[: 10 * classes].unflatten(0, (-1, classes)).transpose(0, 1)
        draw_samples(rounds.flatten(0, 1), out / "samples.png", columns=rounds.shape[1])
        if isinstance(prior.model, VAR):
            draw_edits(_three_edits(prior.model, vae, held_out, config.sampling), out / "edits.png")
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
    write_json(metrics, out / "metrics.json")
    return metrics


def _compare_precisions(
    config: DemoConfig, prior: RQTransformer, vae: RQVAE, held_out: DigitImages, judge: ImageClassifier
) -> dict[str, Any]:
    codes_nhwd = torch.cat([vae.encode(some.to(vae.device)) for some in held_out.images.split(128)])
    labels = held_out.labels.to(vae.device)
    precisions = {}
    for precision in ("bf16", "int8") if vae.device.type == "cpu" else ("bf16",):
        effect = evaluate_precision(prior, codes_nhwd, labels, precision=precision)
        drawn, wanted = draw_classes(prior, vae, config.sampling, len(held_out.class_names), precision=precision)
        accuracy = (judge.predict(drawn) == wanted).double().mean().item()
        precisions[precision] = {"sample_accuracy": accuracy, **asdict(effect)}
    return precisions


def _judge_inpainting(
    prior: VAR, vae: MultiScaleVQVAE, held_out: DigitImages, config: SamplingConfig, judge: ImageClassifier
) -> dict[str, Any]:
    images, labels = held_out.images[:INPAINTED].to(vae.device), held_out.labels[:INPAINTED]
    lower = _masks(images)[0]
    edited = _edit(prior, vae, images, lower, labels, config)
    whole = torch.cat([vae.decode(vae.encode(some)) for some in images.split(128)])
    kept, own = ((found - images)[:, :, ~lower].double().square().mean().item() for found in (edited.decoded, whole))
    return {
        "images": len(images),
        "accuracy": judge.accuracy(edited.images, labels),
        "kept_mse": kept,
        "tokenizer_mse": own,
    }


def _three_edits(
    prior: VAR, vae: MultiScaleVQVAE, held_out: DigitImages, config: SamplingConfig
) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The first held-out digits with their lower half drawn anew, with all but their middle, and with their right half
    as the next class."""
    images, labels = held_out.images[:EDITED].to(vae.device), held_out.labels[:EDITED]
    lower, around, right = _masks(images)
    following = (labels + 1) % len(held_out.class_names)
    return [
        (name, images, mask, _edit(prior, vae, images, mask, wanted, config).images)
        for name, mask, wanted in (
            ("in-painted", lower, labels),
            ("out-painted", around, labels),
            ("next class", right, following),
        )
    ]


def _masks(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The lower half, all but the middle, the right half."""
    height, width = images.shape[2:]
    lower, around, right = (torch.zeros(height, width, dtype=torch.bool, device=images.device) for _ in range(3))
    lower[height // 2 :] = True
    around[:] = True
    around[height // 4 : -(height // 4), width // 4 : -(width // 4)] = False
    right[:, width // 2 :] = True
    return lower, around, right


def _edit(
    prior: VAR,
    vae: MultiScaleVQVAE,
    images: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    config: SamplingConfig,
) -> EditOutput:
    return edit(
        prior,
        vae,
        images,
        mask,
        labels.to(vae.device),
        **config.draws(),
    )


def draw_classes(
    prior: RQTransformer | VAR,
    vae: RQVAE | MultiScaleVQVAE,
    config: SamplingConfig,
    classes: int,
    *,
    precision: str = "fp32",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``config.count`` images, equally many of every class, and their labels (on the CPU): 0, 1, ... 9, 0, ..."""
    labels = torch.arange(config.count) % classes
    drawn = generate(
        prior,
        vae,
        labels.to(vae.device),
        **config.draws(),
        batch_size=config.batch_size,
        precision=precision,
    )
    return drawn.images, labels


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
