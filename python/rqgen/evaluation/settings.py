"""Settings of `rqgen evaluate`, with a section for the options of each metric."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from rqgen.config import check_bounds, check_seeds, fill_sections, open_sections
from rqgen.data import DataConfig
from rqgen.inference import SamplingParams
from rqgen.options import SamplingOptions

from .metrics import METRICS


@dataclass(frozen=True)
class SamplingConfig(SamplingOptions):
    """The sampling of images to evaluate."""

    count: int = 500
    """Number of images, equally many of every class."""
    batch_size: int = 250
    """Images sampled at once."""

    def __post_init__(self) -> None:
        check_bounds(self, count=(1, 10**6), batch_size=(1, 2**24))
        check_seeds(self, "seed")
        self.params()  # which checks the others

    def params(self) -> SamplingParams:
        """The settings that `generate` and `edit` take."""
        return SamplingParams(**{one.name: getattr(self, one.name) for one in fields(SamplingOptions)})


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
