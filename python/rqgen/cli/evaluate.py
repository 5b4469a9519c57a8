"""`rqgen evaluate`: every metric that fits, as JSON and as a table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rqgen.bench.machine import environment
from rqgen.config import given, read_yaml, to_dict
from rqgen.evaluation import Evaluation, EvaluationConfig, Run, evaluate
from rqgen.evaluation.metrics import METRICS, Row
from rqgen.evaluation.run import protocol
from rqgen.files import check_json_name, claim_file, existing_folder, file_checksum, write_json
from rqgen.models.pretrained import CONFIG_NAME, WEIGHTS_NAME
from rqgen.sampling import edit, generate

from .check import installed_versions
from .runs import check_images_fit, load_any_model, load_model
from .settings import RECIPES, data_of_models, find_config, warn_of_idle_options, warn_of_other_split


@dataclass
class Models:
    """The models of a folder; either may be missing."""

    tokenizer: Any = None
    tokenizer_folder: Path | None = None
    prior: Any = None
    prior_folder: Path | None = None


def evaluate_folder(
    folder: Path,
    out: Path,
    *,
    metrics: Sequence[str] | None = None,
    count: int | None = None,
    tokenizer: Path | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates the models of a folder (see `load_models`), writes the results to ``out``, and returns them.

    Args:
        metrics: names (None: all that fit).
        count: number of samples, in place of ``sampling.count``.
        tokenizer: folder of the tokenizer, in place of the one that is found.
        config, overrides: settings, see `EvaluationConfig`.

    Raises:
        ValueError: an unknown metric, or a named one that does not fit; settings that contradict the models.
        RuntimeError: a metric failed; ``out`` has the results of the others.
    """
    for name in metrics or ():
        METRICS.find(name, "--metric")
    check_json_name(out, "--out")
    with claim_file(out):
        settings = given(
            EvaluationConfig,
            find_config(config),
            [*overrides, *([] if count is None else [f"sampling.count={count}"])],
            recipes=RECIPES,
        )
        settings.build()  # refuses what is wrong before a large file is read
        models = load_models(folder, tokenizer)
        run = prepare(models, settings)
        started = time.perf_counter()
        found = evaluate(run, metrics, keep_going=not os.environ.get("RQGEN_DEBUG"))
        content = record(run, models, found, seconds=time.perf_counter() - started)
        write_json(out, content)
    if found.failed:
        told = "; ".join(f"{name}: {_told(error)}" for name, error in found.failed.items())
        raise RuntimeError(f"{len(found.failed)} of {len(found.seconds)} metrics failed ({told}); {out} has the others")
    return content


def load_models(folder: Path, tokenizer: Path | None = None) -> Models:
    """Loads the models of a folder: one with tokenizer/ and prior/ (either may be missing, and each may be the folder
    of a training run), the folder of one training run (a prior's config.yaml names its tokenizer), or a model's.

    Raises FileNotFoundError for another folder; otherwise as `load_model`.
    """
    folders = {name: _model_folder(folder / name) for name in ("tokenizer", "prior")}
    alone = _model_folder(folder)
    if alone is not None:
        model, role = load_any_model(alone)
        found = Models(**{role: model, f"{role}_folder": alone})
        if role == "prior" and tokenizer is None:
            tokenizer = _tokenizer_of_training(folder)
    elif any(folders.values()):
        found = Models()
        for role, path in folders.items():
            if path is not None and not (role == "tokenizer" and tokenizer is not None):
                setattr(found, role, load_model(role, path))
                setattr(found, f"{role}_folder", path)
    else:
        raise FileNotFoundError(
            f"{folder}: expected tokenizer/ and prior/, as `rqgen demo` writes them, or the folder of a model "
            f"({CONFIG_NAME} and {WEIGHTS_NAME})"
        )
    if tokenizer is not None:
        found.tokenizer, found.tokenizer_folder = load_model("tokenizer", tokenizer), tokenizer
    return found


def _model_folder(path: Path) -> Path | None:
    """The folder of a model: ``path`` itself, or model/ in it as in a training run; None without a model."""
    for folder in (path, path / "model"):
        if (existing_folder(folder) / CONFIG_NAME).is_file():
            return folder
    return None


def _tokenizer_of_training(folder: Path) -> Path | None:
    """The tokenizer that config.yaml of a prior's training run names, if it exists."""
    for path in (folder / "config.yaml", folder.parent / "config.yaml"):
        if path.is_file():
            named = read_yaml(path).get("tokenizer")
            if isinstance(named, str) and _model_folder(Path(named)) is not None:
                return Path(named)
    return None


def prepare(models: Models, settings: Any) -> Run:
    """Makes the run of models; settings of the images that were not given are those that the models were trained with.
    Raises ValueError where settings and models contradict each other."""
    vae, prior = models.tokenizer, models.prior
    below, no_images = data_of_models(models, settings, "data.")
    config = settings.build({"data": below})
    if no_images is None:
        warn_of_idle_options(config.data, "data.")
        if vae is not None:
            check_images_fit(config.data, vae.config)
        for role, model, folder in (
            ("tokenizer", vae, models.tokenizer_folder),
            ("prior", prior, models.prior_folder),
        ):
            if model is not None:
                warn_of_other_split(config.data, model, folder, role=role)
    return Run(config, tokenizer=vae, prior=prior, generate=generate, edit=edit, no_images=no_images)


def record(run: Run, models: Models, found: Evaluation, *, seconds: float) -> dict[str, Any]:
    """The content of the JSON file."""
    device = run.device
    described = {
        role: {"folder": str(folder), "model_type": model.model_type, "sha256": file_checksum(folder / WEIGHTS_NAME)}
        for role, model, folder in (
            ("tokenizer", models.tokenizer, models.tokenizer_folder),
            ("prior", models.prior, models.prior_folder),
        )
        if model is not None
    }
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
    """Formats rows as aligned lines of text, below a header."""
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
    """Formats the content of `record`: the table, and the reasons of what was not computed."""
    found = Evaluation({name: metric["result"] for name, metric in content["metrics"].items()})
    lines = table(found.rows())
    if content["not_computed"]:
        lines += ["", "not computed:", *(f"  {name}: {why}" for name, why in content["not_computed"].items())]
    return lines
