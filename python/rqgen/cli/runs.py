"""Training runs of the command line: settings, a folder, and a model at the end."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor

from rqgen.config import from_dict, given, load, to_dict, to_yaml
from rqgen.data import DataConfig, EncodedImages, ImageDataset, open_dataset, read_codes
from rqgen.files import existing_folder, write_text
from rqgen.models import Prior, Tokenizer, load_pretrained
from rqgen.reading import name_some
from rqgen.systems import DEFAULT, all_systems, find_system, system_of
from rqgen.systems.system import PREVIEW_COLUMNS, PriorRun, System, TokenizerRun
from rqgen.training import (
    LoopConfig,
    TrainingResult,
    check_memory,
    check_resumable,
    latest_checkpoint,
    newest_whole_checkpoint,
    tokenizer_stage,
    train,
)
from rqgen.training.resume import IMAGES, saved_description

from .errors import naming
from .models import Loaded, check_images_fit, default_device
from .outputs import csv_with, output_folder
from .requests import TrainRequest
from .settings import RECIPES, data_of_tokenizer, find_config, warn_of_idle_options, warn_of_other_split

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

# Entries of a checkpoint next to the settings of its run: the system, the fingerprint of its images, of a prior the
# names of its classes and the fingerprint of its tokenizer's codebooks, and the checksums of a perceptual distance.
SYSTEM, CLASS_NAMES, CODEBOOK, PERCEPTUAL_FILES = "system", "class_names", "codebook", "perceptual_files"
_NOT_SETTINGS = (SYSTEM, CLASS_NAMES, CODEBOOK, PERCEPTUAL_FILES, IMAGES)

SettingsT = TypeVar("SettingsT", bound="DataclassInstance")


def train_stage(stage: Literal["tokenizer", "prior"], request: TrainRequest) -> Path:
    """Train a stage and save it as ``out``/model; ``out`` keeps checkpoints, logs and configuration. Return the folder
    of the model.

    A resumed run has the settings of its checkpoint; file and overrides need not be repeated, and may change what
    `check_resumable` lets them.

    Raises:
        FileExistsError: ``out`` holds a run, a model, or files of something else, and is not resumed.
        FileNotFoundError: there is nothing to resume.
        OSError: ``out`` cannot be written, or another process trains there.
        KeyboardInterrupt: its text says how to resume.
    """
    out, console = request.out, Console()
    command = f"rqgen train {stage} --out {shlex.quote(str(out))} --resume"
    files = {"config.yaml": lambda path: True, "history.csv": csv_with("step", "learning_rate")}  # see _refuse_occupied
    folders = ("checkpoints", "tensorboard")
    place = output_folder(out, "--out", files=files, folders=folders, models=["model"], is_ours=request.resume)
    with interruptible(lambda: _how_to_go_on(out, command)), place:
        checkpoint = None
        if request.resume:
            checkpoint, info = _checkpoint_of(stage, out)
            chosen = _system_that_wrote(info, stage, request.system, where=checkpoint)
            saved = _settings_in(info["description"])
            recipes = None if request.config is None else RECIPES
            file, overrides = find_config(request.config), request.overrides
            run = load(chosen.run(stage), file, overrides, defaults=saved, recipes=recipes)
            run = with_absolute_paths(run, saved)
            comparable = {**saved, IMAGES: info["description"].get(IMAGES)}
            check_resumable({**info, "description": comparable}, to_dict(run), checkpoint)
        else:
            chosen = find_system(request.system or DEFAULT)
            run = with_absolute_paths(load_run(chosen.run(stage), request.config, request.overrides))
            _refuse_occupied(out, type(run))
        started = functools.partial(_write_config, run, out)  # not before: a refused run changes nothing
        if isinstance(run, PriorRun):
            result = fit_prior(run, _tokenizer_of(run), out, resume=checkpoint, console=console, started=started)
        else:
            check_images_fit(run.data, run.model)
            if run.perceptual is not None:
                run.perceptual.files()
            result = fit_tokenizer(run, out, resume=checkpoint, console=console, started=started)
        result.model.save_pretrained(out / "model")
    return out / "model"


def _tokenizer_of(run: PriorRun) -> Tokenizer:
    """Return the trained tokenizer of a run. ValueError if it takes other images than the run's."""
    vae = _read_tokenizer(type(run), run.tokenizer)
    if run.codes is None:
        check_images_fit(run.data, vae.config)
    return vae


def load_run(
    cls: type[TokenizerRun] | type[PriorRun], config: str | None, overrides: Sequence[str]
) -> TokenizerRun | PriorRun:
    """Return the settings of a training: those of a file or recipe (None: the recipe for digits), changed by
    ``overrides``. Settings of a prior's images that are not given are the tokenizer's, see `data_of_tokenizer`."""
    settings = given(cls, find_config(config), overrides, recipes=RECIPES)
    if not issubclass(cls, PriorRun) or settings.read("codes") is not None:
        run = settings.build()
        warn_of_idle_options(run.data, "data.")
        return run
    for part in ("prior", "loop"):
        settings.read(part)  # refuses what is wrong here before a large file is read
    folder = settings.read("tokenizer")
    vae = _read_tokenizer(cls, folder)
    run = settings.build({"data": data_of_tokenizer(Loaded(vae, folder), settings, "data.")}, where=str(folder))
    warn_of_idle_options(run.data, "data.")
    warn_of_other_split(run.data, Loaded(vae, folder))
    return run


