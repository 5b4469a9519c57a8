"""Training runs as the command line sees them: a configuration, a folder, a model at the end."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor

from rqgen.config import Given, from_dict, given, load, to_dict, to_yaml
from rqgen.data import DataConfig, EncodedImages, ImageDataset, TensorItems, image_grid, open_dataset, read_codes
from rqgen.files import claim, claim_folder, existing_folder, write_text
from rqgen.models import (
    RQVAE,
    VAR,
    MultiScaleVQVAE,
    MultiScaleVQVAEConfig,
    PretrainedModel,
    RQTransformer,
    RQVAEConfig,
    load_pretrained,
)
from rqgen.models.classes import names_of_classes, number_of_classes
from rqgen.models.pretrained import check_replaceable
from rqgen.quantizers.multiscale import scales_up_to
from rqgen.sampling import generate
from rqgen.training import (
    LoopConfig,
    PriorConfig,
    PriorStage,
    TokenizerStage,
    TrainingResult,
    VARPriorConfig,
    VARStage,
    check_memory,
    check_resumable,
    latest_checkpoint,
    newest_whole_checkpoint,
    prior_data,
    train,
    var_prior_items,
)

from .settings import RECIPES, data_of_tokenizer, find_config, warn_of_idle_options, warn_of_other_split

logger = logging.getLogger(__name__)

PREVIEW_COLUMNS, PREVIEW_CLASSES = 8, 10
# What a checkpoint of a prior says beside its settings.
CLASS_NAMES = "class_names"


@dataclass
class TokenizerRun:
    """`rqgen train tokenizer`."""

    recipe: ClassVar[str] = "digits_tokenizer"
    data: DataConfig = field(default_factory=DataConfig)
    """The images; ``model`` follows their size and channels."""
    model: RQVAEConfig = field(default_factory=RQVAEConfig)
    """The tokenizer."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """The training."""

    @classmethod
    def implied(cls, given: Given[Any]) -> dict[str, Any]:
        """The model takes images as ``data`` has them."""
        data = given.read("data")
        implied = {"image_channels": data.channels}
        if not given.has("model.resolution"):
            _feature_side(given, data)
            implied["resolution"] = data.resolution
        return {"model": implied}


@dataclass
class PriorRun:
    """`rqgen train prior`."""

    recipe: ClassVar[str] = "digits_prior"
    tokenizer: Path = Path("runs/tokenizer/model")
    """The folder of the trained tokenizer: the one with config.json and model.safetensors."""
    codes: Path | None = None
    """Learn from codes that `rqgen encode` wrote and not from images; ``data`` is then not read."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images. What is not given is as the tokenizer had it, flips and shifts aside."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """The prior, and what it learns."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """The training."""


@dataclass
class VARTokenizerRun(TokenizerRun):
    """`rqgen train tokenizer --system var`."""

    recipe: ClassVar[str] = "digits_var_tokenizer"
    model: MultiScaleVQVAEConfig = field(default_factory=MultiScaleVQVAEConfig)
    """The tokenizer."""

    @classmethod
    def implied(cls, given: Given[Any]) -> dict[str, Any]:
        """The model takes images as ``data`` has them; token maps are those published for the next larger images."""
        data = given.read("data")
        implied: dict[str, Any] = {"image_channels": data.channels}
        if not given.has("model.quantizer.scales"):
            side = _feature_side(given, data)
            try:
                implied["quantizer"] = {"scales": scales_up_to(side)}
            except ValueError as error:
                raise given.error(
                    "data.resolution", f"{data.resolution} needs model.quantizer.scales: {error}"
                ) from error
        return {"model": implied}


@dataclass
class VARPriorRun(PriorRun):
    """`rqgen train prior --system var`."""

    recipe: ClassVar[str] = "digits_var_prior"
    prior: VARPriorConfig = field(default_factory=VARPriorConfig)
    """The prior, and what it learns."""


def _feature_side(given: Given[Any], data: DataConfig) -> int:
    """Side of a tokenizer's feature map for images of ``data``."""
    levels = len(given.read("model.channel_multipliers"))
    stride = 2 ** min(max(levels - 1, 0), 32)
    if data.resolution % stride:
        below = data.resolution // stride * stride
        raise given.error(
            "data.resolution",
            f"expected a multiple of {stride}, as the model has {levels} levels (model.channel_multipliers), "
            f"such as {below or stride} or {below + stride if below else 2 * stride}; got {data.resolution}",
        )
    return data.resolution // stride


