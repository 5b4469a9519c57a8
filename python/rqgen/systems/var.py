"""Multi-scale VQ-VAE and VAR on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor

from rqgen.config import Given
from rqgen.data import EncodedImages, ImageDataset, TensorItems
from rqgen.models import VAR, MultiScaleVQVAE, MultiScaleVQVAEConfig
from rqgen.quantizers.multiscale import scales_up_to
from rqgen.sampling import EditOutput, edit
from rqgen.training import CodesStage, VARPriorConfig, code_items

from .system import DemoConfig, DemoModels, PriorRun, System, TokenizerRun, feature_side, preview_samples

# Held-out digits in edits.png.
EDITED = 10
# And judged with their lower half sampled anew.
INPAINTED = 200


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
    """The prior, and what it learns."""


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


def judge_inpainting(models: DemoModels) -> dict[str, Any]:
    """Held-out digits whose lower half is sampled anew, given their label: how many the classifier reads as that, and
    the mean squared error of the upper half after the tokenizer (`EditOutput.decoded`) beside that of the same pixels
    when the tokenizer gets the digit whole. Writes edits.png: the first digits with their lower half sampled anew, with
    all but their middle, and with their right half as the next class."""
    from rqgen.report import plot_edits  # waits for matplotlib

    vae, held_out = models.vae, models.held_out
    images, labels = held_out.images[:INPAINTED].to(vae.device), held_out.labels[:INPAINTED]
    lower, around, right = _masks(images)
    edited = _edit(models, images, lower, labels)
    whole = torch.cat([vae.decode(vae.encode(some)) for some in images.split(128)])
    kept, own = ((found - images)[:, :, ~lower].double().square().mean().item() for found in (edited.decoded, whole))
    shown, wanted = images[:EDITED], labels[:EDITED]
    following = (wanted + 1) % len(held_out.class_names)
    edits = [
        (name, shown, mask, _edit(models, shown, mask, label).images)
        for name, mask, label in (
            ("in-painted", lower, wanted),
            ("out-painted", around, wanted),
            ("next class", right, following),
        )
    ]
    plot_edits(edits, models.out / "edits.png")
    return {
        "images": len(images),
        "accuracy": models.judge.accuracy(edited.images, labels),
        "kept_mse": kept,
        "tokenizer_mse": own,
    }


def _masks(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lower half, all but the middle, the right half."""
    height, width = images.shape[2:]
    lower, around, right = (torch.zeros(height, width, dtype=torch.bool, device=images.device) for _ in range(3))
    lower[height // 2 :] = True
    around[:] = True
    around[height // 4 : -(height // 4), width // 4 : -(width // 4)] = False
    right[:, width // 2 :] = True
    return lower, around, right


def _edit(models: DemoModels, images: Tensor, mask: Tensor, labels: Tensor) -> EditOutput:
    params = models.config.sampling.params()
    return edit(models.prior, models.vae, images, mask, labels.to(models.vae.device), params=params)


SYSTEM = System(
    name="var",
    tokenizer=MultiScaleVQVAE,
    prior=VAR,
    tokenizer_run=VARTokenizerRun,
    prior_run=VARPriorRun,
    prior_stage=_prior_stage,
    demo=VARDemo,
    demo_parts={"inpainting": judge_inpainting},
)
