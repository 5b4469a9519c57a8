"""Figure of loss and token error of a family of models against their size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from .figures import COLOURS, save_figure, tidy


def plot_scaling(sizes: Sequence[float], curves: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Plot a panel per curve with logarithmic axes: a point per model, the fitted law, its formula and the correlation
    coefficient.

    Each curve has `title`, `values` (one for each of ``sizes``), `alpha`, `log_beta` and `correlation`, see
    `rqgen.evaluation.PowerLaw`.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none")
    _check_positive(sizes, "sizes")
    for curve in curves:
        if len(curve["values"]) != len(sizes):
            found = len(curve["values"])
            raise ValueError(f"{curve['title']}: expected a value for each of {len(sizes)} sizes, got {found}")
        _check_positive(curve["values"], curve["title"])
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, curve, colour in zip(panels, curves, cycle(COLOURS), strict=False):
        values = curve["values"]
        along = np.geomspace(min(sizes), max(sizes), 50)
        fitted = np.exp(curve["alpha"] * (curve["log_beta"] + np.log(along)))
        axis.plot(along, fitted, color="grey", linestyle="--", linewidth=1)
        axis.plot(sizes, values, color=colour, linestyle="", marker="o")
        axis.set_xscale("log")
        axis.set_yscale("log")
        _label_values(axis, [*values, *fitted])
        law = f"L = ({power_of_ten(curve['log_beta'])} N)$^{{{curve['alpha']:.3f}}}$"
        tidy(axis, f"{curve['title']}\n{law},  r = {curve['correlation']:.4f}")
        axis.set_xlabel("N: parameters of the blocks")
    for axis in panels[len(curves) :]:
        axis.set_axis_off()
    save_figure(figure, path)


def power_of_ten(log_value: float) -> str:
    """Return ``exp(log_value)`` with two decimals, such as 3.10e-05, also beyond the range of a float."""
    if not math.isfinite(log_value):
        raise ValueError(f"log_value: expected a finite number, got {log_value}")
    exponent = math.floor(log_value / math.log(10))
    mantissa = f"{math.exp(log_value - exponent * math.log(10)):.2f}"
    if mantissa == "10.00":
        exponent, mantissa = exponent + 1, "1.00"
    return f"{mantissa}e{exponent:+03d}"


def _check_positive(numbers: Sequence[float], name: str) -> None:
    if not numbers or not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ValueError(f"{name}: expected finite numbers > 0, as logarithmic axes need, got {list(numbers)}")


def _label_values(axis: Axes, values: Sequence[float]) -> None:
    """Label four values at even steps of the logarithm: within a decade there is no power of ten to label."""
    low, high = min(values), max(values)
    ticks = np.geomspace(low, high, 4)
    axis.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    margin = (high / low) ** 0.08 if high > low else 1.1
    axis.set_ylim(low / margin, high * margin)
