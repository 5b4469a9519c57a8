"""Writes the tables of benchmarks/README.md, between its markers, and the plot speedup.svg beside the JSON of
benchmarks/results that both are made of. The same JSON gives the same bytes.

python benchmarks/render.py [--results DIR] [--readme FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _harness
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
# What `rqgen bench systems --out benchmarks/results/systems` writes; the README shows its figure.
SYSTEMS = Path("systems", "systems.json")


def three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(ns: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= 0.9995 * size:
            return f"{three_digits(ns / size)} {unit}"
    return f"{ns:.0f} ns"


def memory(count: int | None) -> str:
    return "?" if count is None else f"{three_digits(count / 2**20)} MiB"


def table(result: Mapping[str, Any]) -> str:
    """One JSON file as markdown."""
    env, peak = result["environment"], result["peaks"]
    copy, matmul = (peak[key] / 1e9 for key in ("copy_bytes_per_s", "matmul_flop_per_s"))
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    commit = (env["commit"] or "unknown")[:12] + (" with uncommitted changes" if env["dirty"] else "")
    lines = [
        f"### {result['slug']}: {env['device']}",
        "",
        f"{env['threads']} threads, {'warm' if env['warm_heap'] else 'COLD'} heap, Python {env['python']}, "
        f"{versions}, commit {commit}, {env['time']}. Measured here: copy {copy:.3g} GB/s, "
        f"{peak['matmul_dtype']} matmul {matmul:.4g} GFLOP/s.",
        "",
        "| shape | contender | median | p20 - p80 | x ours | peak memory | agrees |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        shape = ", ".join(f"{key}={value}" for key, value in case["shape"].items())
        rows, floor = case["contenders"][0]["rows"], case["floor"]
        for index, c in enumerate(case["contenders"]):
            label = f"**{case['case']}**: {shape}" if index == 0 else ""
            part = "" if c["rows"] == rows else f" ({c['rows']} rows)"
            lines.append(
                f"| {label} | {c['name']}{part} | {duration(c['median_ns'])} "
                f"| {duration(c['p20_ns'])} - {duration(c['p80_ns'])} | {c['times_ours_per_row']:.2f} "
                f"| {memory(c['peak_bytes'])} | {100 * c['agreement']:.4g} % |"
            )
        percent = three_digits(floor["percent_of_floor"])
        lines.append(f"| | floor ({floor['limit']}) | {duration(floor['ns'])} | ours is at {percent} % of it | | | |")
    return "\n".join(lines)


def amount(count: float) -> str:
    for unit, size in ((" G", 1e9), (" M", 1e6)):
        if count >= 0.9995 * size:
            return f"{three_digits(count / size)}{unit}"
    return f"{count:.0f}"


def systems_tables(result: Mapping[str, Any]) -> str:
    """What `rqgen bench systems` counted and measured, as markdown."""
    machine, settings, peaks, systems = (result[key] for key in ("machine", "settings", "peaks", "systems"))
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("python", "rqkernels", "torch"))
    commit = (machine["commit"] or "unknown")[:12] + (
        " with uncommitted changes" if machine["uncommitted_changes"] else ""
    )
    names, first = [system["name"] for system in systems], [system["counted_per_image"][0] for system in systems]
    counted = {
        "codes": [f"{system['codes']}: {system['number_of_codes']} of {system['codebook_size']}" for system in systems],
        "layers": [" + ".join(map(str, system["layers"])) for system in systems],
        "parameters": [amount(system["parameters"]) for system in systems],
        "steps, one after another": [" + ".join(map(str, system["steps"])) for system in systems],
        "operations: products with weights": [amount(work["products"]) for work in first],
        "operations: attention": [amount(work["attention"]) for work in first],
        **{
            f"weights read, batch {works[0]['batch']}": [amount(work["weights"]) for work in works]
            for works in zip(*(system["counted_per_image"] for system in systems), strict=True)
        },
        "keys and values moved": [amount(work["states"]) for work in first],
    }
    side, width = settings["image_side"], settings["width"]
    lines = [
        *markdown(
            [
                {f"per image of {side} x {side}, width {width}": label, **dict(zip(names, cells, strict=True))}
                for label, cells in counted.items()
            ]
        ),
        "",
        f"Measured: {machine['device']}, {machine['threads']} threads, {'warm' if machine['malloc'] else 'COLD'} heap, "
        f"{versions}, commit {commit}, {machine['time']}. Copy {peaks['copy_bytes_per_s'] / 1e9:.3g} GB/s, "
        + ", ".join(f"{name} {rate / 1e9:.4g}" for name, rate in peaks["operations_per_s"].items())
        + " GFLOP/s.",
        "",
    ]
    return "\n".join([*lines, *markdown([_measured(case) for case in result["cases"]])])


def _measured(case: Mapping[str, Any]) -> dict[str, str]:
    guided = f", guidance {case['guidance']:g}" if case["guidance"] else ""
    decoder, peak = case["decoder_ms_per_image"], case["peak_bytes"]
    return {
        "batch": str(case["batch"]),
        "system": f"{case['system']}, {case['precision']}{guided}",
        "codes, ms per image": three_digits(case["ar_ms_per_image"]),
        "least - most": " - ".join(map(three_digits, case["ar_ms_per_image_min_max"])),
        "images/s": three_digits(case["images_per_s_ar_only"]),
        "% of the floor": three_digits(case["percent_of_floor"]),
        **({} if decoder is None else {"decoder, ms": three_digits(decoder)}),
        **({} if peak is None else {"peak memory": memory(peak)}),
    }


def markdown(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A table of rows that all have the same columns."""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each JSON file: by shape, how many times as long as ours each contender takes per row.

    The definition in float64 is left out: it is there to be right, and far off every scale.
    """
    # Text stays text, and nothing in the file comes from a clock or a random number.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rqkernels", "font.size": 8})
    heights = [len(result["cases"]) for result in results]
    figure, panels = plt.subplots(
        len(results),
        figsize=(8, 1.2 * len(results) + 0.35 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for result, panel in zip(results, panels[:, 0], strict=True):
        points: dict[str, list[tuple[float, int]]] = {}
        for place, case in enumerate(result["cases"]):
            panel.axhline(place, color="0.9", linewidth=0.8, zorder=0)
            for contender in case["contenders"][1:]:
                if not contender["name"].startswith("reference"):
                    points.setdefault(contender["name"], []).append((contender["times_ours_per_row"], place))
        for name, marker in zip(points, "osD^vPX*" * len(points), strict=False):
            panel.scatter(*zip(*points[name], strict=True), marker=marker, label=name, s=24)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(title=f"{result['slug']}: {result['environment']['device']}", xscale="log")
        panel.set_xlabel("time per row / ours (right of the line ours is faster)")
        shown = panel.get_xlim()
        ticks = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]
        panel.set_xticks([tick for tick in ticks if shown[0] <= tick <= shown[1]])
        panel.minorticks_off()
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_yticks(range(len(result["cases"])), [case["case"] for case in result["cases"]])
        panel.invert_yaxis()
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def render(results: Path, readme: Path) -> None:
    """Replaces what stands between the markers, and draws the plot.

    Raises:
        ValueError: the file does not hold both markers of a table, in their order.
    """
    contents = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    measured = [content for content in contents if "slug" in content]
    if (results / SYSTEMS).exists():
        systems = systems_tables(json.loads((results / SYSTEMS).read_text()))
        _harness.write_between(readme, *markers("systems"), systems)
    _harness.write_between(readme, *markers("results"), "\n\n".join(map(table, measured)))
    if measured:
        plot(measured, results / "speedup.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Render the benchmark tables.")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    args = parser.parse_args()
    render(args.results, args.readme)
