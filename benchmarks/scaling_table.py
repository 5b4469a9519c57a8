"""Write the results of a run of `rqgen scaling` into docs/scaling.md.

    rqgen scaling --out runs/scaling
    python benchmarks/scaling_table.py runs/scaling

Copies the run's JSON to benchmarks/results/scaling-digits.json and its figure to docs/scaling.png, and writes the
tables of docs/scaling.md, between two markers, from that JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _harness

from rqgen.report import power_of_ten

BEGIN, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"
RESULTS = _harness.ROOT / "benchmarks" / "results" / "scaling-digits.json"
DOCS = _harness.ROOT / "docs" / "scaling.md"


def tables(result: Mapping[str, Any]) -> str:
    """Format a table with a row per model and one with a row per law."""
    environment, members, loop = result["environment"], result["members"], result["config"]["prior"]["loop"]
    seconds = sum(member["seconds"] for member in members) + (result["tokenizer_seconds"] or 0)
    lines = [
        f"{environment['device']}, {_harness.described(environment)}. "
        f"{members[0]['training_tokens']} tokens each, in {loop['steps']} updates of {loop['batch_size']} images, seed "
        f"{loop['seed']}; tested on {result['held_out_images']} images of {result['tokens_per_image']} tokens. Trained "
        f"in {seconds / 60:.1f} minutes, tokenizer included.",
        "",
        "| d | N | all parameters | learning rate | training loss | test loss: all scales | last | "
        "token error: all scales | last | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for m in members:
        lines.append(
            f"| {m['depth']} | {m['block_parameters']:,} | {m['parameters']:,} | {m['learning_rate']:.2g} "
            f"| {m['training_loss']:.3f} | {m['loss']:.4f} | {m['last_scale_loss']:.4f} "
            f"| {100 * m['error_rate']:.2f} % | {100 * m['last_scale_error_rate']:.2f} % | {m['seconds']:.0f} |"
        )
    lines += ["", "| L | alpha | beta | correlation |", "|---|---|---|---|"]
    for law in result["laws"]:
        beta = power_of_ten(law["log_beta"])
        lines.append(f"| {law['title']} | {law['alpha']:.4f} | {beta} | {law['correlation']:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The tables and the figure of docs/scaling.md.")
    parser.add_argument("run", type=Path, help="the --out of `rqgen scaling`")
    args = parser.parse_args()
    try:
        _harness.write_between(DOCS, BEGIN, END, tables(json.loads((args.run / "scaling.json").read_text())))
    except ValueError as error:
        sys.exit(f"{args.run}: {error}")
    shutil.copyfile(args.run / "scaling.json", RESULTS)
    shutil.copyfile(args.run / "scaling.png", DOCS.with_suffix(".png"))
