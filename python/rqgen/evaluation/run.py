"""Models and images under evaluation, and the one way to run all metrics on them."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rqgen.config import to_dict
from rqgen.data import DataConfig, ImageDataset, open_dataset
from rqgen.data.codes import Codes
from rqgen.models.classes import number_of_classes
from rqgen.models.pair import check_tokenizer

from .classifier import ImageClassifier
from .metrics import METRICS, Need, Row
from .reconstruction import ReconstructionQuality, evaluate_reconstruction
from .settings import EvaluationConfig

logger = logging.getLogger(__name__)


class Run:
    """A tokenizer, a prior, or both, and the images to judge them by. What several metrics need is made once.

    Args:
        settings: which images, and how samples are drawn.
        tokenizer, prior: on one device; put into eval mode.
        generate, edit: `rqgen.generate` and `rqgen.edit`, for metrics of samples (this room stands beside theirs).
        no_images: where ``settings.data`` says nothing, why.

    Raises:
        ValueError: the prior is of another tokenizer.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        *,
        tokenizer: Any = None,
        prior: Any = None,
        generate: Callable[..., Any] | None = None,
        edit: Callable[..., Any] | None = None,
        no_images: str | None = None,
    ) -> None:
        if tokenizer is not None and prior is not None:
            check_tokenizer(prior, tokenizer)
        for model in (tokenizer, prior):
            if model is not None:
                model.eval()
        self.settings, self.tokenizer, self.prior = settings, tokenizer, prior
        self._generate, self._edit, self._no_images = generate, edit, no_images
        self._samples: dict[str, tuple[Tensor, Tensor]] = {}

    # --- what there is

    @property
    def data(self) -> DataConfig:
        return self.settings.data

    def lacks(self, *needs: Need) -> str | None:
        """The first of some needs that is not met, in words; None where all are.

        - "tokenizer", "prior": that model.
        - "images": at least one image to judge by.
        - "labels": they have labels, of two classes or more.
        - "condition": the prior knows the images' classes, or needs none.
        - "classes": the prior knows the images' classes.
        - "samples": images can be drawn.
        """
        for need in needs:
            reason = getattr(self, f"_lacks_{need}")()
            if reason is not None:
                return reason
        return None

    def why_not(self, metric: str) -> str | None:
        """What keeps a metric from being computed; None where nothing does."""
        entry = METRICS.find(metric, "metric")
        return self.lacks(*entry.needs) or entry.fits(self, self.options(metric))

    def options(self, metric: str) -> Any:
        """The options of a metric; None where it has none."""
        return self.settings.options.get(metric)

    def _lacks_tokenizer(self) -> str | None:
        return "needs a tokenizer" if self.tokenizer is None else None

    def _lacks_prior(self) -> str | None:
        return "needs a prior" if self.prior is None else None

    def _lacks_images(self) -> str | None:
        if self._no_images is not None:
            return f"needs images: {self._no_images}"
        if len(self.images) == 0:
            fraction = self.data.held_out_fraction
            return f"needs images, but split={self.settings.split} has none (data.held_out_fraction={fraction:.4g})"
        return None

    def _lacks_labels(self) -> str | None:
        if (reason := self._lacks_images()) is not None:
            return reason
        if len(self.class_names) < 2:
            return f"needs images with labels, of two classes at least; they have {len(self.class_names) or 'none'}"
        return None

    def _lacks_condition(self) -> str | None:
        reason = self._lacks_prior() or self._lacks_images()
        if reason is not None or _condition_kind(self.prior) == "none":
            return reason
        if _condition_kind(self.prior) != "class":
            return f"needs a prior of classes or without a condition; this one takes {_condition_kind(self.prior)}"
        if not self.class_names and self.prior.config.has_null_condition:
            return None
        return self._lacks_classes()

    def _lacks_classes(self) -> str | None:
        reason = self._lacks_prior() or self._lacks_images()
        if reason is not None:
            return reason
        classes, theirs = number_of_classes(self.prior), self.prior.config.class_names
        if classes == 0:
            return "needs a prior of classes, and this one has none"
        if len(self.class_names) != classes or (theirs and tuple(theirs) != tuple(self.class_names)):
            ours, named = ", ".join(self.class_names[:10]), ", ".join(theirs[:10])
            known = f"{classes} classes" + (f" ({named})" if named else "")
            return f"needs images of the prior's classes; it knows {known}, they have {ours or 'none'}"
        return None

    def _lacks_samples(self) -> str | None:
        reason = self._lacks_tokenizer() or self._lacks_prior()
        if reason is None and _condition_kind(self.prior) not in ("none", "class"):
            reason = f"needs samples, and this prior takes {_condition_kind(self.prior)} to draw any"
        if reason is None and (self._generate is None or self._edit is None):
            reason = "needs samples: give the run generate=rqgen.generate and edit=rqgen.edit"
        return reason

    # --- images

    @functools.cached_property
    def images(self) -> ImageDataset:
        """The images to judge by, as they are."""
        return self._open(self.settings.split, self.settings.images)

    def _open(self, split: Any, most: int | None) -> ImageDataset:
        images = open_dataset(replace(self.data, horizontal_flip=False, shift=0), split)
        return images if most is None or len(images) <= most else _Some(images, most, self.data.split_seed)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    def some(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """At most ``count`` of the images, chosen at random (None: all), (N, channels, H, W), and their labels (N,); on
        the CPU."""
        few = count is not None and count < len(self.images)
        return _stacked(_Some(self.images, count, self.data.split_seed) if few else self.images)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All images on the device of the tokenizer, ``settings.batch_size`` at a time, and their labels on the CPU."""
        for start in range(0, len(self.images), self.settings.batch_size):
            end = min(start + self.settings.batch_size, len(self.images))
            batch = [self.images.item(index, 0) for index in range(start, end)]
            images = torch.stack([image for image, _ in batch]).to(self.tokenizer.device)
            yield images, torch.tensor([label for _, label in batch])

    # --- what models make of them

    @functools.cached_property
    def reconstruction(self) -> ReconstructionQuality:
        return evaluate_reconstruction(self.tokenizer, self.images, batch_size=self.settings.batch_size)

    @functools.cached_property
    @torch.no_grad()
    def codes(self) -> tuple[Codes, Tensor]:
        """Codes of all images, on the device, and their labels on the CPU."""
        parts = [(self.tokenizer.encode(images), labels) for images, labels in self.batches()]
        labels = torch.cat([labels for _, labels in parts])
        if isinstance(parts[0][0], Tensor):
            return torch.cat([codes for codes, _ in parts]), labels
        return [torch.cat(maps) for maps in zip(*(codes for codes, _ in parts), strict=True)], labels

    @torch.no_grad()
    def decode_encoded(self, images: Tensor) -> Tensor:
        """Images after encoding and decoding, float32 as the tokenizer gives them."""
        parts = images.split(self.settings.batch_size)
        return torch.cat([self.tokenizer.decode(self.tokenizer.encode(some)) for some in parts])

    def condition(self, labels: Tensor) -> Tensor | None:
        """What the prior takes of labels (N,): themselves on its device, or None where it or they have no classes."""
        if number_of_classes(self.prior) == 0 or bool((labels < 0).any()):
            return None
        return labels.to(self.prior.device)

    def samples(self, precision: str = "fp32") -> tuple[Tensor, Tensor]:
        """``settings.sampling.count`` drawn images (N, channels, H, W), and their labels (N,) on the CPU: 0, 1, ... and
        again, equally many of every class; -1 from a prior without classes. None is chosen or left out."""
        if precision not in self._samples:
            sampling = self.settings.sampling
            classes = number_of_classes(self.prior)
            labels = torch.arange(sampling.count) % classes if classes else torch.full((sampling.count,), -1)
            drawn = self._generate(
                self.prior,
                self.tokenizer,
                self.condition(labels),
                None if classes else sampling.count,
                **sampling.draws(),
                batch_size=sampling.batch_size,
                precision=precision,
            )
            self._samples[precision] = drawn.images, labels
        return self._samples[precision]

    def edit(self, images: Tensor, mask: Tensor, labels: Tensor) -> Any:
        """What `rqgen.edit` makes of images on the device, under their labels."""
        draws = self.settings.sampling.draws()
        return self._edit(self.prior, self.tokenizer, images, mask, self.condition(labels), **draws)

    @functools.cached_property
    def judge(self) -> ImageClassifier:
        """A classifier that has seen training images alone."""
        options = self.options("classifier")
        return ImageClassifier(side=options.side).fit(*_stacked(self._open("train", options.training_images)))


class _Some(ImageDataset):
    """So many of a dataset's images, chosen at random, in their order."""

    def __init__(self, images: ImageDataset, count: int, seed: int) -> None:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        self._images, self._chosen = images, chosen.sort().values.tolist()
        self.class_names, self.varies = images.class_names, images.varies

    def __len__(self) -> int:
        return len(self._chosen)

    def item(self, index: int, epoch: int) -> tuple[Tensor, int]:
        return self._images.item(self._chosen[index], epoch)


def _stacked(images: ImageDataset) -> tuple[Tensor, Tensor]:
    items = [images.item(index, 0) for index in range(len(images))]
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def _condition_kind(prior: Any) -> str:
    return getattr(prior.config, "condition", "class")


@dataclass
class Evaluation:
    """What came out."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metric -> its result, as JSON holds it."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Metric -> how long it took. What several need is in the first one's time."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Metric -> why it was not computed."""
    failed: dict[str, Exception] = field(default_factory=dict)
    """Metric -> what went wrong."""

    def rows(self) -> list[tuple[str, Row]]:
        """All lines of the table, each with its metric."""
        return [
            (name, row) for name, result in self.results.items() for row in METRICS.find(name, "metric").rows(result)
        ]


def evaluate(run: Run, metrics: Sequence[str] | None = None, *, keep_going: bool = False) -> Evaluation:
    """Computes metrics, by name (None: all that are registered and fit).

    Args:
        keep_going: whether an error of one metric leaves the others to be computed; it is then in ``failed``.

    Raises:
        ValueError: a name that there is not, or a named metric that does not fit, before anything is computed; with no
            names, none that fits; a result that JSON does not hold, such as NaN.
    """
    found = Evaluation()
    names = METRICS.names() if metrics is None else list(dict.fromkeys(metrics))
    for name in names:
        METRICS.find(name, "metric")
    for name in names:
        if (reason := run.why_not(name)) is not None:
            if metrics is not None:
                raise ValueError(f"metric '{name}' does not fit: it {reason}")
            found.unfit[name] = reason
    if len(found.unfit) == len(names):
        raise ValueError(f"no metric fits: {'; '.join(f'{name} {why}' for name, why in found.unfit.items())}")
    for name in names:
        if name in found.unfit:
            continue
        started = time.perf_counter()
        try:
            found.results[name] = _plain(METRICS.find(name, "metric").compute(run, run.options(name)), name)
        except Exception as error:
            if not keep_going:
                raise
            found.failed[name] = error
        found.seconds[name] = time.perf_counter() - started
    return found


def _plain(result: Any, name: str) -> dict[str, Any]:
    """A result as JSON holds it."""
    if is_dataclass(result) and not isinstance(result, type):
        result = asdict(result)
    if not isinstance(result, dict):
        raise TypeError(f"metric '{name}': expected a dictionary or a dataclass, got {type(result).__name__}")
    try:
        return json.loads(json.dumps(result, allow_nan=False))  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric '{name}': its result is not what JSON holds: {error}") from error


def protocol(run: Run) -> dict[str, Any]:
    """What numbers depend on beside the models, as JSON holds it."""
    settings = to_dict(run.settings)
    drawn = {name: settings[name] for name in ("batch_size", "sampling")}
    if run.lacks("images") is not None:
        return drawn
    judged_by = {"images": len(run.images), "class_names": list(run.class_names)}
    return {"data": settings["data"], "split": settings["split"], **judged_by, **drawn}
