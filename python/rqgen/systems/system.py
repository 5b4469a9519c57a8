"""The description of a system, and the settings that all systems have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from rich.console import Console
from torch import Tensor

from rqgen.config import Given, to_dict
from rqgen.data import DataConfig, EncodedImages, ImageDataset, TensorItems, image_grid
from rqgen.evaluation import SamplingConfig
from rqgen.models import Prior, Tokenizer
from rqgen.models.classes import names_of_classes
from rqgen.sampling import generate
from rqgen.training import AdversarialConfig, LoopConfig, PerceptualConfig
from rqgen.training.loop import Stage

PREVIEW_COLUMNS, PREVIEW_CLASSES = 8, 10


@dataclass
class TokenizerRun:
    """`rqgen train tokenizer`. Each system adds its `model`, whose class takes the images' size, channels and class
    names, and the name of its recipe."""

    recipe: ClassVar[str | None] = None
    data: DataConfig = field(default_factory=DataConfig)
    """The images; ``model`` follows their size and channels."""
    model: Any = None
    """The tokenizer."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """The training."""
    perceptual: PerceptualConfig | None = None
    """A perceptual distance, by a network from local files; null: none. Any of its settings, such as
    perceptual.vgg=FILE, adds it."""
    adversarial: AdversarialConfig | None = None
    """A discriminator that the tokenizer is trained against; null: none. Any of its settings, such as
    adversarial.weight=0.75, adds it."""

    def __post_init__(self) -> None:
        for section in (self.perceptual, self.adversarial):
            if section is not None:
                section.check_resolution(self.data.resolution)


@dataclass
class PriorRun:
    """`rqgen train prior`. Each system adds its `prior`, with a method ``model_config(vae, num_classes)``, and the name
    of its recipe."""

    recipe: ClassVar[str | None] = None
    tokenizer: Path = Path("runs/tokenizer/model")
    """The folder of the trained tokenizer: the one with config.json and model.safetensors, or that of its training."""
    codes: Path | None = None
    """Learn from codes that `rqgen encode` wrote instead of images; ``data`` is then not read."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images. Settings that are not given are the tokenizer's, except flips and shifts."""
    prior: Any = None
    """The prior and its targets."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """The training."""


@dataclass(frozen=True)
class DemoSamplingConfig(SamplingConfig):
    """Settings of sampling whose images fill the figure: ten of each digit at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 100 or self.count % 10:
            raise ValueError(f"count: expected a multiple of 10, at least 100, got {self.count}")


@dataclass
class DemoConfig:
    """Both training runs, which must read the same split of the same images, and the sampling. Each system adds its own
    runs, and the name of its recipe."""

    recipe: ClassVar[str | None] = None
    tokenizer: Any = None
    """Stage 1."""
    prior: Any = None
    """Stage 2; ``prior.data`` follows ``tokenizer.data``, and ``prior.tokenizer`` is not read."""
    sampling: DemoSamplingConfig = field(default_factory=DemoSamplingConfig)
    """The sampling of the images to evaluate."""

    @classmethod
    def implied(cls, given: Given[Any]) -> dict[str, Any]:
        """Both stages read the same images."""
        return {"prior": {"data": to_dict(given.read("tokenizer.data"))}}

    def __post_init__(self) -> None:
        check_one_split(self.tokenizer.data, self.prior.data)
        if self.tokenizer.data.source != "digits":
            raise ValueError(
                f"tokenizer.data.source: expected 'digits', which the demo is about, got '{self.tokenizer.data.source}'"
            )
        if self.prior.codes is not None:
            raise ValueError(
                f"prior.codes: expected none, as the demo trains its prior on images, got {self.prior.codes}"
            )


class MakePriorStage(Protocol):
    """A function that makes the stage of a new prior."""

    def __call__(
        self, run: Any, vae: Any, source: ImageDataset | EncodedImages, *, console: Console | None
    ) -> tuple[Stage[Any], ImageDataset | TensorItems]:
        """Return the stage, and the items that it is trained on."""
        ...


@dataclass(frozen=True)
class System:
    """Everything that differs between the systems on the command line.

    Attributes:
        name: as ``--system`` takes it.
        tokenizer, prior: classes of the two models.
        tokenizer_run, prior_run: settings of `rqgen train`.
        prior_stage: (run, tokenizer, images or codes, console) -> the stage with a new prior, and its training items.
        demo: settings of `rqgen demo`; None: the system has none.
    """

    name: str
    tokenizer: type[Tokenizer]
    prior: type[Prior]
    tokenizer_run: type[TokenizerRun]
    prior_run: type[PriorRun]
    prior_stage: MakePriorStage
    demo: type[DemoConfig] | None = None

    def run(self, stage: str) -> type[TokenizerRun] | type[PriorRun]:
        """Return the class of a stage's settings, "tokenizer" or "prior"."""
        return self.tokenizer_run if stage == "tokenizer" else self.prior_run


def check_one_split(tokenizer: DataConfig, prior: DataConfig) -> None:
    """Raise ValueError unless both stages hold out the same images."""
    first, second = to_dict(tokenizer), to_dict(prior)
    for name in {**first, **second}:
        if (ours := second.get(name)) != (theirs := first.get(name)):
            raise ValueError(
                f"prior.data.{name}: {ours}, but tokenizer.data.{name} is {theirs}: expected the same settings, "
                "one split for both"
            )


def feature_side(given: Given[Any], data: DataConfig) -> int:
    """Return the side of a tokenizer's feature map for images of ``data``, of a model with one level per factor of two
    (``model.channel_multipliers``)."""
    levels = len(given.read("model.channel_multipliers"))
    stride = 2 ** min(max(levels - 1, 0), 32)
    if data.resolution % stride:
        below = data.resolution // stride * stride
        raise given.error(
            "data.resolution",
            f"expected a multiple of {stride}, as the model has {levels} levels (model.channel_multipliers), "
            f"such as {below or stride} or {below + stride if below else 2 * stride}; got {data.resolution}",
        )
    return data.resolution // stride


def preview_samples(prior: Prior, vae: Tokenizer) -> dict[str, Tensor]:
    """Return the same few samples at every call, to show progress: a row for each of the first classes."""
    classes = min(prior.num_classes, PREVIEW_CLASSES)
    if not classes:
        sampled = generate(prior, vae, num=4 * PREVIEW_COLUMNS, seed=0)
        return {"samples": image_grid(sampled.images, columns=PREVIEW_COLUMNS)}
    columns = PREVIEW_COLUMNS // 2
    sampled = generate(prior, vae, torch.arange(classes).repeat_interleave(columns), seed=0)
    return {"samples": image_grid(sampled.images, columns=columns, row_labels=names_of_classes(prior)[:classes])}
