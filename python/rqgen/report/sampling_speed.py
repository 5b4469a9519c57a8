"""Figures of sampling speed: by code shape and batch size (the paper's figure 4), and by system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .figures import COLOURS, save_figure, tidy

_LINES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")


def plot_sampling_speed(cases: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Plot the speed of sampling. Left: images per second, codes only, by batch size; a line per shape (colour) and
    contender (line style), and the lower bound of the first contender as dashes. Right: milliseconds per image of the
    first contender, the decoder above the codes.

    Each case has `shape`, `batch`, `contender`, `precision`, `ar_ms_per_image`, `floor_ms_per_image` and
    `decoder_ms_per_image` (None: not measured).
    """
    if not cases:
        raise ValueError("cases: expected at least one, got none")
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    speed, parts = figure.subplots(1, 2)
    shapes = list(dict.fromkeys(tuple(case["shape"]) for case in cases))
    colours = {shape: COLOURS[index % len(COLOURS)] for index, shape in enumerate(shapes)}
    named = [("×".join(map(str, case["shape"])), _name(case), case) for case in cases]
    first = named[0][1]
    _speeds(figure, speed, named)
    tidy(speed, f"sampling codes (dashes: floor of {first})")
    _bars(parts, [case for case in cases if _name(case) == first], shapes, colours)
    tidy(parts, f"{first}: codes, and the decoder (pale)")
    save_figure(figure, path)


def plot_systems(systems: Sequence[Mapping[str, Any]], cases: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Plot the speed of systems. Left: images per second, codes only, by batch size; a line per system (colour) and way
    of sampling (line style), and the lower bound of the first way as dashes. Right: the counted work per image of each
    system, divided by that of the last one.

    Each system has `name`, `steps` and `counted_per_image`, each case `system`, `precision`, `cfg_scale`, `batch`,
    `ar_ms_per_image` and `floor_ms_per_image` (see `rqgen bench systems`).
    """
    if not systems or not cases:
        raise ValueError(f"{'cases' if systems else 'systems'}: expected at least one, got none")
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    speed, work = figure.subplots(1, 2)
    ways = [f"{case['precision']}, guided" if case["cfg_scale"] else case["precision"] for case in cases]
    named = [(case["system"], way, case) for way, case in zip(ways, cases, strict=True)]
    _speeds(figure, speed, named)
    tidy(speed, f"sampling codes (dashes: floor of {ways[0]})")
    rows = {system["name"]: _work(system) for system in systems}
    names, kinds = list(rows), list(rows[systems[0]["name"]])
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        for place, kind in enumerate(kinds):
            at, ratio = place + (index - (len(names) - 1) / 2) * width, rows[name][kind] / rows[names[-1]][kind]
            # Bars start at 1, so that their length is the difference to the last system.
            work.bar(at, ratio - 1, width * 0.9, bottom=1, color=COLOURS[index % len(COLOURS)])
            outwards = "bottom" if ratio >= 1 else "top"
            work.annotate(_short(rows[name][kind]), (at, ratio), ha="center", va=outwards, fontsize=6)
    work.axhline(1, color="black", linewidth=0.8)
    work.set_yscale("log")
    work.set_xticks(range(len(kinds)), kinds, fontsize=7)
    work.set_ylabel(f"over that of {names[-1]}")
    tidy(work, "counted per image")
    save_figure(figure, path)


def _work(system: Mapping[str, Any]) -> dict[str, float]:
    counted = system["counted_per_image"]
    return {
        "steps": sum(system["steps"]),
        **{f"weights read,\nbatch {count['batch']}": count["weights"] for count in (counted[0], counted[-1])},
        "products": counted[0]["products"],
        "attention": counted[0]["attention"],
        "keys and\nvalues": counted[0]["states"],
    }


def _short(count: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def _speeds(figure: Figure, axis: Axes, named: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    """Plot images per second over the batch size for (name of colour, name of line style, case), the lower bound of the
    first line style, and a legend of both below the figure."""
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(dict.fromkeys(n for n, _, _ in named))}
    dashes = {name: _LINES[index % len(_LINES)] for index, name in enumerate(dict.fromkeys(n for _, n, _ in named))}
    for colour in colours:
        for dash in dashes:
            chosen = [case for *names, case in named if names == [colour, dash]]
            batches = [case["batch"] for case in chosen]
            speeds = [1e3 / case["ar_ms_per_image"] for case in chosen]
            axis.plot(batches, speeds, color=colours[colour], linestyle=dashes[dash], marker="o", markersize=4)
            if dash == next(iter(dashes)):
                floors = [1e3 / case["floor_ms_per_image"] for case in chosen]
                axis.plot(batches, floors, color=colours[colour], linestyle="", marker="_", markersize=12)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    batches = sorted({case["batch"] for *_, case in named})
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.set_xlabel("batch size")
    axis.set_ylabel("images per second")
    # One legend entry per colour and per line style: one per pair would fill the panel.
    keys = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    keys += [Line2D([], [], color="grey", linestyle=line, label=name) for name, line in dashes.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, handlelength=3, fontsize=8)


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