def _rq_prior(
    run: PriorRun, vae: RQVAE, source: ImageDataset | EncodedImages, console: Console | None
) -> tuple[PriorStage, ImageDataset | TensorItems]:
    prepared = prior_data(run.prior, vae, source, batch_size=run.loop.batch_size, console=console)
    if prepared.tau is not None:
        logger.info("temperature of soft labels: %.4g", prepared.tau)
    stage = PriorStage(
        run.prior.build(vae, len(source.class_names), source.class_names),
        vae,
        run.prior,
        kind=prepared.kind,
        tau=prepared.tau,
        seed=run.loop.seed,
        preview=_samples,
    )
    return stage, prepared.items


def _var_prior(
    run: VARPriorRun, vae: MultiScaleVQVAE, source: ImageDataset | EncodedImages, console: Console | None
) -> tuple[VARStage, ImageDataset | TensorItems]:
    items = var_prior_items(run.prior, vae, source, batch_size=run.loop.batch_size, console=console)
    prior = run.prior.build(vae, len(source.class_names), source.class_names)
    return VARStage(prior, vae, preview=_samples), items


@dataclass(frozen=True)
class System:
    """What differs between the systems on the command line."""

    name: str
    tokenizer: type[PretrainedModel]
    prior: type[PretrainedModel]
    tokenizer_run: type[TokenizerRun]
    prior_run: type[PriorRun]
    prior_stage: Callable[[Any, Any, Any, Console | None], tuple[Any, ImageDataset | TensorItems]]
    """(run, tokenizer, images or codes, console) -> the stage with a new prior, and what it learns from."""

    def run(self, stage: str) -> type[TokenizerRun] | type[PriorRun]:
        return self.tokenizer_run if stage == "tokenizer" else self.prior_run


SYSTEMS = {
    "rq": System("rq", RQVAE, RQTransformer, TokenizerRun, PriorRun, _rq_prior),
    "var": System("var", MultiScaleVQVAE, VAR, VARTokenizerRun, VARPriorRun, _var_prior),
}


def find_system(name: str) -> System:
    if name not in SYSTEMS:
        raise ValueError(f"--system: expected one of {', '.join(SYSTEMS)}, got '{name}'")
    return SYSTEMS[name]


def _system_of(run: TokenizerRun | PriorRun) -> System:
    return next(system for system in SYSTEMS.values() if type(run) in (system.tokenizer_run, system.prior_run))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(option: str, folder: Path) -> Any:
    """The model that ``--prior`` or ``--tokenizer`` (``option``) names, of whichever system. ValueError for a model of
    the other stage."""
    model, role = load_any_model(folder)
    if role != option:
        raise ValueError(f"--{option}: {folder} holds no {option}, but a {model.model_type}")
    return model


def load_any_model(folder: Path) -> tuple[Any, str]:
    """The model in a folder, and what it is: "tokenizer" or "prior"."""
    model = load_pretrained(folder, default_device())
    priors = tuple(system.prior for system in SYSTEMS.values())
    return model, "prior" if isinstance(model, priors) else "tokenizer"


def check_images_fit(data: DataConfig, model: RQVAEConfig | MultiScaleVQVAEConfig) -> None:
    """Raises ValueError where images of ``data`` are not what ``model`` takes."""
    if model.image_shape != (data.resolution, data.resolution):
        raise ValueError(
            f"data.resolution: {data.resolution}, but the tokenizer is for images of "
            f"{model.image_shape[0]}x{model.image_shape[1]}"
        )
    if data.channels != model.image_channels:
        raise ValueError(
            f"data.channels: {data.channels}, but the tokenizer is for images of {model.image_channels} channels"
        )


def check_one_split(tokenizer: DataConfig, prior: DataConfig) -> None:
    """Raises ValueError where the two stages would not hold out the same images."""
    first, second = to_dict(tokenizer), to_dict(prior)
    for name in {**first, **second}:
        if (ours := second.get(name)) != (theirs := first.get(name)):
            raise ValueError(
                f"prior.data.{name}: {ours}, but tokenizer.data.{name} is {theirs}: expected the same settings, "
                "one split for both"
            )


