"""Reconstruction error of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import Metric, Row, register

if TYPE_CHECKING:
    from ..run import Run


@register
class Reconstruction(Metric):
    """The mean squared error of images after encoding and decoding, and the number of codes in use at each depth or
    scale, with their perplexity."""

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
