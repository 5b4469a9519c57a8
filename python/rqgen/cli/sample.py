"""`rqgen sample`: new images on one sheet."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rqgen.data import EncodedImages, image_grid, save_image, write_codes
from rqgen.data.codes import check_codes_name, is_codes_file
from rqgen.data.grid import check_image_name, grid_size, is_saved_image
from rqgen.models import Prior, Tokenizer
from rqgen.models.classes import class_label, names_of_classes
from rqgen.sampling import Engine, SamplingParams, generate
from rqgen.sampling.generate import GenerateOutput
from rqgen.sampling.pipeline import Pipeline, read_class_names
from rqgen.training.memory import memory_limit

from .errors import naming
from .models import load_models, load_prior, load_tokenizer
from .outputs import output_file
from .requests import PRIOR, TOKENIZER, SampleRequest

# Pixels of a sheet for each of an image's, along each side.
_SHEET_SCALE = 2


@dataclass(frozen=True)
class LoadedModels:
    """A prior, its tokenizer, the names of the prior's classes, and the folders of both models."""

    prior: Prior
    tokenizer: Tokenizer
    class_names: tuple[str, ...]
    folders: dict[str, Path]


def sample_images(request: SampleRequest) -> int:
    """Sample images onto one sheet, a row per class with its name, and optionally write their codes. Return the number
    of images."""
    if request.run is not None and request.prior is not None:
        raise ValueError(f"--prior: expected none next to RUN, {request.run}, got {request.prior}")
    params, engine = SamplingParams(**asdict(request.sampling)), Engine(**asdict(request.engine))
    check_image_name(request.out, name="--out")
    if request.codes is not None:
        check_codes_name(request.codes, "--codes")
    with contextlib.ExitStack() as outputs:
        outputs.enter_context(output_file(request.out, "--out", is_saved_image))
        if request.codes is not None:
            outputs.enter_context(output_file(request.codes, "--codes", is_codes_file))
        models = _load(request)
        prior, vae = models.prior, models.tokenizer
        classes = _labels(models, request.classes)
        rows = tuple(models.class_names[label] for label in classes)
        _check_memory(max(1, len(rows)) * request.num, vae)
        height, width = grid_size(max(1, len(rows)) * request.num, request.num, vae.image_shape, row_labels=rows)
        check_image_name(request.out, size=(_SHEET_SCALE * height, _SHEET_SCALE * width), name="--out")
        labels = torch.tensor(classes, device=prior.device).repeat_interleave(request.num) if classes else None
        with naming({"vae": "--tokenizer" if request.run is None else f"RUN: {request.run}: tokenizer"}):
            sampled = generate(
                prior,
                vae,
                labels,
                num=request.num if labels is None else None,
                params=params,
                batch_size=request.batch_size,
                precision=engine,
                progress=True,
            )
        sheet = image_grid(sampled.images, columns=request.num, row_labels=rows)
        save_image(sheet, request.out, scale=_SHEET_SCALE)
        if request.codes is not None:
            write_codes(request.codes, _encoded(models, sampled, labels, seed=params.seed))
        return len(sampled.images)


def _load(request: SampleRequest) -> LoadedModels:
    """Load both models: those of RUN, see `load_models`, or each from the folder that its own option names."""
    if request.run is None:
        first, second = request.prior or PRIOR, request.tokenizer or TOKENIZER
        prior, tokenizer = load_prior(first), load_tokenizer(second)
        names = names_of_classes(prior)
        return LoadedModels(prior, tokenizer, class_names=names, folders={"prior": first, "tokenizer": second})
    found = load_models(request.run, request.tokenizer)
    if found.prior is None:
        raise ValueError(f"RUN: expected a folder with a prior, but {request.run} holds a tokenizer alone")
    if found.tokenizer is None:
        raise ValueError(f"--tokenizer: expected the tokenizer's folder, as {request.run} holds a prior alone")
    given = read_class_names(request.run)
    with naming({"class_names": f"RUN: {request.run}: class_names"}):
        pipeline = Pipeline(found.tokenizer.model, found.prior.model, class_names=given)
    folders = {role: loaded.folder for role, loaded in found.by_role().items()}
    return LoadedModels(pipeline.prior, pipeline.tokenizer, class_names=pipeline.class_names, folders=folders)


def _check_memory(count: int, vae: Tokenizer) -> None:
    """Raise ValueError for more images than fit in memory: as float32 twice while batches are joined, then as bytes on
    the sheet, which is enlarged."""
    values = vae.image_channels * vae.image_shape[0] * vae.image_shape[1]
    needed, there = count * values * max(8, 4 + 1 + 2 * _SHEET_SCALE**2), memory_limit()
    if needed > there:
        raise ValueError(
            f"--num: {count:,} images on one sheet take at least {needed / 2**30:,.1f} GiB, and this machine has "
            f"{there / 2**30:,.1f} GiB: sample fewer, or some at a time with --offset"
        )


def _labels(models: LoadedModels, wanted: Sequence[str]) -> list[int]:
    """Return the labels of the classes to sample; none for a prior without classes."""
    prior = models.prior
    if prior.condition_kind == "tokens":
        raise ValueError(
            f"--prior: {models.folders['prior']} is conditioned on tokens; sample from it in Python with rqgen.generate"
        )
    known = models.class_names if prior.num_classes else ()
    return [class_label(name, known, "--class") for name in wanted] or list(range(prior.num_classes))


def _encoded(models: LoadedModels, sampled: GenerateOutput, labels: torch.Tensor | None, *, seed: int) -> EncodedImages:
    """Return sampled codes as `write_codes` takes them."""
    unlabelled = torch.full((len(sampled.images),), -1)
    return EncodedImages(
        codes=sampled.codes,
        labels=unlabelled if labels is None else labels.cpu(),
        codebook_size=models.tokenizer.codebook_size,
        codebook_id=models.tokenizer.fingerprint(),
        class_names=models.class_names,
        info={**{name: str(folder) for name, folder in models.folders.items()}, "seed": seed},
    )
