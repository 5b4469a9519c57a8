"""Multi-scale VQ-VAE and VAR on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.console import Console

from rqgen.config import Given
from rqgen.data import EncodedImages, ImageDataset, TensorItems
from rqgen.models import VAR, MultiScaleVQVAE, MultiScaleVQVAEConfig
from rqgen.quantizers.multiscale import scales_up_to
from rqgen.training import CodesStage, VARPriorConfig, code_items

from .system import DemoConfig, PriorRun, System, TokenizerRun, feature_side, preview_samples


@dataclass
class VARTokenizerRun(TokenizerRun):
    """`rqgen train tokenizer --system var`."""

    recipe: ClassVar[str | None] = "digits_var_tokenizer"
    model: MultiScaleVQVAEConfig = field(default_factory=MultiScaleVQVAEConfig)
    """The tokenizer."""

    @classmethod
    def implied(cls, given: Given[Any]) -> dict[str, Any]:
        """The model takes images as ``data`` has them; token maps are those published for the next larger images."""
        data = given.read("data")
        implied: dict[str, Any] = {"image_channels": data.channels}
        if not given.has("model.quantizer.scales"):
            side = feature_side(given, data)
            try:
                implied["quantizer"] = {"scales": scales_up_to(side)}
            except ValueError as error:
                raise given.error(
                    "data.resolution", f"{data.resolution} needs model.quantizer.scales: {error}"
                ) from error
        return {"model": implied}


@dataclass
class VARPriorRun(PriorRun):
    """`rqgen train prior --system var`."""

    recipe: ClassVar[str | None] = "digits_var_prior"
    prior: VARPriorConfig = field(default_factory=VARPriorConfig)
    """The prior and its targets."""


@dataclass
class VARDemo(DemoConfig):
    """`rqgen demo --system var`."""

    recipe: ClassVar[str | None] = "var_demo"
    tokenizer: VARTokenizerRun = field(default_factory=VARTokenizerRun)
    """Stage 1."""
    prior: VARPriorRun = field(default_factory=VARPriorRun)
    """Stage 2; ``prior.data`` follows ``tokenizer.data``, and ``prior.tokenizer`` is not read."""


def _prior_stage(
    run: VARPriorRun, vae: MultiScaleVQVAE, source: ImageDataset | EncodedImages, console: Console | None
) -> tuple[CodesStage, ImageDataset | TensorItems]:
    items = code_items(vae, source, cache=run.prior.cache_codes, batch_size=run.loop.batch_size, console=console)
    prior = run.prior.build(vae, len(source.class_names), source.class_names)
    return CodesStage(prior, vae, preview=preview_samples), items


SYSTEM = System(
    name="var",
    tokenizer=MultiScaleVQVAE,
    prior=VAR,
    tokenizer_run=VARTokenizerRun,
    prior_run=VARPriorRun,
    prior_stage=_prior_stage,
    demo=VARDemo,
)
