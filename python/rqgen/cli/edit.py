"""`rqgen edit`: resample a part of an image."""

from __future__ import annotations

from dataclasses import asdict

import torch

from rqgen.config import one_of
from rqgen.data import image_grid, read_image, save_image
from rqgen.data.grid import check_image_name, is_saved_image
from rqgen.models.classes import class_label, names_of_classes
from rqgen.reading import require_file
from rqgen.sampling import SamplingParams, edit

from .errors import naming
from .models import load_prior, load_tokenizer
from .outputs import output_file
from .requests import EditRequest

KINDS = ("inpaint", "outpaint", "class")


def edit_image(request: EditRequest) -> None:
    """Edit one image and write a sheet: before, with the masked part greyed, after. "inpaint" and "class" sample the
    white part of the mask, "outpaint" the black one."""
    if request.kind not in KINDS:
        raise ValueError(f"edit: {one_of(KINDS, request.kind)}")
    if request.kind == "class" and request.label is None:
        raise ValueError("--label: edit class needs the class to sample")
    params = SamplingParams(**asdict(request.sampling))
    check_image_name(request.out, name="--out")
    inputs = {"--image": request.image, "--mask": request.mask}
    with output_file(request.out, "--out", is_saved_image, inputs=inputs):
        _edit_image(request, params)


def _edit_image(request: EditRequest, params: SamplingParams) -> None:
    prior, vae = load_prior(request.prior), load_tokenizer(request.tokenizer)
    image = _read("--image", request, channels=vae.image_channels, size=vae.image_shape).to(vae.device)
    mask = _read("--mask", request, channels=1, size=vae.image_shape)[0].to(vae.device) > 0
    if request.kind == "outpaint":
        mask = ~mask
    if not bool(mask.any()):
        raise ValueError(f"--mask: {request.mask} leaves nothing to sample")
    labels = None
    if request.label is not None:
        labels = [class_label(request.label, names_of_classes(prior) if prior.num_classes else (), "--label")]
    images = image.unsqueeze(0)
    with naming({"vae": "--tokenizer", "condition": "--label"}):
        edited = edit(prior, vae, images, mask=mask, condition=labels, params=params).images
    masked = torch.where(mask, 0.0, images)
    save_image(image_grid(torch.cat([images, masked, edited]), columns=3), request.out, scale=2)


def _read(name: str, request: EditRequest, *, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """Read the image that an option names, of this (height, width)."""
    path = request.image if name == "--image" else request.mask
    require_file(path, name)
    image = read_image(path, channels=channels, background=request.background)
    _, height, width = image.shape
    if (height, width) != tuple(size):
        raise ValueError(f"{name}: {path}: expected {size[1]}x{size[0]} pixels, got {width}x{height}")
    return image
