"""RQ-VAE and RQ-Transformer on the command line."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.console import Console

from rqgen.config import Given
from rqgen.data import EncodedImages, ImageDataset, TensorItems
from rqgen.models import RQVAE, RQTransformer, RQVAEConfig
from rqgen.training import PriorConfig, PriorStage, prior_data

from .system import DemoConfig, PriorRun, System, TokenizerRun, feature_side, preview_samples

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
    """The prior and its targets."""


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


SYSTEM = System(
    name="rq",
    tokenizer=RQVAE,
    prior=RQTransformer,
    tokenizer_run=RQTokenizerRun,
    prior_run=RQPriorRun,
    prior_stage=_prior_stage,
    demo=RQDemo,
)