def train_stage(
    stage: Literal["tokenizer", "prior"],
    out: Path,
    *,
    system: str | None,
    config: str | None,
    overrides: Sequence[str],
    resume: bool,
    console: Console | None,
) -> None:
    """Trains a stage and saves it as ``out/model``; ``out`` keeps checkpoints, logs and configuration.

    A resumed run has the settings of its checkpoint; ``config`` and ``overrides`` need not be repeated, and may change
    what `check_resumable` lets them.

    Raises:
        FileExistsError: ``out`` holds a run, a model, or files of something else, and is not resumed.
        FileNotFoundError: there is nothing to resume.
        OSError: ``out`` cannot be written, or another process trains there.
        KeyboardInterrupt: its text says how to resume.
    """
    command = f"rqgen train {stage} --out {shlex.quote(str(out))} --resume"
    with interruptible(lambda: _how_to_go_on(out, command)), claim_folder(out), claim(out / "model"):
        check_replaceable(out / "model")
        checkpoint = None
        if resume:
            checkpoint, info = _checkpoint_of(stage, out)
            chosen = _system_that_wrote(info["description"], stage, system, checkpoint)
            saved = info["description"]
            recipes = None if config is None else RECIPES
            run = load(chosen.run(stage), find_config(config), overrides, defaults=saved, recipes=recipes)
            check_resumable(info, to_dict(run), checkpoint)
        else:
            chosen = find_system(system or "rq")
            run = load_run(chosen.run(stage), config, overrides)
            _refuse_occupied(out, type(run))
        if isinstance(run, PriorRun):
            vae = _tokenizer_of(run)
            _write_config(run, out)
            result = fit_prior(run, vae, out, resume=checkpoint, console=console)
        else:
            check_images_fit(run.data, run.model)
            _write_config(run, out)
            result = fit_tokenizer(run, out, resume=checkpoint, console=console)
        result.model.save_pretrained(out / "model")


def _tokenizer_of(run: PriorRun) -> RQVAE | MultiScaleVQVAE:
    """The trained tokenizer that a run names. ValueError where its images are not the run's."""
    vae = _read_tokenizer(type(run), run.tokenizer)
    if run.codes is None:
        check_images_fit(run.data, vae.config)
    return vae  # type: ignore[return-value]


def load_run(
    cls: type[TokenizerRun] | type[PriorRun], config: str | None, overrides: Sequence[str]
) -> TokenizerRun | PriorRun:
    """The settings of a training: a file or shipped recipe (None: that of digits), then ``overrides``. What is not said
    of a prior's images is as its tokenizer had it, see `data_of_tokenizer`."""
    settings = given(cls, find_config(config), overrides, recipes=RECIPES)
    if not issubclass(cls, PriorRun) or settings.read("codes") is not None:
        run = settings.build()
        warn_of_idle_options(run.data, "data.")
        return run
    for part in ("prior", "loop"):
        settings.read(part)  # refuses what is wrong here before a large file is read
    folder = settings.read("tokenizer")
    vae = _read_tokenizer(cls, folder)
    run = settings.build({"data": data_of_tokenizer(vae, settings, "data.", folder)}, where=str(folder))
    warn_of_idle_options(run.data, "data.")
    warn_of_other_split(run.data, vae, folder)
    return run


def _read_tokenizer(cls: type[PriorRun], folder: Path) -> RQVAE | MultiScaleVQVAE:
    """The trained tokenizer at ``folder``. ValueError for one that the run's system has no use for."""
    system = next(system for system in SYSTEMS.values() if system.prior_run is cls)
    vae = load_pretrained(folder)
    if not isinstance(vae, system.tokenizer):
        raise ValueError(
            f"tokenizer: --system {system.name} expects a {system.tokenizer.model_type}, "
            f"got a {vae.model_type} in {folder}"
        )
    return vae  # type: ignore[return-value]


def fit_tokenizer(
    run: TokenizerRun, folder: Path, *, resume: Path | None = None, console: Console | None = None
) -> TrainingResult[RQVAE] | TrainingResult[MultiScaleVQVAE]:
    """Trains from scratch, or from the checkpoint ``resume``; writes what ``run.loop`` asks for to
    ``folder``."""
    tokenizer = _system_of(run).tokenizer
    check_memory("model", lambda: tokenizer(run.model))
    images = open_dataset(run.data, "train")
    set_seed(run.loop.seed)
    model = tokenizer(replace(run.model, class_names=images.class_names))
    model.data = to_dict(run.data)
    stage = TokenizerStage(model, _examples(run.data, images))
    return train(stage, images, run.loop, folder, description=to_dict(run), resume=resume, console=console)


