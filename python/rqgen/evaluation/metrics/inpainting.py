"""In-painting of the lower half of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rqgen.config import check_bounds

from . import Metric, Row, register

if TYPE_CHECKING:
    from ..run import Run


@dataclass
class InpaintingOptions:
    """Options of metric "inpainting"."""

    count: int = 200
    """Maximum number of images, chosen at random."""

    def __post_init__(self) -> None:
        check_bounds(self, count=(1, 10**6))


@register
class Inpainting(Metric):
    """In-painting of the lower half of images, given their class: the squared error of the kept upper half after the
    tokenizer, next to the error of the same pixels in a plain reconstruction; and the classifier's accuracy."""

    name = "inpainting"
    options = InpaintingOptions
    needs = ("tokenizer", "prior", "images", "condition", "samples")

    def fits(self, run: Run, options: InpaintingOptions) -> str | None:
        if run.prior.edits == "nothing":
            return f"needs a prior that can edit images, and a {run.prior.model_type} cannot"
        return None

    def compute(self, run: Run, options: InpaintingOptions) -> dict[str, Any]:
        images, labels = run.some(options.count)
        images = images.to(run.tokenizer.device)
        lower = lower_half(images)
        edited = run.edit(images, lower, labels)
        whole = run.decode_encoded(images)
        kept, own = (
            (found - images)[:, :, ~lower].double().square().mean().item() for found in (edited.decoded, whole)
        )
        accuracy = {}
        if run.why_not("classifier") is None:
            accuracy = {"accuracy": run.judge.accuracy(edited.images, labels)}
        return {"images": len(images), **accuracy, "kept_mse": kept, "tokenizer_mse": own}

    def rows(self, result: Mapping[str, Any]) -> Iterable[Row]:
        if "accuracy" in result:
            yield Row("classifier accuracy, edited images", 100 * result["accuracy"], "%", "higher")
        yield Row("squared error, kept half", result["kept_mse"], better="lower")
        yield Row("squared error, same half of a reconstruction", result["tokenizer_mse"])


def lower_half(images: torch.Tensor) -> torch.Tensor:
    """Return the mask of the lower half of images, bool (H, W)."""
    height, width = images.shape[2:]
    mask = torch.zeros(height, width, dtype=torch.bool, device=images.device)
    mask[height // 2 :] = True
    return mask
