"""`rqgen edit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rqgen.data import image_grid, read_image, save_png
from rqgen.files import claim_file
from rqgen.sampling import edit

from .runs import load_model, number_of_classes

KINDS = ("inpaint", "outpaint", "class")


@dataclass
class EditRequest:
    """``kind``: "inpaint" and "class" draw where the mask is white, "outpaint" where it is black."""

    kind: str
    image: Path
    mask: Path
    label: int | None
    prior: Path
    tokenizer: Path
    out: Path
    top_k: int | None
    top_p: float | None
    cfg_scale: float | None
    seed: int


def edit_image(request: EditRequest) -> None:
    """Edits one image and writes a sheet: before, with the masked part greyed, after."""
    if request.kind not in KINDS:
        raise ValueError(f"edit: expected one of {', '.join(KINDS)}, got '{request.kind}'")
    if request.kind == "class" and request.label is None:
        raise ValueError("--label: edit class needs the class to draw")
    with claim_file(request.out):
        _edit_image(request)


def _edit_image(request: EditRequest) -> None:
    prior, vae = load_model("prior", request.prior), load_model("tokenizer", request.tokenizer)
    height, width = vae.config.image_shape
    image = read_image(request.image, channels=vae.config.image_channels, size=(height, width)).to(vae.device)
    mask = read_image(request.mask, channels=1, size=(height, width))[0].to(vae.device) > 0
    if request.kind == "outpaint":
        mask = ~mask
    if not bool(mask.any()):
        raise ValueError(f"--mask: {request.mask} leaves nothing to draw")
    classes = number_of_classes(prior)
    if request.label is not None and not 0 <= request.label < classes:
        known = f"0..{classes - 1}" if classes else "none, as this prior knows no classes"
        raise ValueError(f"--label: expected {known}, got {request.label}")
    images = image.unsqueeze(0)
    edited = edit(
        prior,
        vae,
        images,
        mask,
        None if request.label is None else [request.label],
        top_k=request.top_k,
        top_p=request.top_p,
        cfg_scale=request.cfg_scale,
        seed=request.seed,
    ).images
    masked = torch.where(mask, 0.0, images)
    save_png(image_grid(torch.cat([images, masked, edited]), columns=3), request.out, scale=2)