def fit_prior(
    run: PriorRun,
    vae: RQVAE | MultiScaleVQVAE,
    folder: Path,
    *,
    resume: Path | None = None,
    console: Console | None = None,
) -> TrainingResult[RQTransformer] | TrainingResult[VAR]:
    """As `fit_tokenizer`, for the codes of ``vae`` (``run.tokenizer`` is not read)."""
    source = read_codes(run.codes) if run.codes is not None else open_dataset(run.data, "train")
    system = _system_of(run)
    try:
        wanted = run.prior.model_config(vae, len(source.class_names))
    except ValueError as error:
        raise ValueError(f"prior: {error}") from error
    check_memory("prior", lambda: system.prior(wanted))
    vae.to(default_device())
    # Preparing what is learnt draws nothing: the weights of a new prior are the seed's first numbers.
    set_seed(run.loop.seed)
    stage, items = system.prior_stage(run, vae, source, console)
    stage.model.data = None if run.codes is not None else to_dict(run.data)
    # A class folder more or less would give labels another meaning in the middle of a run.
    description = {**to_dict(run), CLASS_NAMES: list(source.class_names)}
    return train(stage, items, run.loop, folder, description=description, resume=resume, console=console)


def _checkpoint_of(stage: str, out: Path) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint of a run and its info."""
    found = newest_whole_checkpoint(out / "checkpoints")
    if found is None:
        raise FileNotFoundError(f"--resume: no checkpoint in {out / 'checkpoints'}")
    path, info = found
    if info["stage"] != stage:
        raise ValueError(f"--resume: {out} holds the run of a {info['stage']}, not of a {stage}")
    settings = {name: value for name, value in info["description"].items() if name != CLASS_NAMES}
    return path, {**info, "description": settings}


def _system_that_wrote(description: dict[str, Any], stage: str, asked: str | None, checkpoint: Path) -> System:
    """Finds the system by the settings of a run."""
    systems = SYSTEMS.values() if asked is None else [find_system(asked)]
    for system in systems:
        try:
            from_dict(system.run(stage), description, where=str(checkpoint))
        except ValueError as error:
            fault = error
        else:
            return system
    raise fault


def _refuse_occupied(out: Path, run: type[TokenizerRun] | type[PriorRun]) -> None:
    """Raises FileExistsError where a new run would replace something in ``out``."""
    if latest_checkpoint(out / "checkpoints") is not None:
        raise FileExistsError(f"{out} already holds a run: --resume goes on with it, or choose another --out")
    model = existing_folder(out / "model")
    if model.exists() and any(model.iterdir()):
        raise FileExistsError(f"{out} already holds a trained model and no checkpoint: choose another --out")
    config = out / "config.yaml"
    if config.exists():
        try:
            load(run, config, recipes=RECIPES)
        except (OSError, ValueError) as error:
            raise FileExistsError(f"{config} is not the config of such a run: choose another --out") from error
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
    """Adds to a KeyboardInterrupt how to resume."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = (hint(),)
        raise


def _examples(data: DataConfig, training_images: ImageDataset) -> Tensor:
    """A few images to watch: held-out ones, where there are any."""
    held_out = open_dataset(data, "held_out") if data.held_out_fraction else training_images
    images = held_out if len(held_out) else training_images
    return torch.stack([images.item(index, 0)[0] for index in range(min(PREVIEW_COLUMNS, len(images)))])


def _samples(prior: RQTransformer | VAR, vae: RQVAE | MultiScaleVQVAE) -> dict[str, Tensor]:
    """The same few draws at every call, so that progress can be seen: of the first classes a row each."""
    classes = min(number_of_classes(prior), PREVIEW_CLASSES)
    if not classes:
        drawn = generate(prior, vae, None, 4 * PREVIEW_COLUMNS, seed=0)
        return {"samples": image_grid(drawn.images, columns=PREVIEW_COLUMNS)}
    columns = PREVIEW_COLUMNS // 2
    drawn = generate(prior, vae, torch.arange(classes).repeat_interleave(columns), seed=0)
    return {"samples": image_grid(drawn.images, columns=columns, row_labels=names_of_classes(prior)[:classes])}
