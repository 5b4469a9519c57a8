"""Effect of a shorter precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rqgen.checks import check_choices
from rqgen.config import check_bounds

from ..precision import evaluate_precision
from . import Metric, Row, register

if TYPE_CHECKING:
    from ..run import Run


@dataclass
class PrecisionOptions:
    """Options of metric "precision"."""

    precisions: list[Literal["bf16", "int8"]] | None = None
    """The precisions to compare with fp32 (None: bf16, and on a CPU int8)."""
    samples: bool = True
    """Also sample in each precision, if metric "classifier" fits."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.precisions is not None:
            check_choices(self.precisions, "precisions")


@register
class Precision(Metric):
    """The effect of bf16 and int8 on a prior: KL(fp32 || precision) of the next code and the share of likeliest codes
    that stay the same, for each depth; and the classifier's accuracy on samples."""

    name = "precision"
    options = PrecisionOptions
    needs = ("tokenizer", "prior", "images", "condition")

    def fits(self, run: Run, options: PrecisionOptions) -> str | None:
        wanted = ["bf16"] if options.precisions is None else options.precisions
        if missing := [name for name in wanted if name not in run.prior.precisions]:
            return f"needs a prior that can be sampled in {missing[0]}, and a {run.prior.model_type} cannot"
        if "int8" in wanted and run.prior.device.type != "cpu":
            return 'needs a prior on the CPU for precision "int8"'
        return None

    def compute(self, run: Run, options: PrecisionOptions) -> dict[str, Any]:
        names = options.precisions
        if names is None:
            names = ["bf16", "int8"] if run.prior.device.type == "cpu" else ["bf16"]
        codes, labels = run.codes
        judged = options.samples and run.why_not("classifier") is None
        found: dict[str, Any] = {}
        for name in names:
            effect = evaluate_precision(run.prior, codes, run.condition(labels), precision=name)
            found[name] = asdict(effect)
            if judged:
                found[name]["sample_accuracy"] = run.judge.accuracy(*run.samples(name))
        return found

    def rows(self, result: Mapping[str, Any]) -> Iterable[Row]:
        for name, effect in result.items():
            yield Row(f"{name}: KL(fp32 || {name}) by depth", effect["kl"], "nats per code", "lower")
            share = [100 * same for same in effect["same_likeliest"]]
            yield Row(f"{name}: same likeliest code by depth", share, "%", "higher")
            if "sample_accuracy" in effect:
                yield Row(f"{name}: classifier accuracy, samples", 100 * effect["sample_accuracy"], "%", "higher")
