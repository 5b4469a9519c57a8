"""Ablation of soft labels and stochastic codes: priors with all four combinations, over several seeds.

    python benchmarks/ablation_soft_labels.py --out runs/ablation [--seeds 0 1 2] [KEY=VALUE ...]

The recipe is that of `rqgen demo` (digits); KEY=VALUE changes its settings. Each seed trains one tokenizer, which its
four priors share; they also share initial weights, batches and sampling noise. The measures are

- sample accuracy, as in the demo: the share of 500 sampled digits that a classifier of real ones recognises,
- plain sample accuracy: the same without guidance and top-p, from the learned distribution,
- hard-label NLL, in nats per code: -log p(nearest code) on held-out digits, however the prior was trained.

An interrupted run continues where it stopped. Finished parts are in OUT/seed-S/VARIANT/metrics.json; at the end all of
it, with device, versions and commit, is written to benchmarks/results and as a table into docs/soft_labels.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _harness
import torch

from rqgen.cli.demo import load_demo, run_of
from rqgen.cli.runs import fit_prior, fit_tokenizer
from rqgen.config import to_dict
from rqgen.evaluation import evaluate
from rqgen.files import write_json
from rqgen.models.rqtransformer import RQTransformer
from rqgen.models.rqvae import RQVAE
from rqgen.systems.system import DemoConfig
from rqgen.training import latest_checkpoint
from rqkernels import _measure

VARIANTS = {
    f"{'soft' if soft else 'hard'}-labels-{'stochastic' if stochastic else 'nearest'}-codes": (soft, stochastic)
    for soft in (False, True)
    for stochastic in (False, True)
}
FIGURES = {
    "sample_accuracy": ("sample accuracy", 100, "%"),
    "plain_sample_accuracy": ("plain sample accuracy", 100, "%"),
    "hard_label_nll": ("hard-label NLL", 1, ""),
}
BEGIN, END = "<!-- ablation: begin -->", "<!-- ablation: end -->"


def tokenizer_of(config: DemoConfig, folder: Path) -> RQVAE:
    if not (folder / "model").is_dir():
        resume = latest_checkpoint(folder / "checkpoints")
        fit_tokenizer(config.tokenizer, folder, resume=resume).model.save_pretrained(folder / "model")
    return RQVAE.from_pretrained(folder / "model")


def prior_of(config: DemoConfig, vae: RQVAE, folder: Path, *, soft: bool, stochastic: bool) -> RQTransformer:
    if not (folder / "model").is_dir():
        settings = replace(config.prior.prior, soft_labels=soft, stochastic_codes=stochastic)
        run = replace(config.prior, prior=settings)
        resume = latest_checkpoint(folder / "checkpoints")
        fit_prior(run, vae, folder, resume=resume).model.save_pretrained(folder / "model")
    return RQTransformer.from_pretrained(folder / "model").to(vae.device)


def judged(config: DemoConfig, vae: RQVAE, prior: RQTransformer) -> dict[str, Any]:
    plain = replace(config.sampling, cfg_scale=None, top_p=None, top_k=None, temperature=1.0)
    metrics = evaluate(run_of(config, vae, prior), ["classifier", "token_prediction"]).results
    unguided = evaluate(run_of(replace(config, sampling=plain), vae, prior), ["classifier"]).results
    return {
        "sample_accuracy": metrics["classifier"]["sample_accuracy"],
        "plain_sample_accuracy": unguided["classifier"]["sample_accuracy"],
        "hard_label_nll": metrics["token_prediction"]["loss"],
        "hard_label_nll_per_depth": metrics["token_prediction"]["level_losses"],
    }


def run(out: Path, seeds: Sequence[int], overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Return one record per seed and variant."""
    records = []
    for seed in seeds:
        # The most that an interruption loses.
        often = [f"{stage}.loop.checkpoint_every=100" for stage in ("tokenizer", "prior")]
        config = load_demo(seed, [*often, *overrides])
        folder = out / f"seed-{seed}"
        refuse_other_settings(config, folder)
        vae = tokenizer_of(config, folder / "tokenizer")
        for name, (soft, stochastic) in VARIANTS.items():
            path = folder / name / "metrics.json"
            if not path.is_file():
                prior = prior_of(config, vae, folder / name, soft=soft, stochastic=stochastic)
                write_json(path, judged(config, vae, prior))
            record = json.loads(path.read_text())
            records.append({"seed": seed, "soft_labels": soft, "stochastic_codes": stochastic, **record})
            print(f"seed {seed}, {name}: {record}", flush=True)
    return records


def refuse_other_settings(config: DemoConfig, folder: Path) -> None:
    """Raise ValueError if `folder` holds runs of another configuration: they would be mistaken for this one's."""
    path, described = folder / "config.json", to_dict(config)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, described)
    elif json.loads(path.read_text()) != described:
        raise ValueError(f"--out: {folder} holds runs of other settings (see {path}); choose another folder")


def table(content: Mapping[str, Any]) -> str:
    """Format a row per variant: mean over the seeds, and the value of each seed."""
    environment, records = content["environment"], content["records"]
    seeds = sorted({record["seed"] for record in records})
    lines = [
        f"{environment['device']}, {_harness.described(environment)}. "
        f"Seeds {', '.join(map(str, seeds))}: mean (each seed).",
        "",
        "| labels | codes | " + " | ".join(title for title, _, _ in FIGURES.values()) + " |",
        "|---|---|" + "---|" * len(FIGURES),
    ]
    for soft, stochastic in VARIANTS.values():
        rows = [r for r in records if (r["soft_labels"], r["stochastic_codes"]) == (soft, stochastic)]
        cells = ["soft" if soft else "hard", "stochastic" if stochastic else "nearest"]
        for figure, (_, scale, unit) in FIGURES.items():
            values = [scale * row[figure] for row in rows]
            digits_shown = 1 if scale == 100 else 3
            each = ", ".join(f"{value:.{digits_shown}f}" for value in values)
            cells.append(f"{statistics.fmean(values):.{digits_shown}f} {unit}".rstrip() + f" ({each})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Soft labels and stochastic codes, on and off.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the demo, as for `rqgen demo`")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="models, checkpoints, metrics")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    results = Path(os.environ.get("RQK_BENCH_OUT", _harness.RESULTS))
    parser.add_argument("--json", type=Path, default=results / "ablation-soft-labels.json")
    parser.add_argument("--docs", type=Path, default=_harness.ROOT / "docs" / "soft_labels.md")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _harness.set_threads()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        state = _harness.clean_checkout(args.json.parent)
    except ValueError as error:
        sys.exit(str(error))
    records = run(args.out, args.seeds, args.overrides)
    content = {"environment": _measure.environment(device, state), "records": records}
    write_json(args.json, content)
    _harness.write_between(args.docs, BEGIN, END, table(content))
    print(table(content))
