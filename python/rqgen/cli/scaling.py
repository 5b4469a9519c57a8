"""`rqgen scaling`: train a family of VARs for equal tokens and fit power laws to their test loss and token error."""

from __future__ import annotations

import csv
import io
import logging
import shlex
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console

from rqgen.bench.machine import environment
from rqgen.config import Given, given, to_dict
from rqgen.data import ImageDataset, open_dataset
from rqgen.data.settings import saved_settings
from rqgen.evaluation import evaluate_token_prediction, fit_power_law
from rqgen.files import is_temporary, write_json, write_text
from rqgen.models import MultiScaleVQVAE
from rqgen.reading import read_json
from rqgen.report import plot_scaling, power_of_ten
from rqgen.systems.system import check_one_split
from rqgen.systems.var import VARPriorRun, VARTokenizerRun
from rqgen.training import VARPriorConfig, newest_whole_checkpoint, refuse_other_run

from .errors import naming
from .models import Loaded, check_images_fit
from .outputs import output_folder
from .requests import ScalingRequest
from .runs import (
    absolute,
    check_batch_size,
    check_prior,
    fit_prior,
    fit_tokenizer,
    interruptible,
    sketch_tokenizer,
    with_absolute_paths,
)
from .settings import RECIPES, data_of_tokenizer, find_config

logger = logging.getLogger(__name__)

# Attribute of `TokenPrediction` that is fitted -> its title in the figure.
CURVES = {
    "loss": "test loss, all scales",
    "last_scale_loss": "test loss, last scale",
    "error_rate": "token error rate, all scales",
    "last_scale_error_rate": "token error rate, last scale",
}
# Keys of a member's metrics.json.
MEASURED = {
    *("depth", "width", "block_parameters", "parameters", "training_tokens", "learning_rate", "training_loss"),
    *CURVES,
    *("seconds", "codebook"),
}
# Settings of a prior that its depth decides.
DECIDED = ("preset", "embed_dim", "layers", "heads", "drop_path")


@dataclass
class ScalingConfig:
    """A family of priors on one tokenizer: all see the same batches in the same order, and as many."""

    recipe: ClassVar[str] = "digits_scaling"
    depths: list[int] = field(default_factory=lambda: [2, 3, 4, 6])
    """Each N is a VAR of the published shape "dN": N layers of width 64 N, N heads, drop path 0.1 N / 24."""
    tokenizer: VARTokenizerRun = field(default_factory=VARTokenizerRun)
    """Trained first, unless a trained one is given."""
    prior: VARPriorRun = field(default_factory=VARPriorRun)
    """Settings of every member; ``prior.data`` follows ``tokenizer.data``, and ``prior.tokenizer`` is not read. The
    learning rate is that of depth 1, width 64: depth N has it divided by N, as wider layers need smaller steps."""

    @classmethod
    def implied(cls, given: Given[Any]) -> dict[str, Any]:
        """Both stages read the same images."""
        return {"prior": {"data": to_dict(given.read("tokenizer.data"))}}

    def __post_init__(self) -> None:
        if len(set(self.depths)) != len(self.depths):
            raise ValueError(f"depths: expected each size once, got {self.depths}")
        if len(self.depths) < 3:
            raise ValueError(f"depths: a fit needs at least three sizes, got {self.depths}")
        if min(self.depths) < 1:
            raise ValueError(f"depths: expected numbers of layers, got {self.depths}")
        if self.prior.codes is not None:
            raise ValueError("prior.codes: a family learns from prior.data, and is tested on what that holds out")
        for name in DECIDED:
            given = getattr(self.prior.prior, name)
            if given != getattr(VARPriorConfig(), name):
                raise ValueError(f"prior.prior.{name}: depths decide it, but it is set to {given!r}")
        if self.prior.data.held_out_fraction == 0:
            stage = "tokenizer" if self.tokenizer.data.held_out_fraction == 0 else "prior"  # the other follows
            raise ValueError(f"{stage}.data.held_out_fraction: 0 leaves no images to test on")

    def member(self, depth: int) -> VARPriorRun:
        """Return the training run of one size."""
        prior = replace(self.prior.prior, preset=f"d{depth}")
        optimizer = self.prior.loop.optimizer
        optimizer = replace(optimizer, learning_rate=optimizer.learning_rate / depth)
        return replace(self.prior, prior=prior, loop=replace(self.prior.loop, optimizer=optimizer))


def scale(request: ScalingRequest, *, console: Console | None = None) -> dict[str, Any]:
    """Run the command: see `run_scaling`."""
    with output_folder(request.out, "--out"):
        pass  # tried before the tokenizer is read
    config = load_scaling(find_config(request.config), request.overrides, request.tokenizer)
    return run_scaling(config, request.out, tokenizer=request.tokenizer, resume=request.resume, console=console)