def _read_tokenizer(cls: type[PriorRun], folder: Path) -> Tokenizer:
    """Return the trained tokenizer in ``folder``. ValueError for a tokenizer of another system than the run's."""
    system = system_of(cls)
    if not existing_folder(folder).is_dir():
        where = "" if folder.is_absolute() else f" (relative to {Path.cwd()})"
        raise FileNotFoundError(f"tokenizer: no folder {folder}{where}: give tokenizer=FOLDER")
    with naming({"folder": "tokenizer"}):
        vae = load_pretrained(folder)
    if not isinstance(vae, system.tokenizer):
        raise ValueError(
            f"tokenizer: --system {system.name} expects a {system.tokenizer.model_type}, "
            f"got a {vae.model_type} in {folder}"
        )
    return vae


def fit_tokenizer(
    run: TokenizerRun,
    folder: Path,
    *,
    resume: Path | None = None,
    console: Console | None = None,
    started: Callable[[], None] | None = None,
) -> TrainingResult[Any]:
    """Train a tokenizer from scratch, or from the checkpoint ``resume``; write the files that ``run.loop`` asks for to
    ``folder``. ``started`` as `rqgen.training.train` takes it."""
    tokenizer = system_of(run).tokenizer
    known: dict[str, Any] = {SYSTEM: system_of(run).name}
    check_memory("model", lambda: tokenizer(run.model))
    losses: dict[str, Any] = {"adversarial": run.adversarial, "seed": run.loop.seed}
    if run.perceptual is not None:
        losses["perceptual"], known[PERCEPTUAL_FILES] = run.perceptual.build()
        losses["perceptual_weight"] = run.perceptual.weight
        for name, checksum in known[PERCEPTUAL_FILES].items():
            logger.info("perceptual.%s: SHA-256 %s", name, checksum)
    images = open_dataset(run.data, "train")
    check_batch_size(run.loop, len(images))
    if run.model.class_names and tuple(run.model.class_names) != tuple(images.class_names):
        raise ValueError(
            f"model.class_names: expected none, as the images' own are taken ({name_some(images.class_names)}), "
            f"got {name_some(run.model.class_names)}"
        )
    set_seed(run.loop.seed)
    model = tokenizer(replace(run.model, class_names=images.class_names))
    model.data = to_dict(run.data)
    stage = tokenizer_stage(model, _examples(run.data, images), **losses)
    description = {**to_dict(run), **known, IMAGES: images.fingerprint()}
    return train(
        stage,
        images,
        run.loop,
        folder=folder,
        description=description,
        resume=resume,
        console=console,
        started=started,
    )


def fit_prior(
    run: PriorRun,
    vae: Tokenizer,
    folder: Path,
    *,
    resume: Path | None = None,
    console: Console | None = None,
    started: Callable[[], None] | None = None,
) -> TrainingResult[Any]:
    """Train a prior on the codes of ``vae``, as `fit_tokenizer` (``run.tokenizer`` is not read)."""
    source = read_codes(run.codes) if run.codes is not None else open_dataset(run.data, "train")
    system = system_of(run)
    check_prior(run, vae, source)
    vae.to(default_device())
    # Preparing the items takes no random numbers: the weights of a new prior are the seed's first ones.
    set_seed(run.loop.seed)
    stage, items = system.prior_stage(run, vae, source, console=console)
    stage.model.data = None if run.codes is not None else to_dict(run.data)
    # A class folder more or less would give labels another meaning in the middle of a run.
    known = {
        SYSTEM: system.name,
        CLASS_NAMES: list(source.class_names),
        CODEBOOK: vae.fingerprint(),
        IMAGES: source.fingerprint(),
    }
    description = {**to_dict(run), **known}
    return train(
        stage,
        items,
        run.loop,
        folder=folder,
        description=description,
        resume=resume,
        console=console,
        started=started,
    )


def absolute(path: Path) -> Path:
    """Return a path that means the same from every folder; links in it stay."""
    return Path(os.path.abspath(path))


def with_absolute_paths(settings: SettingsT, saved: Mapping[str, Any] | None = None) -> SettingsT:
    """Return settings whose paths, those in sections included, mean the same from every folder: a run may be resumed,
    and its images be read, from another one. A path that is the same in ``saved``, plain data, is as written there."""
    changed: dict[str, Any] = {}

    def inside(section: Any, name: str) -> Any:
        found = (saved or {}).get(name)
        return with_absolute_paths(section, found if isinstance(found, Mapping) else None)

    for one in fields(settings):
        value = getattr(settings, one.name)
        if isinstance(value, Path):
            before = (saved or {}).get(one.name)
            is_same = isinstance(before, str) and absolute(Path(before)) == absolute(value)
            changed[one.name] = Path(before) if is_same and before else absolute(value)
        elif is_dataclass(value) and not isinstance(value, type):
            changed[one.name] = inside(value, one.name)
        elif isinstance(value, dict) and any(map(is_dataclass, value.values())):
            changed[one.name] = {name: inside(section, name) for name, section in value.items()}
    return replace(settings, **changed)


