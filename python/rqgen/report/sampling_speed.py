"""The paper's figure 4 of a machine: how long an image takes, by code shape and batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .figures import COLOURS, save_figure, tidy

_LINES = ("-", "--", "-.", ":")


def draw_sampling_speed(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Left: images per second, codes only, by batch size; a line per shape (colour) and contender (dashes), and the
    floor as dots. Right: milliseconds per image of the first contender, the decoder above the codes.

    Each case has `shape`, `batch`, `contender`, `precision`, `ar_ms_per_image`, `floor_ms_per_image` and
    `decoder_ms_per_image` (None: not measured).
    """
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    speed, parts = figure.subplots(1, 2)
    shapes = list(dict.fromkeys(tuple(case["shape"]) for case in cases))
    colours = {shape: COLOURS[index % len(COLOURS)] for index, shape in enumerate(shapes)}
    contenders = list(dict.fromkeys(_name(case) for case in cases))
    for shape in shapes:
        for index, contender in enumerate(contenders):
            chosen = [case for case in cases if (tuple(case["shape"]), _name(case)) == (shape, contender)]
            batches = [case["batch"] for case in chosen]
            speed.plot(
                batches,
                [1e3 / case["ar_ms_per_image"] for case in chosen],
                color=colours[shape],
                linestyle=_LINES[index % len(_LINES)],
                marker="o",
                markersize=4,
            )
            if contender == contenders[0]:
                floors = [1e3 / case["floor_ms_per_image"] for case in chosen]
                speed.plot(batches, floors, color=colours[shape], linestyle="", marker="_", markersize=12)
    speed.set_xscale("log", base=2)
    speed.set_yscale("log")
    batches = sorted({case["batch"] for case in cases})
    speed.set_xticks(batches, [str(batch) for batch in batches])
    speed.set_xlabel("batch size")
    speed.set_ylabel("images per second")
    tidy(speed, f"drawing codes (dashes: floor of {contenders[0]})")
    # Colours and dashes have a key each: every pair of them would fill the panel.
    keys = [Line2D([], [], color=colours[shape], label="×".join(map(str, shape))) for shape in shapes]
    keys += [
        Line2D([], [], color="grey", linestyle=_LINES[index % len(_LINES)], label=contender)
        for index, contender in enumerate(contenders)
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, handlelength=3, fontsize=8)
    _bars(parts, [case for case in cases if _name(case) == contenders[0]], shapes, colours)
    tidy(parts, f"{contenders[0]}: codes, and the decoder (pale)")
    save_figure(figure, path)


def _bars(
    axis: Axes,
    cases: Sequence[Mapping[str, Any]],
    shapes: Sequence[tuple[int, ...]],
    colours: Mapping[tuple[int, ...], str],
) -> None:
    batches = sorted({case["batch"] for case in cases})
    width = 0.8 / len(shapes)
    for case in cases:
        shape = tuple(case["shape"])
        place = batches.index(case["batch"]) + (shapes.index(shape) - (len(shapes) - 1) / 2) * width
        codes, decoder = case["ar_ms_per_image"], case["decoder_ms_per_image"] or 0.0
        axis.bar(place, codes, width * 0.9, color=colours[shape])
        axis.bar(place, decoder, width * 0.9, bottom=codes, color=colours[shape], alpha=0.35)
        axis.annotate(f"{codes + decoder:.3g}", (place, codes + decoder), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axis.set_ylabel("ms per image")


def _name(case: Mapping[str, Any]) -> str:
    return f"{case['contender']} {case['precision']}"
