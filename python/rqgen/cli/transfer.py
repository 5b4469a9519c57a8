"""`rqgen encode`, `rqgen sample` and `rqgen convert`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console

from rqgen.config import to_dict
from rqgen.convert import load_kakaobrain, load_var
from rqgen.data import EncodedImages, Split, image_grid, open_dataset, save_image, write_codes
from rqgen.data.codes import check_codes_name
from rqgen.data.grid import check_image_name, grid_size
from rqgen.files import claim, claim_file
from rqgen.models import Prior, Tokenizer
from rqgen.models.classes import class_label, names_of_classes
from rqgen.models.pretrained import check_replaceable
from rqgen.sampling import Engine, SamplingParams, generate
from rqgen.sampling.pipeline import Pipeline
from rqgen.training import encode_dataset

from .runs import check_images_fit, default_device, load_model
from .settings import load_encoding

DEFAULT_PRIOR, DEFAULT_TOKENIZER = Path("runs/prior/model"), Path("runs/tokenizer/model")
# Pixels of a sheet for each of an image's, along each side.
_SHEET_SCALE = 2


def encode_images(
    tokenizer: Path, out: Path, config: Path | None, overrides: Sequence[str], *, split: str, batch_size: int
) -> EncodedImages:
    """Encodes every image of a split and writes the codes. ``config`` and ``overrides`` are `DataConfig` settings, see
    `load_encoding`."""
    if split not in get_args(Split):
        raise ValueError(f"split: expected one of {', '.join(get_args(Split))}, got '{split}'")
    check_codes_name(out, "--out")
    with claim_file(out):
        vae = load_model("tokenizer", tokenizer)
        data = load_encoding(vae, tokenizer, config, overrides)
        check_images_fit(data, vae.config)
        images = open_dataset(data, split)  # type: ignore[arg-type]
        codes, labels = encode_dataset(vae, images, batch_size=batch_size, codes=True, console=Console(stderr=True))
        info = {"tokenizer": str(tokenizer), "split": split, "data": to_dict(data)}
        encoded = EncodedImages(
            codes,
            labels,
            vae.codebook_size,
            vae.fingerprint(),
            images.class_names,
            info,
        )
        write_codes(out, encoded)
        return encoded


@dataclass
class SampleRequest:
    """``num`` images of every class in ``classes``, by name or number (None: of all classes), or ``num`` images without
    classes."""

    classes: list[str] | None
    num: int
    params: SamplingParams
    engine: Engine
    batch_size: int


@dataclass
class ModelFolders:
    """Where a prior and its tokenizer are: in the folder of a run such as runs/demo, or each in its own."""

    run: Path | None = None
    prior: Path | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        if self.run is None:
            self.prior, self.tokenizer = self.prior or DEFAULT_PRIOR, self.tokenizer or DEFAULT_TOKENIZER
            return
        for name in ("prior", "tokenizer"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name}: expected none beside RUN, {self.run}, which holds both models")
            setattr(self, name, self.run / name)

    def load(self) -> tuple[Prior, Tokenizer, tuple[str, ...]]:
        """The models, and the names of the prior's classes."""
        if self.run is not None:
            pipeline = Pipeline.from_pretrained(self.run, default_device())
            return pipeline.prior, pipeline.tokenizer, pipeline.class_names
        prior, tokenizer = load_model("prior", self.prior), load_model("tokenizer", self.tokenizer)
        return prior, tokenizer, names_of_classes(prior)


def sample_images(models: ModelFolders, request: SampleRequest, out: Path, codes_file: Path | None) -> int:
    """Samples images onto one sheet, a row per class with its name, and optionally writes their codes. Returns how
    many."""
    check_image_name(out, name="--out")
    if codes_file is not None:
        check_codes_name(codes_file, "--codes")
    with claim_file(out), contextlib.nullcontext() if codes_file is None else claim_file(codes_file):
        prior, vae, names = models.load()
        classes = _labels(prior, names, request)
        labels, rows = None, ()
        if classes is not None:
            labels = torch.tensor(classes, device=prior.device).repeat_interleave(request.num)
            rows = tuple(names[label] for label in classes)
        height, width = grid_size(max(1, len(rows)) * request.num, request.num, vae.image_shape, row_labels=rows)
        check_image_name(out, size=(_SHEET_SCALE * height, _SHEET_SCALE * width), name="--out")
        sampled = generate(
            prior,
            vae,
            labels,
            None if labels is not None else request.num,
            params=request.params,
            batch_size=request.batch_size,
            precision=request.engine,
            progress=True,
        )
        save_image(image_grid(sampled.images, columns=request.num, row_labels=rows), out, scale=_SHEET_SCALE)
        if codes_file is not None:
            unlabelled = torch.full((len(sampled.images),), -1)
            encoded = EncodedImages(
                sampled.codes,
                unlabelled if labels is None else labels.cpu(),
                vae.codebook_size,
                vae.fingerprint(),
                names,
                {"prior": str(models.prior), "tokenizer": str(models.tokenizer), "seed": request.params.seed},
            )
            write_codes(codes_file, encoded)
        return len(sampled.images)


def convert_published(source: Path, destination: Path, tokenizer: Path | None) -> str:
    """Reads a published checkpoint and writes our format. Returns the name of the model's kind."""
    check_replaceable(destination)
    with claim(destination):
        model = load_kakaobrain(source, tokenizer=tokenizer)
        model.save_pretrained(destination)
        return model.model_type


def convert_published_var(vae: Path, var: Path, config: Path | None, destination: Path) -> None:
    """Reads a published VAR and its tokenizer and writes both in our format."""
    folders = [destination / "tokenizer", destination / "prior"]
    for folder in folders:
        check_replaceable(folder)
    with claim(folders[0]), claim(folders[1]):
        for model, folder in zip(load_var(vae, var, config), folders, strict=True):
            model.save_pretrained(folder)


def _labels(prior: Prior, names: Sequence[str], request: SampleRequest) -> list[int] | None:
    """The labels of the classes to sample; None for a prior without classes."""
    if prior.condition_kind == "tokens":
        raise ValueError("prior: it is conditioned on tokens; sample from it in Python with rqgen.generate")
    if request.classes is not None:
        known = names if prior.num_classes else ()
        return [class_label(given, known, "--class") for given in request.classes]
    return list(range(prior.num_classes)) or None