def summary(result: dict[str, Any], out: Path) -> list[str]:
    """Return the fitted laws and the files to look at, as lines."""
    lines = []
    for law in result["laws"]:
        beta = power_of_ten(law["log_beta"])
        lines.append(f"{law['title']}: ({beta} N)^{law['alpha']:.4f}, correlation {law['correlation']:.4f}")
    files = f"{out / 'scaling.csv'}, {out / 'scaling.png'}"
    return [*lines, f"table and figure of {len(result['members'])} sizes: {files}"]


def load_scaling(config: Path | None, overrides: Sequence[str] = (), tokenizer: Path | None = None) -> ScalingConfig:
    """Return the settings of a file (None: the recipe for digits), changed by ``overrides``. The images follow the
    trained ``tokenizer``, if there is one."""
    settings = given(ScalingConfig, config, overrides, recipes=RECIPES)
    if tokenizer is None:
        return settings.build()
    vae = _read_tokenizer(tokenizer)
    data = data_of_tokenizer(Loaded(vae, tokenizer), settings, "prior.data.")
    return settings.build({"prior": {"data": data}})


def _read_tokenizer(folder: Path) -> MultiScaleVQVAE:
    with naming({"folder": "--tokenizer"}):
        return MultiScaleVQVAE.from_pretrained(folder)


def run_scaling(
    config: ScalingConfig, out: Path, *, tokenizer: Path | None, resume: bool, console: Console | None = None
) -> dict[str, Any]:
    """Train every member, test it on held-out images and fit the laws. Write into ``out``: scaling.csv (a row per
    member), scaling.json (the same, the laws, settings, environment), scaling.png, tokenizer/ (where ``tokenizer`` is
    None) and a folder per member. Return the content of scaling.json.

    Every member is tested after its last update: none is selected by its test loss. With ``resume``, members
    that are finished are not trained again, and one with a checkpoint is resumed; ``depths`` may then have
    changed.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: ``out`` holds another run, or none to resume; no tokenizer
            there; images that do not fit it, without classes, or none held out; figures that no law fits.
    """
    command = f"rqgen scaling --out {shlex.quote(str(out))} --resume, with the same settings"
    with interruptible(lambda: f"resume with: {command}"), output_folder(out, "--out"):
        return _run_scaling(config, out, tokenizer=tokenizer, resume=resume, console=console)


