"""Reconstruction error and code usage of a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rqgen.checks import check_integer
from rqgen.data.datasets import ImageDataset
from rqgen.models import Tokenizer


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
    """Encode and decode every image once.

    Raises:
        TypeError, ValueError: an empty dataset; a ``batch_size`` below 1.
    """
    batch_size = check_integer(batch_size, "batch_size", 1)
    if len(images) == 0:
        raise ValueError("images: expected at least one, got an empty dataset (held_out_fraction=0?)")
    vae.eval()
    encode = vae.encoder_for(len(images))
    squared_error, pixels = 0.0, 0
    counts_dk = torch.zeros(vae.layout.levels, vae.codebook_size, dtype=torch.int64)
    for start in range(0, len(images), batch_size):
        indices = range(start, min(start + batch_size, len(images)))
        images_nchw = torch.stack([images.item(index, 0)[0] for index in indices]).to(vae.device)
        codes = encode(images_nchw)
        error = vae.decode(codes).double() - images_nchw.double()
        squared_error += error.square().sum().item()
        pixels += error.numel()
        for d, chosen in enumerate(vae.layout.by_level(codes)):
            counts_dk[d] += torch.bincount(chosen.flatten().cpu(), minlength=vae.codebook_size)
    share_dk = counts_dk.double() / counts_dk.sum(1, keepdim=True)
    entropy_d = -torch.special.xlogy(share_dk, share_dk).sum(1)
    return ReconstructionQuality(
        mse=squared_error / pixels,
        code_counts=counts_dk,
        codes_used=(counts_dk > 0).sum(1).tolist(),
        perplexity=entropy_d.exp().tolist(),
    )
