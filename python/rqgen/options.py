"""Options that a room and the command line share: each is one field of one dataclass, which needs no torch.

The string below a field is its help. `rqgen.cli.options` turns the fields into options of a command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

CLI = "cli"
"""The key of a field's metadata that holds its `OnCommandLine`."""


@dataclass(frozen=True, kw_only=True)
class OnCommandLine:
    """Looks of a field on the command line, as far as they do not follow from its name and type.

    Attributes:
        name: in place of ``--`` and the field's name with hyphens; ``--x/--no-x`` for a flag that is on by default.
        metavar: what stands for the value in the help.
        argument: a positional argument.
        lowest, highest: bounds of a number.
        parse: makes the field's value, or each item of a list, from text. Raises ValueError.
    """

    name: str | None = None
    metavar: str | None = None
    argument: bool = False
    lowest: float | None = None
    highest: float | None = None
    parse: Callable[[str], Any] | None = None


def option(default: Any = dataclasses.MISSING, **look: Any) -> Any:
    """Return a dataclass field with a look on the command line, see `OnCommandLine`. A list is copied for each
    instance."""
    metadata = {CLI: OnCommandLine(**look)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SamplingOptions:
    """The settings of sampling, before they are checked: see `rqgen.SamplingParams`."""

    temperature: float | Sequence[float] = 1.0
    """Divisor of the logits, >= 0; 0 takes the likeliest code."""
    top_k: int | Sequence[int | None] | None = None
    """Sample among the k likeliest codes."""
    top_p: float | Sequence[float | None] | None = None
    """Sample among the likeliest codes of this total mass, in (0, 1]."""
    cfg_scale: float | None = None
    """Strength of classifier-free guidance; 0 is off."""
    seed: int = 0
    """The same seed gives the same images."""
    offset: int = 0
    """Number of the first image: an image depends on its number, not on its batch."""
    smooth: bool = False
    """Use mixtures of codes in the place of codes (VAR): smoother images, fewer details."""


@dataclass(frozen=True)
class EngineOptions:
    """The arithmetic of a prior that is sampled from, before it is checked: see `rqgen.Engine`."""

    precision: str = "fp32"
    """Precision of the prior: fp32, bf16 or int8 (8-bit weights, on the CPU only)."""
    use_graphs: bool = option(True, name="--graphs/--no-graphs")
    """Replay CUDA graphs on a GPU."""
