"""What `rqgen evaluate` can be told, with a section for the options of each metric."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rqgen.config import check_bounds, check_seeds, fill_sections, open_sections
from rqgen.data import DataConfig

from .metrics import METRICS


@dataclass
class SamplingConfig:
    """How the judged images are drawn."""

    count: int = 500
    """Equally many of every class."""
    temperature: float = 1.0
    """What logits are divided by."""
    top_k: int | None = None
    """Only the k likeliest codes."""
    top_p: float | None = None
    """Only the likeliest codes of this total mass."""
    cfg_scale: float | None = None
    """Strength of classifier-free guidance."""
    batch_size: int = 250
    """Images drawn at once."""
    seed: int = 0
    """The same seed gives the same images."""

    def __post_init__(self) -> None:
        check_bounds(self, count=(1, 10**6), batch_size=(1, 2**24), top_k=(1, 2**24))
        check_seeds(self, "seed")

    def draws(self) -> dict[str, Any]:
        """What `generate` and `edit` take of it alike."""
        names = ("temperature", "top_k", "top_p", "cfg_scale", "seed")
        return {name: getattr(self, name) for name in names}


@open_sections(METRICS)
@dataclass
class EvaluationConfig:
    """What a model is judged by."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images. What is not given is as the model had it."""
    split: Literal["held_out", "train", "all"] = "held_out"
    """The part of them that models are judged by."""
    images: int | None = None
    """At most so many of them, chosen at random by data.split_seed (None: all)."""
    batch_size: int = 64
    """Images encoded, decoded or predicted at once."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the judged images are drawn."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of each metric by its name."""

    def __post_init__(self) -> None:
        fill_sections(self)
        check_bounds(self, images=(1, 10**9), batch_size=(1, 2**24))
