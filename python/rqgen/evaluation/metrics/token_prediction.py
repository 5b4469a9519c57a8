"""Negative log-likelihood and error rate of a prior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..token_prediction import TokenPrediction, evaluate_token_prediction
from . import Metric, Row, register

if TYPE_CHECKING:
    from ..run import Run


@register
class Prediction(Metric):
    """The negative log-likelihood and the error rate of a prior that predicts each code given the true codes before it:
    over all codes, and for each depth or scale."""

    name = "token_prediction"
    needs = ("tokenizer", "prior", "images", "condition")

    def compute(self, run: Run, options: None) -> TokenPrediction:
        return evaluate_token_prediction(run.prior, run.tokenizer, run.images, batch_size=run.settings.batch_size)

    def rows(self, result: Mapping[str, Any]) -> Iterable[Row]:
        return [
            Row("loss", result["loss"], "nats per code", "lower"),
            Row("loss by level", result["level_losses"], "nats per code", "lower"),
            Row("error rate", 100 * result["error_rate"], "%", "lower"),
            Row("error rate by level", [100 * rate for rate in result["level_error_rates"]], "%", "lower"),
        ]
