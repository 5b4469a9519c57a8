"""`rqgen encode`, `rqgen sample` and `rqgen convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from rqgen.config import load, to_dict
from rqgen.convert import load_kakaobrain, load_var
from rqgen.data import DataConfig, EncodedImages, Split, image_grid, open_dataset, save_png, write_codes
from rqgen.data.codes import code_fingerprint
from rqgen.models import VAR, RQTransformer
from rqgen.sampling import generate
from rqgen.training import encode_dataset

from .runs import check_images_fit, load_model, number_of_classes


def encode_images(
    tokenizer: Path, out: Path, overrides: Sequence[str], *, split: str, batch_size: int
) -> EncodedImages:
    """Encodes every image of a split and writes the codes. ``overrides`` are `DataConfig` settings;
    resolution and channels are the tokenizer's unless given."""
    if split not in get_args(Split):
        raise ValueError(f"split: expected one of {', '.join(get_args(Split))}, got '{split}'")
    vae = load_model("tokenizer", tokenizer)
    data = load(
        DataConfig,
        None,
        overrides,
        defaults={"resolution": vae.config.image_shape[0], "channels": vae.config.image_channels},
    )
    check_images_fit(data, vae.config)
    images = open_dataset(data, split)  # type: ignore[arg-type]
    codes, labels = encode_dataset(vae, images, batch_size=batch_size, codes=True)
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
    """``num`` images of every class in ``classes`` (None: of all classes), or ``num`` images without
    classes."""

    classes: list[int] | None
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
    """Draws images onto one sheet, a row per class, and optionally writes their codes. Returns how many."""
    prior, vae = load_model("prior", prior_folder), load_model("tokenizer", tokenizer)
    labels = _labels(prior, request)
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
    save_png(image_grid(drawn.images, columns=request.num), out, scale=2)
    if codes_file is not None:
        unlabelled = torch.full((len(drawn.images),), -1)
        encoded = EncodedImages(
            drawn.codes,
            unlabelled if labels is None else labels.cpu(),
            vae.codebook_size,
            code_fingerprint(*vae.quantizer.code_tensors()),
            () if labels is None else tuple(map(str, range(number_of_classes(prior)))),
            {"prior": str(prior_folder), "tokenizer": str(tokenizer), "seed": request.seed},
        )
        write_codes(codes_file, encoded)
    return len(drawn.images)


def convert_published(source: Path, destination: Path, tokenizer: Path | None) -> str:
    """Reads a published checkpoint and writes our format. Returns the name of the model's kind."""
    model = load_kakaobrain(source, tokenizer=tokenizer)
    model.save_pretrained(destination)
    return model.model_type


def convert_published_var(vae: Path, var: Path, config: Path | None, destination: Path) -> None:
    """Reads a published VAR and its tokenizer and writes both in our format."""
    tokenizer, prior = load_var(vae, var, config)
    tokenizer.save_pretrained(destination / "tokenizer")
    prior.save_pretrained(destination / "prior")


def _labels(prior: RQTransformer | VAR, request: SampleRequest) -> torch.Tensor | None:
    if isinstance(prior, RQTransformer) and prior.config.condition == "tokens":
        raise ValueError("prior: it is conditioned on tokens; draw from it in Python with rqgen.generate")
    classes = number_of_classes(prior)
    if classes == 0:
        if request.classes is not None:
            raise ValueError("--class: this prior knows no classes")
        return None
    chosen = list(range(classes)) if request.classes is None else request.classes
    for label in chosen:
        if not 0 <= label < classes:
            raise ValueError(f"--class: expected 0..{classes - 1}, got {label}")
    return torch.tensor(chosen, device=prior.device).repeat_interleave(request.num)
