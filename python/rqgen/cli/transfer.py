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
from rqgen.data.codes import check_codes_name, code_fingerprint
from rqgen.data.grid import check_image_name, grid_size
from rqgen.files import claim, claim_file
from rqgen.models import VAR, RQTransformer
from rqgen.models.classes import class_label, names_of_classes, number_of_classes
from rqgen.models.pretrained import check_replaceable
from rqgen.sampling import generate
from rqgen.training import encode_dataset

from .runs import check_images_fit, load_model
from .settings import load_encoding

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
            code_fingerprint(*vae.quantizer.code_tensors()),
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
    temperature: float
    top_k: int | None
    top_p: float | None
    cfg_scale: float | None
    seed: int
    precision: str
    use_graphs: bool
    batch_size: int


def sample_images(
    prior_folder: Path, tokenizer: Path, request: SampleRequest, out: Path, codes_file: Path | None
) -> int:
    """Draws images onto one sheet, a row per class with its name, and optionally writes their codes. Returns how
    many."""
    check_image_name(out, name="--out")
    if codes_file is not None:
        check_codes_name(codes_file, "--codes")
    with claim_file(out), contextlib.nullcontext() if codes_file is None else claim_file(codes_file):
        prior, vae = load_model("prior", prior_folder), load_model("tokenizer", tokenizer)
        classes, names = _labels(prior, request), names_of_classes(prior)
        labels, rows = None, ()
        if classes is not None:
            labels = torch.tensor(classes, device=prior.device).repeat_interleave(request.num)
            rows = tuple(names[label] for label in classes)
        height, width = grid_size(max(1, len(rows)) * request.num, request.num, vae.config.image_shape, row_labels=rows)
        check_image_name(out, size=(_SHEET_SCALE * height, _SHEET_SCALE * width), name="--out")
        drawn = generate(
            prior,
            vae,
            labels,
            None if labels is not None else request.num,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            cfg_scale=request.cfg_scale,
            seed=request.seed,
            precision=request.precision,
            use_graphs=request.use_graphs,
            batch_size=request.batch_size,
            progress=True,
        )
        save_image(image_grid(drawn.images, columns=request.num, row_labels=rows), out, scale=_SHEET_SCALE)
        if codes_file is not None:
            unlabelled = torch.full((len(drawn.images),), -1)
            encoded = EncodedImages(
                drawn.codes,
                unlabelled if labels is None else labels.cpu(),
                vae.codebook_size,
                code_fingerprint(*vae.quantizer.code_tensors()),
                names,
                {"prior": str(prior_folder), "tokenizer": str(tokenizer), "seed": request.seed},
            )
            write_codes(codes_file, encoded)
        return len(drawn.images)


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


def _labels(prior: RQTransformer | VAR, request: SampleRequest) -> list[int] | None:
    """The labels of the classes to draw; None for a prior without classes."""
    if isinstance(prior, RQTransformer) and prior.config.condition == "tokens":
        raise ValueError("prior: it is conditioned on tokens; draw from it in Python with rqgen.generate")
    if request.classes is not None:
        return [class_label(given, prior, "--class") for given in request.classes]
    return list(range(number_of_classes(prior))) or None
