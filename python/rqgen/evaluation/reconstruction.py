"""Reconstruction error and code usage of a tokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rqgen.checks import check_instance, check_integer
from rqgen.data.datasets import ImageDataset
from rqgen.models import Tokenizer
from rqgen.models.pretrained import eval_mode
from rqgen.quantizers import CodeLayout, Codes


@dataclass
class ReconstructionQuality:
    """``mse``: mean squared error over all pixels, images in [-1, 1]. ``code_counts`` int64 (D, K): uses of
    each code at each depth (or scale). ``codes_used`` and ``perplexity`` (exp of the entropy) for each of
    them."""

    mse: float
    code_counts: Tensor
    codes_used: list[int]
    perplexity: list[float]


@torch.no_grad()
def evaluate_reconstruction(vae: Tokenizer, images: ImageDataset, *, batch_size: int = 128) -> ReconstructionQuality:
    """Encode and decode every image once, in eval mode; the tokenizer's mode is kept.

    Raises:
        TypeError, ValueError: no tokenizer; an empty dataset; a ``batch_size`` below 1.
        ValueError: latents or decoded images that are not finite.
    """
    check_instance(vae, "vae", Tokenizer)
    batch_size = check_integer(batch_size, "batch_size", 1)
    if len(images) == 0:
        raise ValueError("images: expected at least one, got an empty dataset (held_out_fraction=0?)")
    squared_error, pixels = 0.0, 0
    counts_dk = torch.zeros(vae.layout.levels, vae.codebook_size, dtype=torch.int64)
    with eval_mode(vae):
        encode = vae.encoder_for(len(images))
        for start in range(0, len(images), batch_size):
            indices = range(start, min(start + batch_size, len(images)))
            images_nchw = torch.stack([images.item(index, 0)[0] for index in indices]).to(vae.device)
            codes = encode(images_nchw)
            check_encoded(codes, vae.layout, start)
            error = vae.decode(codes).double() - images_nchw.double()
            squared_error += error.square().sum().item()
            pixels += error.numel()
            for d, chosen in enumerate(vae.layout.by_level(codes)):
                counts_dk[d] += torch.bincount(chosen.flatten().cpu(), minlength=vae.codebook_size)
    if not math.isfinite(squared_error):
        raise ValueError("vae: expected decoded images that are finite, got NaN or infinity")
    share_dk = counts_dk.double() / counts_dk.sum(1, keepdim=True)
    entropy_d = -torch.special.xlogy(share_dk, share_dk).sum(1)
    return ReconstructionQuality(
        mse=squared_error / pixels,
        code_counts=counts_dk,
        codes_used=(counts_dk > 0).sum(1).tolist(),
        perplexity=entropy_d.exp().tolist(),
    )


def check_encoded(codes: Codes, layout: CodeLayout, first_image: int) -> None:
    """Raise ValueError for the first image without codes: its latents were not finite."""
    missing = (layout.flatten(codes) < 0).any(1).nonzero()
    if len(missing):
        image = first_image + int(missing[0])
        raise ValueError(f"images: expected finite latents, got NaN or infinity in those of image {image}")
