"""What models are judged by: one module per metric, found by its being in this folder.

A metric of your own is a `Metric` that is registered:

    @rqgen.evaluation.metrics.register
    class Brightness(Metric):
        "How bright samples are."
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
    """A line of the table."""

    quantity: str
    """Such as "reconstruction error"."""
    value: float | int | list[float] | list[int]
    unit: str = ""
    better: Literal["lower", "higher", ""] = ""


class Metric(ABC):
    """One way to judge a model. The first paragraph of its docstring is what `rqgen list` says of it."""

    name: ClassVar[str]
    options: ClassVar[type | None] = None
    """A dataclass of settings, all with defaults and a string under each that says what it is: the section NAME."""
    needs: ClassVar[tuple[Need, ...]] = ()
    """What there must be, see `Run.lacks`."""

    def fits(self, run: Run, options: Any) -> str | None:
        """What keeps it from being computed, beside ``needs``; None where nothing does."""
        return None

    @abstractmethod
    def compute(self, run: Run, options: Any) -> Any:
        """The result: a dictionary or a dataclass of numbers, texts, lists and dictionaries, as JSON holds them."""

    def rows(self, result: Mapping[str, Any]) -> Iterable[Row]:
        """How a result reads in the table; as it is, every number in it."""
        return [
            Row(name.replace("_", " "), value)
            for name, value in result.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]


METRICS: Registry[Metric] = Registry("metric")
register = METRICS.register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
