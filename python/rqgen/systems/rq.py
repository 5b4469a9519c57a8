"""RQ-VAE and RQ-Transformer on the command line."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from rich.console import Console

from rqgen.config import Given
from rqgen.data import EncodedImages, ImageDataset, TensorItems
from rqgen.models import RQVAE, RQTransformer, RQVAEConfig
from rqgen.training import PriorConfig, PriorStage, prior_data

from .system import DemoConfig, DemoModels, PriorRun, System, TokenizerRun, feature_side, preview_samples

logger = logging.getLogger(__name__)


@dataclass
class RQTokenizerRun(TokenizerRun):
    """`rqgen train tokenizer`."""

    recipe: ClassVar[str | None] = "digits_tokenizer"
    model: RQVAEConfig = field(default_factory=RQVAEConfig)
    """The tokenizer."""

    @classmethod
    def implied(cls, given: Given[Any]) -> dict[str, Any]:
        """The model takes images as ``data`` has them."""
        data = given.read("data")
        implied = {"image_channels": data.channels}
        if not given.has("model.resolution"):
            feature_side(given, data)
            implied["resolution"] = data.resolution
        return {"model": implied}


@dataclass
class RQPriorRun(PriorRun):
    """`rqgen train prior`."""

    recipe: ClassVar[str | None] = "digits_prior"
    prior: PriorConfig = field(default_factory=PriorConfig)
    """The prior, and what it learns."""


@dataclass
class RQDemo(DemoConfig):
    """`rqgen demo`."""

    recipe: ClassVar[str | None] = "demo"
    tokenizer: RQTokenizerRun = field(default_factory=RQTokenizerRun)
    """Stage 1."""
    prior: RQPriorRun = field(default_factory=RQPriorRun)
    """Stage 2; ``prior.data`` follows ``tokenizer.data``, and ``prior.tokenizer`` is not read."""


def _prior_stage(
    run: RQPriorRun, vae: RQVAE, source: ImageDataset | EncodedImages, console: Console | None
) -> tuple[PriorStage, ImageDataset | TensorItems]:
    prepared = prior_data(run.prior, vae, source, batch_size=run.loop.batch_size, console=console)
    if prepared.tau is not None:
        logger.info("temperature of soft labels: %.4g", prepared.tau)
    stage = PriorStage(
        run.prior.build(vae, len(source.class_names), source.class_names),
        vae,
        run.prior,
        kind=prepared.kind,
        tau=prepared.tau,
        seed=run.loop.seed,
        preview=preview_samples,
    )
    return stage, prepared.items


def compare_precisions(models: DemoModels) -> dict[str, Any]:
    """The shorter precisions that the device has beside float32: on the codes of held-out digits (see
    `rqgen.evaluation.evaluate_precision`), and by how many of as many sampled digits are recognised."""
    from rqgen.evaluation import evaluate_precision  # waits for scikit-learn

    vae, held_out = models.vae, models.held_out
    codes_nhwd = torch.cat([vae.encode(some.to(vae.device)) for some in held_out.images.split(128)])
    labels = held_out.labels.to(vae.device)
    precisions = {}
    for precision in ("bf16", "int8") if vae.device.type == "cpu" else ("bf16",):
        effect = evaluate_precision(models.prior, codes_nhwd, labels, precision=precision)
        sampled, wanted = models.sample_classes(precision=precision)
        accuracy = (models.judge.predict(sampled) == wanted).double().mean().item()
        precisions[precision] = {"sample_accuracy": accuracy, **asdict(effect)}
    return precisions


SYSTEM = System(
    name="rq",
    tokenizer=RQVAE,
    prior=RQTransformer,
    tokenizer_run=RQTokenizerRun,
    prior_run=RQPriorRun,
    prior_stage=_prior_stage,
    demo=RQDemo,
    demo_parts={"precisions": compare_precisions},
)