def _run_scaling(
    config: ScalingConfig, out: Path, *, tokenizer: Path | None, resume: bool, console: Console | None
) -> dict[str, Any]:
    config = _with_absolute_images(config, out / "run.json" if resume else None)
    held_out = open_dataset(config.prior.data, "held_out")
    if len(held_out) == 0 or not held_out.class_names:
        raise ValueError("prior.data: a family is trained on images with classes, and tested on held-out ones")
    vae = None if tokenizer is None else _read_tokenizer(tokenizer)
    check_images_fit(config.prior.data, config.tokenizer.model if vae is None else vae.config)
    train = open_dataset(config.prior.data, "train")
    if vae is None:
        check_one_split(config.tokenizer.data, config.prior.data)
        check_batch_size(config.tokenizer.loop, len(train), prefix="tokenizer.")
    sketch = sketch_tokenizer(config.tokenizer, train.class_names) if vae is None else vae
    for depth in config.depths:
        try:
            check_prior(config.member(depth), sketch, train, prefix="prior.")
        except ValueError as error:
            raise ValueError(f"depth {depth}: {error}") from error
    _describe(out, {"tokenizer": tokenizer and str(absolute(tokenizer)), "config": to_dict(config)}, resume=resume)
    tokenizer_seconds = None
    if vae is None:
        vae, tokenizer_seconds = _tokenizer(config, out / "tokenizer", console)
    members = []
    for depth in sorted(config.depths):
        run, folder = config.member(depth), out / f"d{depth}"
        members.append(_member(run, vae, held_out, depth=depth, folder=folder, console=console))
        logger.info("d%(depth)d: %(block_parameters)d parameters in blocks, test loss %(loss).4f", members[-1])
    # Before the fits, which may find that there is no law.
    write_text(out / "scaling.csv", _csv(members))
    sizes = [member["block_parameters"] for member in members]
    laws = []
    for name, title in CURVES.items():
        values = [member[name] for member in members]
        laws.append({"name": name, "title": title, "values": values, **asdict(fit_power_law(sizes, values))})
    plot_scaling(sizes, laws, out / "scaling.png")
    result = {
        "members": members,
        "laws": laws,
        "held_out_images": len(held_out),
        "tokens_per_image": vae.layout.count,
        "tokenizer": tokenizer and str(tokenizer),
        "tokenizer_seconds": tokenizer_seconds,
        "config": to_dict(config),
        "environment": environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    write_json(out / "scaling.json", result)
    return result


def _with_absolute_images(config: ScalingConfig, path: Path | None) -> ScalingConfig:
    """Return settings whose paths to images mean the same from every folder, as those of `rqgen train`; a path that is
    the same in the run.json at ``path`` is as written there."""
    saved = read_json(path).get("config") if path is not None and path.is_file() else None
    changed = {}
    for stage in ("tokenizer", "prior"):
        run = getattr(config, stage)
        before = saved.get(stage) if isinstance(saved, dict) else None
        data = before.get("data") if isinstance(before, dict) else None
        known = saved_settings(data) if isinstance(data, dict) else None
        changed[stage] = replace(run, data=with_absolute_paths(run.data, known))
    return replace(config, **changed)


def _describe(out: Path, description: dict[str, Any], *, resume: bool) -> None:
    """Write ``out``/run.json, or compare it with the file there."""
    path = out / "run.json"
    if not resume:
        if any(not is_temporary(entry) for entry in out.iterdir()):
            raise FileExistsError(f"{out} is not empty: --resume resumes a run there, or choose another --out")
    elif not path.is_file():
        raise FileNotFoundError(f"--resume: no run in {out}")
    else:
        saved = read_json(path)
        if isinstance(saved.get("config"), dict):
            # Members do not depend on each other, and know their tokenizer by its codebooks, wherever it lies.
            saved["config"]["depths"] = description["config"]["depths"]
            if saved.get("tokenizer") is not None and description["tokenizer"] is not None:
                saved["tokenizer"] = description["tokenizer"]
        refuse_other_run(saved, description, path)
    write_json(path, description)


def _tokenizer(config: ScalingConfig, folder: Path, console: Console | None) -> tuple[MultiScaleVQVAE, float]:
    """Return the tokenizer, trained or read if that is done, and the seconds of its training."""
    path = folder / "metrics.json"
    if not path.is_file():
        started = time.perf_counter()
        trained = fit_tokenizer(config.tokenizer, folder, resume=_checkpoint(folder), console=console)
        trained.model.save_pretrained(folder / "model")
        write_json(path, {"seconds": time.perf_counter() - started})
    return MultiScaleVQVAE.from_pretrained(folder / "model"), _metrics(path, {"seconds"})["seconds"]


def _member(
    run: VARPriorRun,
    vae: MultiScaleVQVAE,
    held_out: ImageDataset,
    *,
    depth: int,
    folder: Path,
    console: Console | None,
) -> dict[str, Any]:
    """Return a row of the table of a member that is trained and tested, or read if that is done."""
    path, codebook = folder / "metrics.json", vae.fingerprint()
    if path.is_file():
        done = _metrics(path, MEASURED)
        if done.pop("codebook") != codebook:
            raise ValueError(f"{folder}: trained on the tokens of another tokenizer; choose another --out")
        return done
    started = time.perf_counter()
    trained = fit_prior(run, vae, folder, resume=_checkpoint(folder), console=console)
    seconds = time.perf_counter() - started
    prior = trained.model
    prior.save_pretrained(folder / "model")
    images = run.loop.steps * run.loop.batch_size * run.loop.accumulation
    predicted = evaluate_token_prediction(prior, vae, held_out)
    member = {
        "depth": depth,
        "width": prior.config.embed_dim,
        "block_parameters": sum(parameter.numel() for parameter in prior.blocks.parameters()),
        "parameters": sum(parameter.numel() for parameter in prior.parameters() if parameter.requires_grad),
        "training_tokens": images * prior.layout.count,
        "learning_rate": run.loop.optimizer.learning_rate,
        # Of the last updates, with dropped conditions: compared with the test loss it shows how much was memorised.
        "training_loss": trained.history[-1]["loss"],
        **{name: getattr(predicted, name) for name in CURVES},
        "seconds": seconds,
    }
    write_json(path, {**member, "codebook": codebook})
    return member


def _checkpoint(folder: Path) -> Path | None:
    """Return the newest intact checkpoint, if any."""
    found = newest_whole_checkpoint(folder / "checkpoints")
    return None if found is None else found[0]


def _metrics(path: Path, names: Set[str]) -> dict[str, Any]:
    """Read the metrics.json of a finished model; ``names`` are its keys."""
    found = read_json(path)
    if found.keys() != names:
        odd = min(found.keys() ^ names)
        raise ValueError(
            f"{path}: '{odd}' is {'missing' if odd in names else 'unknown'}; remove the file to train again"
        )
    for name, value in found.items():
        if name != "codebook" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{path}: {name}: expected a number, got {value!r}")
    return found


def _csv(members: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(members[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(members)
    return text.getvalue()
