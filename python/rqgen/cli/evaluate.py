"""`rqgen evaluate`: compute every metric that fits, as JSON and as a table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

from rqgen.bench.machine import environment
from rqgen.config import Given, given, to_dict
from rqgen.evaluation import Evaluation, EvaluationConfig, Run, evaluate
from rqgen.evaluation.metrics import METRICS, Row
from rqgen.evaluation.run import protocol
from rqgen.files import check_json_name, file_checksum, write_json
from rqgen.models.pretrained import WEIGHTS_NAME
from rqgen.sampling import edit, generate

from .check import installed_versions
from .models import Models, check_images_fit, load_models
from .outputs import json_with, output_file
from .requests import EvaluateRequest
from .settings import RECIPES, data_of_models, find_config, warn_of_idle_options, warn_of_other_split


def evaluate_folder(request: EvaluateRequest) -> dict[str, Any]:
    """Evaluate the models of a folder (see `load_models`), write the results, and return them. Settings are those of an
    `EvaluationConfig`; the number of samples and the folder of the tokenizer take precedence over what is found.

    Raises:
        ValueError: an unknown metric, or a named one that does not fit; settings that contradict the models.
        RuntimeError: a metric failed; the file has the results of the others.
    """
    out, count = request.out, request.count
    for name in request.metrics:
        METRICS.find(name, "--metric")
    check_json_name(out, "--out")
    with output_file(out, "--out", json_with("models", "metrics", "not_computed")):
        overrides = [*request.overrides, *([] if count is None else [f"sampling.count={count}"])]
        settings = given(EvaluationConfig, find_config(request.config), overrides, recipes=RECIPES)
        settings.build()  # refuses what is wrong before a large file is read
        models = load_models(request.run, request.tokenizer)
        run = prepare(models, settings)
        started = time.perf_counter()
        found = evaluate(run, request.metrics or None, keep_going=not os.environ.get("RQGEN_DEBUG"))
        content = record(run, models, found, seconds=time.perf_counter() - started)
        write_json(out, content)
    if found.failed:
        told = "; ".join(f"{name}: {_told(error)}" for name, error in found.failed.items())
        raise RuntimeError(f"{len(found.failed)} of {len(found.seconds)} metrics failed ({told}); {out} has the others")
    return content


def prepare(models: Models, settings: Given[EvaluationConfig]) -> Run:
    """Make the run of models; settings of the images that were not given are those that the models were trained with.
    Raise ValueError if settings and models contradict each other."""
    below, no_images = data_of_models(models, settings, "data.")
    config = settings.build({"data": below})
    vae, prior = models.tokenizer, models.prior
    if no_images is None:
        warn_of_idle_options(config.data, "data.")
        if vae is not None:
            check_images_fit(config.data, vae.model.config)
        for role, loaded in models.by_role().items():
            warn_of_other_split(config.data, loaded, role=role)
    return Run(
        config,
        tokenizer=None if vae is None else vae.model,
        prior=None if prior is None else prior.model,
        generate=generate,
        edit=edit,
        no_images=no_images,
    )


def record(run: Run, models: Models, found: Evaluation, *, seconds: float) -> dict[str, Any]:
    """Return the content of the JSON file."""
    there = models.by_role()
    described = {
        role: {
            "folder": str(loaded.folder),
            "model_type": loaded.model.model_type,
            "sha256": file_checksum(loaded.folder / WEIGHTS_NAME),
        }
        for role, loaded in there.items()
    }
    device = next(loaded.model.device for loaded in there.values())
    options = {name: None if (one := run.options(name)) is None else to_dict(one) for name in found.seconds}
    return {
        "models": described,
        "protocol": protocol(run),
        "seed": run.settings.sampling.seed,
        "metrics": {
            name: {"options": options[name], "result": result, "seconds": round(found.seconds[name], 3)}
            for name, result in found.results.items()
        },
        "not_computed": found.unfit,
        "failed": {name: _told(error) for name, error in found.failed.items()},
        "seconds": round(seconds, 3),
        "versions": installed_versions(),
        "environment": environment(device),
    }


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


def table(rows: Iterable[tuple[str, Row]]) -> list[str]:
    """Format rows as aligned lines of text, below a header."""
    cells, last = [("metric", "quantity", "value", "unit", "better")], None
    for name, row in rows:
        values = row.value if isinstance(row.value, list) else [row.value]
        shown = " ".join(str(value) if isinstance(value, int) else f"{value:.4g}" for value in values)
        cells.append(("" if name == last else name, row.quantity, shown, row.unit, row.better))
        last = name
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def report(content: dict[str, Any]) -> list[str]:
    """Format the content of `record`: the table, and the reason for each metric that was not computed."""
    found = Evaluation({name: metric["result"] for name, metric in content["metrics"].items()})
    lines = table(found.rows())
    if content["not_computed"]:
        lines += ["", "not computed:", *(f"  {name}: {why}" for name, why in content["not_computed"].items())]
    return lines
