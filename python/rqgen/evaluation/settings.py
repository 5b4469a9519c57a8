"""Settings of `rqgen evaluate`, with a section for the options of each metric."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rqgen.config import check_bounds, check_seeds, fill_sections, open_sections
from rqgen.data import DataConfig
from rqgen.inference import SamplingParams

from .metrics import METRICS


@dataclass
class SamplingConfig:
    """The sampling of images to evaluate."""

    count: int = 500
    """Number of images, equally many of every class."""
    temperature: float = 1.0
    """Divisor of the logits."""
    top_k: int | None = None
    """Only the k likeliest codes."""
    top_p: float | None = None
    """Only the likeliest codes of this total mass."""
    cfg_scale: float | None = None
    """Strength of classifier-free guidance; 0 is off."""
    batch_size: int = 250
    """Images sampled at once."""
    seed: int = 0
    """The same seed gives the same images."""

    def __post_init__(self) -> None:
        check_bounds(self, count=(1, 10**6), batch_size=(1, 2**24), top_k=(1, 2**24))
        check_seeds(self, "seed")
        self.params()  # which checks the others

    def params(self) -> SamplingParams:
        """The settings that `generate` and `edit` take."""
        names = ("temperature", "top_k", "top_p", "cfg_scale", "seed")
        return SamplingParams(**{name: getattr(self, name) for name in names})


@open_sections(METRICS)
@dataclass
class EvaluationConfig:
    """Settings of an evaluation."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images. What is not given is as in the training of the prior, or of the tokenizer."""
    split: Literal["held_out", "train", "all"] = "held_out"
    """The part of the images to evaluate on."""
    images: int | None = None
    """Maximum number of images, chosen at random by data.split_seed (None: all)."""
    batch_size: int = 64
    """Images encoded, decoded or predicted at once."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """The sampling of images to evaluate."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of each metric by its name."""

    def __post_init__(self) -> None:
        fill_sections(self)
        check_bounds(self, images=(1, 10**9), batch_size=(1, 2**24))
