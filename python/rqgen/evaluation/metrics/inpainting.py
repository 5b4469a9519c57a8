"""What becomes of an image whose lower half is drawn anew."""

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
    """At most so many images."""

    def __post_init__(self) -> None:
        check_bounds(self, count=(1, 10**6))


@register
class Inpainting(Metric):
    """Images whose lower half is drawn anew, given their label: the error of the upper half after the tokenizer, beside
    that of the same pixels when the tokenizer gets the image whole; and how many are read as their class."""

    name = "inpainting"
    options = InpaintingOptions
    needs = ("tokenizer", "prior", "images", "condition", "samples")

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
            yield Row("edited images read as their class", 100 * result["accuracy"], "%", "higher")
        yield Row("squared error of the kept half", result["kept_mse"], better="lower")
        yield Row("of the same half in the whole image", result["tokenizer_mse"])


def lower_half(images: torch.Tensor) -> torch.Tensor:
    """The mask of the lower half of images, bool (H, W)."""
    height, width = images.shape[2:]
    mask = torch.zeros(height, width, dtype=torch.bool, device=images.device)
    mask[height // 2 :] = True
    return mask
