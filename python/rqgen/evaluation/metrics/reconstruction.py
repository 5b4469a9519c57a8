"""What a tokenizer keeps of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import Metric, Row, register

if TYPE_CHECKING:
    from ..run import Run


@register
class Reconstruction(Metric):
    """The error of images after encoding and decoding, and how many codes each depth or scale uses."""

    name = "reconstruction"
    needs = ("tokenizer", "images")

    def compute(self, run: Run, options: None) -> dict[str, Any]:
        quality = run.reconstruction
        return {"mse": quality.mse, "codes_used": quality.codes_used, "perplexity": quality.perplexity}

    def rows(self, result: Mapping[str, Any]) -> Iterable[Row]:
        return [
            Row("mean squared error, images in [-1, 1]", result["mse"], better="lower"),
            Row("codes used", result["codes_used"], better="higher"),
            Row("perplexity of codes", result["perplexity"], better="higher"),
        ]
