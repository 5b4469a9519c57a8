"""`rqgen edit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rqgen.data import image_grid, read_image, save_image
from rqgen.data.grid import check_image_name
from rqgen.files import claim_file
from rqgen.models import Prior
from rqgen.models.classes import class_label, names_of_classes
from rqgen.sampling import SamplingParams, edit

from .runs import load_model

KINDS = ("inpaint", "outpaint", "class")


@dataclass
class EditRequest:
    """``kind``: "inpaint" and "class" sample where the mask is white, "outpaint" where it is black."""

    kind: str
    image: Path
    mask: Path
    label: str | None
    prior: Path
    tokenizer: Path
    out: Path
    params: SamplingParams
    background: str = "white"
    """What shows through transparent pixels, of the image and of the mask."""


def edit_image(request: EditRequest) -> None:
    """Edits one image and writes a sheet: before, with the masked part greyed, after."""
    if request.kind not in KINDS:
        raise ValueError(f"edit: expected one of {', '.join(KINDS)}, got '{request.kind}'")
    if request.kind == "class" and request.label is None:
        raise ValueError("--label: edit class needs the class to sample")
    check_image_name(request.out, name="--out")
    with claim_file(request.out):
        _edit_image(request)


def _edit_image(request: EditRequest) -> None:
    prior, vae = load_model("prior", request.prior), load_model("tokenizer", request.tokenizer)
    image = _read(request.image, vae.image_channels, vae.image_shape, request.background).to(vae.device)
    mask = _read(request.mask, 1, vae.image_shape, request.background)[0].to(vae.device) > 0
    if request.kind == "outpaint":
        mask = ~mask
    if not bool(mask.any()):
        raise ValueError(f"--mask: {request.mask} leaves nothing to sample")
    label = None if request.label is None else _label(request.label, prior)
    images = image.unsqueeze(0)
    edited = edit(
        prior,
        vae,
        images,
        mask,
        None if label is None else [label],
        params=request.params,
    ).images
    masked = torch.where(mask, 0.0, images)
    save_image(image_grid(torch.cat([images, masked, edited]), columns=3), request.out, scale=2)


def _label(given: str, prior: Prior) -> int:
    return class_label(given, names_of_classes(prior) if prior.num_classes else (), "--label")


def _read(path: Path, channels: int, size: tuple[int, int], background: str) -> torch.Tensor:
    image = read_image(path, channels=channels, background=background)
    _, height, width = image.shape
    if (height, width) != tuple(size):
        raise ValueError(f"{path}: expected {size[1]}x{size[0]} pixels, got {width}x{height}")
    return image
