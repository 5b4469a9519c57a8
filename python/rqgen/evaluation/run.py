"""Models and images of an evaluation, and the loop over all metrics."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from rqgen.checks import check_choices, check_instance, same_names
from rqgen.config import did_you_mean, to_dict
from rqgen.data import DataConfig, ImageDataset, open_dataset
from rqgen.models import Prior, Tokenizer
from rqgen.quantizers import Codes

from .classifier import ImageClassifier
from .metrics import METRICS, Need, Row
from .reconstruction import ReconstructionQuality, evaluate_reconstruction
from .settings import EvaluationConfig

logger = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")


class Run:
    """A tokenizer, a prior, or both, and the images to evaluate them on. Samples, codes and the classifier are made at
    the first use and shared by all metrics.

    Args:
        settings: the images, the sampling, and the options of metrics.
        tokenizer, prior: on one device; put into eval mode.
        generate, edit: `rqgen.generate` and `rqgen.edit`, which metrics of samples need (this room cannot import them).
        no_images: the reason why ``settings.data`` does not name the images.

    Raises:
        TypeError: settings or a model of another class.
        ValueError: the prior is of another tokenizer.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        *,
        tokenizer: Tokenizer | None = None,
        prior: Prior | None = None,
        generate: Callable[..., Any] | None = None,
        edit: Callable[..., Any] | None = None,
        no_images: str | None = None,
    ) -> None:
        check_instance(settings, "settings", EvaluationConfig)
        if tokenizer is not None:
            check_instance(tokenizer, "tokenizer", Tokenizer)
        if prior is not None:
            check_instance(prior, "prior", Prior)
        if tokenizer is not None and prior is not None:
            prior.check_tokenizer(tokenizer)
        for model in (tokenizer, prior):
            if model is not None:
                model.eval()
        self.settings, self._tokenizer, self._prior = settings, tokenizer, prior
        self._generate, self._edit, self._no_images = generate, edit, no_images
        self._samples: dict[str, tuple[Tensor, Tensor]] = {}

    # --- requirements of metrics

    @property
    def data(self) -> DataConfig:
        return self.settings.data

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raise ValueError if the run has none, see `lacks`."""
        return _present(self._tokenizer, "a tokenizer")

    @property
    def prior(self) -> Prior:
        """Return the prior. Raise ValueError if the run has none, see `lacks`."""
        return _present(self._prior, "a prior")

    @property
    def device(self) -> torch.device:
        """Return the device of the models. Raise ValueError if the run has none."""
        return _present(self._prior if self._tokenizer is None else self._tokenizer, "a model").device

    def lacks(self, *needs: Need) -> str | None:
        """Return the reason why the first unmet requirement is not met; None if all are met.

        - "tokenizer", "prior": the run has this model.
        - "images": there is at least one image.
        - "labels": the images have labels, of two or more classes.
        - "classes": the prior is class-conditional, and its classes are those of the images.
        - "condition": as "classes", or the prior is unconditional, or has a null condition for images without labels.
        - "samples": the models can sample images.

        Raises:
            ValueError: another requirement.
        """
        for need in needs:
            if need not in get_args(Need):
                raise ValueError(f"needs: unknown requirement {need!r}; {did_you_mean(need, get_args(Need))}")
            reason = getattr(self, f"_lacks_{need}")()
            if reason is not None:
                return reason
        return None

    def why_not(self, metric: str) -> str | None:
        """Return the reason why a metric cannot be computed; None if it can."""
        entry = METRICS.find(metric, "metric")
        return self.lacks(*entry.needs) or entry.fits(self, self.options(metric))

    def options(self, metric: str) -> Any:
        """Return the options of a metric; None if it has none."""
        return self.settings.options.get(metric)

    def _lacks_tokenizer(self) -> str | None:
        return "needs a tokenizer" if self._tokenizer is None else None

    def _lacks_prior(self) -> str | None:
        return "needs a prior" if self._prior is None else None

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
            return f"needs images with labels of two or more classes, got {len(self.class_names) or 'none'}"
        return None

    def _lacks_condition(self) -> str | None:
        reason = self._lacks_prior() or self._lacks_images()
        if reason is not None or self.prior.condition_kind == "none":
            return reason
        if self.prior.condition_kind != "class":
            return f"needs a class-conditional or unconditional prior, got condition '{self.prior.condition_kind}'"
        if not self.class_names and self.prior.has_null_condition:
            return None
        return self._lacks_classes()

    def _lacks_classes(self) -> str | None:
        reason = self._lacks_prior() or self._lacks_images()
        if reason is not None:
            return reason
        classes, theirs = self.prior.num_classes, self.prior.class_names
        if classes == 0:
            return "needs a class-conditional prior"
        if len(self.class_names) != classes or (theirs and not same_names(theirs, self.class_names)):
            ours, named = ", ".join(self.class_names[:10]), ", ".join(theirs[:10])
            known = f"{classes} classes" + (f" ({named})" if named else "")
            return f"needs images of the prior's classes: expected {known}, got {ours or 'none'}"
        return None

    def _lacks_samples(self) -> str | None:
        reason = self._lacks_tokenizer() or self._lacks_prior()
        if reason is None and self.prior.condition_kind not in ("none", "class"):
            reason = f"needs samples, and the prior's condition is '{self.prior.condition_kind}'"
        if reason is None and self.settings.sampling.cfg_scale and not self.prior.has_null_condition:
            reason = "needs a prior with a null condition for sampling.cfg_scale"
        if reason is None and (self._generate is None or self._edit is None):
            reason = "needs samples: give the run generate=rqgen.generate and edit=rqgen.edit"
        return reason

    # --- images

    @functools.cached_property
    def images(self) -> ImageDataset:
        """Images to evaluate on, without random variations."""
        return self._open(self.settings.split, self.settings.images)

    def _open(self, split: Any, most: int | None) -> ImageDataset:
        images = open_dataset(replace(self.data, horizontal_flip=False, shift=0), split)
        return images if most is None or len(images) <= most else _Some(images, most, self.data.split_seed)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    def some(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Return at most ``count`` images, chosen at random (None: all), (N, channels, H, W), and their labels (N,),
        both on the CPU."""
        images = self.images
        if count is not None and count < len(images):
            images = _Some(images, count, self.data.split_seed)
        return _stacked(images)

    def thumbnails(self, images: ImageDataset, side: int) -> tuple[Tensor, Tensor]:
        """Return images averaged to (N, channels, side, side), and their labels (N,), both on the CPU."""
        window = self.data.resolution // side
        return _stacked(images, lambda image: F.avg_pool2d(image, window))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images on the device of the tokenizer, ``settings.batch_size`` at a time, and their labels on the
        CPU."""
        for start in range(0, len(self.images), self.settings.batch_size):
            end = min(start + self.settings.batch_size, len(self.images))
            batch = [self.images.item(index, 0) for index in range(start, end)]
            images = torch.stack([image for image, _ in batch]).to(self.tokenizer.device)
            yield images, torch.tensor([label for _, label in batch])

    # --- outputs of the models

    @functools.cached_property
    def reconstruction(self) -> ReconstructionQuality:
        return evaluate_reconstruction(self.tokenizer, self.images, batch_size=self.settings.batch_size)

    @functools.cached_property
    @torch.no_grad()
    def codes(self) -> tuple[Codes, Tensor]:
        """Codes of all images, on the device, and their labels on the CPU."""
        parts = [(self.tokenizer.encode(images), labels) for images, labels in self.batches()]
        codes = self.tokenizer.layout.concatenate([codes for codes, _ in parts])
        return codes, torch.cat([labels for _, labels in parts])

    @torch.no_grad()
    def decode_encoded(self, images: Tensor) -> Tensor:
        """Return images after encoding and decoding."""
        parts = images.split(self.settings.batch_size)
        return torch.cat([self.tokenizer.decode(self.tokenizer.encode(some)) for some in parts])

    def condition(self, labels: Tensor) -> Tensor | None:
        """Return the condition of images with labels (N,): the labels, or None for an unconditional prior and for
        images without labels."""
        if self.prior.num_classes == 0 or bool((labels < 0).any()):
            return None
        return labels.to(self.prior.device)

    def samples(self, precision: str = "fp32") -> tuple[Tensor, Tensor]:
        """Return ``settings.sampling.count`` samples (N, channels, H, W), and their labels (N,) on the CPU: 0, 1, ...,
        0, ..., or -1 from an unconditional prior. No sample is selected or left out."""
        if precision not in self._samples:
            sampling = self.settings.sampling
            classes = self.prior.num_classes
            labels = torch.arange(sampling.count) % classes if classes else torch.full((sampling.count,), -1)
            sampled = _present(self._generate, "generate=rqgen.generate")(
                self.prior,
                self.tokenizer,
                self.condition(labels),
                None if classes else sampling.count,
                params=sampling.params(),
                batch_size=sampling.batch_size,
                precision=precision,
            )
            self._samples[precision] = sampled.images, labels
        return self._samples[precision]

    def edit(self, images: Tensor, mask: Tensor, labels: Tensor) -> Any:
        """Return the output of `rqgen.edit` for images on the device, given their labels."""
        params = self.settings.sampling.params()
        edit = _present(self._edit, "edit=rqgen.edit")
        return edit(self.prior, self.tokenizer, images, mask, self.condition(labels), params=params)

    @functools.cached_property
    def judge(self) -> ImageClassifier:
        """Classifier trained on training images, with the options of metric "classifier"."""
        options = self.options("classifier")
        train = self._open("train", options.training_images)
        images, labels = self.thumbnails(train, options.side)
        if len(labels.unique()) < 2:
            count = len(labels)
            raise ValueError(f"classifier.training_images: expected images of at least two classes, got {count} of one")
        return ImageClassifier(side=options.side).fit(images, labels)


def _present(value: ValueT | None, name: str) -> ValueT:
    if value is None:
        raise ValueError(f"Run: expected {name}, got none")
    return value


class _Some(ImageDataset):
    """Random subset of a dataset, in its order."""

    def __init__(self, images: ImageDataset, count: int, seed: int) -> None:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        self._images, self._chosen = images, chosen.sort().values.tolist()
        self.class_names, self.varies = images.class_names, images.varies

    def __len__(self) -> int:
        return len(self._chosen)

    def item(self, index: int, epoch: int) -> tuple[Tensor, int]:
        return self._images.item(self._chosen[index], epoch)


def _stacked(images: ImageDataset, change: Callable[[Tensor], Tensor] = lambda image: image) -> tuple[Tensor, Tensor]:
    items = [(change(image), label) for image, label in (images.item(index, 0) for index in range(len(images)))]
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


@dataclass
class Evaluation:
    """Results of metrics."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metric -> result, as JSON holds it."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Metric -> seconds. Samples, codes and the classifier are in the time of the first metric that needs them."""
    unfit: dict[str, str] = field(default_factory=dict)
    """Metric -> reason why it was not computed."""
    failed: dict[str, Exception] = field(default_factory=dict)
    """Metric -> its error."""

    def rows(self) -> list[tuple[str, Row]]:
        """Return all rows of the table, each with its metric."""
        return [
            (name, row) for name, result in self.results.items() for row in METRICS.find(name, "metric").rows(result)
        ]


def evaluate(run: Run, metrics: Sequence[str] | None = None, *, keep_going: bool = False) -> Evaluation:
    """Compute metrics by name (None: all that fit).

    Args:
        keep_going: keep errors of a metric in ``failed`` and continue with the others, instead of raising them.

    Raises:
        TypeError: ``metrics`` is not a list of names.
        ValueError: no name, an unknown one, one given twice, or a named metric that does not fit, all before anything
            is computed; without names, no metric that fits; a result that JSON does not hold, such as NaN.
    """
    found = Evaluation()
    names = METRICS.names() if metrics is None else metrics
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"metrics: expected a list of names, got {names!r}")
    check_choices(names, "metrics")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"metrics: expected names, got {name!r}")
        METRICS.find(name, "metric")
    for name in names:
        if (reason := run.why_not(name)) is not None:
            if metrics is not None:
                raise ValueError(f"metric '{name}' does not fit: {reason}")
            found.unfit[name] = reason
    if len(found.unfit) == len(names):
        by_reason: dict[str, list[str]] = {}
        for name, reason in found.unfit.items():
            by_reason.setdefault(reason, []).append(name)
        reasons = "; ".join(f"{', '.join(some)}: {reason}" for reason, some in by_reason.items())
        raise ValueError(f"no metric fits: {reasons}")
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
    """Return a result as JSON holds it."""
    if is_dataclass(result) and not isinstance(result, type):
        result = asdict(result)
    if not isinstance(result, dict):
        raise TypeError(f"metric '{name}': expected a dictionary or a dataclass, got {type(result).__name__}")
    try:
        return json.loads(json.dumps(result, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric '{name}': expected a result that JSON holds: {error}") from error


def protocol(run: Run) -> dict[str, Any]:
    """Return the settings of the images and the sampling of the results, as JSON holds them."""
    settings = to_dict(run.settings)
    sampled = {name: settings[name] for name in ("batch_size", "sampling")}
    if run.lacks("images") is not None:
        return sampled
    judged_by = {"images": len(run.images), "class_names": list(run.class_names)}
    return {"data": settings["data"], "split": settings["split"], **judged_by, **sampled}