def check_prior(run: PriorRun, vae: Tokenizer, source: ImageDataset | EncodedImages, *, prefix: str = "") -> Prior:
    """Raise ValueError for settings of a prior that cannot be trained on codes of ``vae`` for ``source``. Return the
    prior on the device "meta". ``prefix`` leads to the run among the command's settings."""
    make = system_of(run).prior
    try:
        config = run.prior.model_config(vae, len(source.class_names))
    except ValueError as error:
        raise ValueError(f"{prefix}prior: {error}") from error
    check_memory(f"{prefix}prior", lambda: make(config))
    check_batch_size(run.loop, len(source.labels) if isinstance(source, EncodedImages) else len(source), prefix=prefix)
    with torch.device("meta"):
        return make(config)


def sketch_tokenizer(run: TokenizerRun, class_names: Sequence[str]) -> Tokenizer:
    """Return the tokenizer of a run on the device "meta": a prior's settings can be checked before it is trained."""
    with torch.device("meta"):
        return system_of(run).tokenizer(replace(run.model, class_names=tuple(class_names)))


def check_batch_size(loop: LoopConfig, count: int, *, prefix: str = "") -> None:
    """Raise ValueError for batches of more images than there are."""
    if loop.batch_size > count:
        raise ValueError(
            f"{prefix}loop.batch_size: expected at most the {count} images there are, got {loop.batch_size}"
        )


def _checkpoint_of(stage: str, out: Path) -> tuple[Path, dict[str, Any]]:
    """Return the newest intact checkpoint of a run and its info."""
    found = newest_whole_checkpoint(out / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"--resume: no checkpoint in {out / 'checkpoints'}")
    path, info = found
    if info["stage"] != stage:
        raise ValueError(f"--resume: {out} holds the run of a {info['stage']}, not of a {stage}")
    return path, info


def _settings_in(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in the description of a run."""
    return {name: value for name, value in saved_description(description).items() if name not in _NOT_SETTINGS}


def _system_that_wrote(info: dict[str, Any], stage: str, asked: str | None, *, where: Path) -> System:
    """Return the system of a run: by its name, or by its settings in a checkpoint that does not name it."""
    name = info["description"].get(SYSTEM)
    if name is not None and asked not in (None, name):
        raise ValueError(f"--system: expected {name}, as {where} has it, got '{asked}'")
    if name is not None:
        return find_system(name)
    systems = all_systems() if asked is None else [find_system(asked)]
    for system in systems:
        try:
            from_dict(system.run(stage), _settings_in(info["description"]), where=str(where))
        except ValueError as error:
            fault = error
        else:
            return system
    raise fault


def _refuse_occupied(out: Path, run: type[TokenizerRun] | type[PriorRun]) -> None:
    """Raise FileExistsError if a new run would replace something in ``out``."""
    if latest_checkpoint(out / "checkpoints") is not None:
        raise FileExistsError(f"{out} already holds a run: --resume resumes it, or choose another --out")
    model = existing_folder(out / "model")
    if model.exists() and any(model.iterdir()):
        raise FileExistsError(f"{out} already holds a trained model and no checkpoint: choose another --out")
    config = out / "config.yaml"
    if config.exists():
        try:
            is_ours = config.read_text(encoding="utf-8") == to_yaml(to_dict(load(run, config, recipes=RECIPES)))
        except (OSError, ValueError):
            is_ours = False
        if not is_ours:  # also where it is the user's, with comments, or with what differs from a recipe
            raise FileExistsError(f"{config} is not the config of such a run: choose another --out")
        logger.info("%s: starting over, since the run there saved no checkpoint", out)


def _write_config(run: TokenizerRun | PriorRun, out: Path) -> None:
    write_text(out / "config.yaml", to_yaml(to_dict(run)))


def _how_to_go_on(out: Path, command: str) -> str:
    newest = latest_checkpoint(out / "checkpoints")
    if newest is None:
        return f"no checkpoint in {out} yet: the same command starts over"
    return f"resume from {newest.name} with: {command}"


@contextlib.contextmanager
def interruptible(hint: Callable[[], str]) -> Iterator[None]:
    """Add to a KeyboardInterrupt how to resume."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = (hint(),)
        raise


def _examples(data: DataConfig, training_images: ImageDataset) -> Tensor:
    """Return a few images for previews: held-out ones, if there are any."""
    held_out = open_dataset(data, "held_out") if data.held_out_fraction else training_images
    images = held_out if len(held_out) else training_images
    return torch.stack([images.item(index, 0)[0] for index in range(min(PREVIEW_COLUMNS, len(images)))])
