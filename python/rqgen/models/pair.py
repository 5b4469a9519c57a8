"""A prior and the tokenizer whose codes it models."""

from __future__ import annotations

import torch

from .multiscale_vqvae import MultiScaleVQVAE
from .rqtransformer import RQTransformer
from .rqvae import RQVAE
from .var import VAR


def check_tokenizer(prior: RQTransformer | VAR, vae: RQVAE | MultiScaleVQVAE) -> None:
    """Raises ValueError unless `vae`, of the prior's system, has the codes that the prior was made with, on the same
    device."""
    if isinstance(prior, VAR):
        same = [
            ("scales", prior.scales, vae.scales),
            ("codebook_size", prior.config.quantizer.codebook_size, vae.codebook_size),
        ]
    else:
        same = [
            ("code_shape", prior.config.code_shape, vae.code_shape),
            ("codebook_size", prior.config.codebook_size, vae.codebook_size),
        ]
    for name, ours, theirs in [*same, ("device", prior.device, vae.device)]:
        if ours != theirs:
            raise ValueError(f"vae: its {name} is {theirs}, the prior's is {ours}: they must be the same")
    prior.check_codebooks()
    if isinstance(prior, VAR):
        theirs = vae.quantizer.fixed_tensors()
        pairs = [(tensor, theirs[name]) for name, tensor in prior.quantizer.fixed_tensors().items()]
    else:
        pairs = [] if prior.codebooks is None else [(prior.codebooks, vae.codebooks)]
    for ours, theirs in pairs:
        # One of the two may have been rounded to a shorter type.
        if ours.shape != theirs.shape or not (
            torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(ours, theirs.to(ours.dtype))
        ):
            raise ValueError("vae: its codebooks are not the ones the prior was made with")
