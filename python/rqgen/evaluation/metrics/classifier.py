"""Classifier accuracy of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rqgen.config import check_bounds

from . import Metric, Row, register

if TYPE_CHECKING:
    from ..run import Run


@dataclass
class ClassifierOptions:
    """Options of metric "classifier"."""

    side: int = 8
    """Side in pixels to which the classifier's images are averaged; must divide data.resolution."""
    training_images: int = 10000
    """Maximum number of training images for the classifier, chosen at random."""

    def __post_init__(self) -> None:
        check_bounds(self, side=(1, 512), training_images=(2, 10**6))


@register
class SampleAccuracy(Metric):
    """The accuracy of a classifier on samples, with the class they were conditioned on as the truth, and on real
    images. The classifier, a support vector machine on few pixels, is trained on the training images."""

    name = "classifier"
    options = ClassifierOptions
    needs = ("labels", "samples", "classes")

    def fits(self, run: Run, options: ClassifierOptions) -> str | None:
        side = run.data.resolution
        if side % options.side:
            return f"needs images whose side is a multiple of classifier.side, {options.side}, and it is {side}"
        return None

    def compute(self, run: Run, options: ClassifierOptions) -> dict[str, Any]:
        samples, labels = run.samples()
        right = run.judge.predict(samples) == labels
        per_class = [right[labels == label].double() for label in range(len(run.class_names))]
        return {
            "sample_accuracy": right.double().mean().item(),
            "sample_accuracy_per_class": [some.mean().item() if len(some) else None for some in per_class],
            "classifier_test_accuracy": run.judge.accuracy(*run.thumbnails(run.images, options.side)),
        }

    def rows(self, result: Mapping[str, Any]) -> Iterable[Row]:
        return [
            Row("classifier accuracy, samples", 100 * result["sample_accuracy"], "%", "higher"),
            Row("classifier accuracy, real images", 100 * result["classifier_test_accuracy"], "%"),
        ]
