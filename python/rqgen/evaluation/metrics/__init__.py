"""Metrics of `rqgen evaluate`: one module each, found by importing all modules of this folder.

A metric of your own is registered:

    @rqgen.evaluation.metrics.register
    class Brightness(Metric):
        "The mean brightness of samples."
        name = "brightness"
        needs = ("samples",)
        def compute(self, run, options):
            return {"mean": run.samples()[0].mean().item()}
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from rqgen.config import Registry

if TYPE_CHECKING:
    from ..run import Run

Need = Literal["tokenizer", "prior", "images", "labels", "condition", "samples", "classes"]


class Row(NamedTuple):
    """Row of the table. ``better`` is empty for a number that is neither good nor bad."""

    quantity: str
    value: float | int | list[float] | list[int]
    unit: str = ""
    better: Literal["lower", "higher", ""] = ""


class Metric(ABC):
    """A metric of a tokenizer, a prior, or both. `rqgen list metrics` shows the first paragraph of its docstring."""

    name: ClassVar[str]
    options: ClassVar[type | None] = None
    """A dataclass of the settings of this metric, the section NAME. Each field has a default, and a string under it as
    its help."""
    needs: ClassVar[tuple[Need, ...]] = ()
    """Requirements, see `Run.lacks`."""

    def fits(self, run: Run, options: Any) -> str | None:
        """Return the reason why it cannot be computed for this run, such as "needs square images"; None if it can. The
        requirements in ``needs`` are met."""
        return None

    @abstractmethod
    def compute(self, run: Run, options: Any) -> Any:
        """Compute the result: a dictionary or a dataclass that JSON holds, without NaN."""

    def rows(self, result: Mapping[str, Any]) -> Iterable[Row]:
        """Return the rows of the table for a result. Default: one for every number in it."""
        return [
            Row(name.replace("_", " "), value)
            for name, value in result.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]


METRICS: Registry[Metric] = Registry("metric")
register = METRICS.register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
