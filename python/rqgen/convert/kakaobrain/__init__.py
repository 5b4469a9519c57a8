"""The published RQ-VAE and RQ-Transformer of Lee et al. 2022 (kakaobrain/rq-vae-transformer)."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from rqgen.models import RQVAE, RQTransformer
from rqgen.models.pretrained import model_folder
from rqgen.reading import shorten

from ..published import KAKAOBRAIN_PRIOR, KAKAOBRAIN_RQVAE, expect_model
from .checkpoint import Checkpoint, read_checkpoint, section
from .rqtransformer import build_rqtransformer
from .rqvae import build_rqvae

__all__ = ["load_kakaobrain"]

PathLike = str | os.PathLike[str]


def load_kakaobrain(
    path: PathLike, tokenizer: RQVAE | PathLike | None = None, *, ema: bool = False
) -> RQVAE | RQTransformer:
    """Read a published checkpoint, with the config.yaml next to it, into an `RQVAE` or an `RQTransformer`.

    The pickle is read with `torch.load(weights_only=True)`. The model comes back in eval mode, on the CPU. An
    RQ-VAE's codebooks train in the compatibility mode `ema_update="per_depth"`, as published.

    Args:
        path: the checkpoint ("model.pt"), or its folder.
        tokenizer: for a prior only: the RQ-VAE whose codes it models, or the path of one (a published
            checkpoint or a folder of ours). None: the config's `vqvae.ckpt`, relative to the config file.
        ema: take "state_dict_ema" instead of "state_dict". The published sampling scripts take "state_dict" by default,
            and so do we.

    Raises:
        FileNotFoundError: the checkpoint, its config.yaml or the tokenizer is missing.
        ValueError: a damaged file, a pickle with anything but tensors and plain values, an option of `arch`
            that is unknown or cannot be reproduced (named), or tensors that do not fit the config (named).
    """
    checkpoint = read_checkpoint(path, ema=ema)
    arch_type = checkpoint.arch["type"]
    if arch_type == "rq-vae":
        if tokenizer is not None:
            raise ValueError(f"tokenizer: only a prior takes one, and {checkpoint.path} holds an RQ-VAE")
        return _build_rqvae(checkpoint)
    if arch_type != "rq-transformer":
        raise ValueError(
            f"{checkpoint.config_path}: arch.type: expected 'rq-vae' or 'rq-transformer', got {shorten(arch_type)}"
        )
    expect_model(checkpoint.state_dict, KAKAOBRAIN_PRIOR, checkpoint.path)
    codebooks = _find_codebooks(checkpoint, tokenizer)
    try:
        return build_rqtransformer(checkpoint.arch, checkpoint.state_dict, codebooks).eval()
    except ValueError as error:
        raise ValueError(f"{checkpoint.both}: {error}") from error


def _build_rqvae(checkpoint: Checkpoint) -> RQVAE:
    expect_model(checkpoint.state_dict, KAKAOBRAIN_RQVAE, checkpoint.path)
    return build_rqvae(checkpoint.arch, checkpoint.state_dict, where=checkpoint.both).eval()


def _find_codebooks(checkpoint: Checkpoint, tokenizer: RQVAE | PathLike | None) -> Tensor | None:
    """Return the codebooks a prior embeds with; None where it embeds with its own tables and names no tokenizer."""
    if isinstance(tokenizer, RQVAE):
        return tokenizer.codebooks.clone()
    if tokenizer is not None:
        return _load_tokenizer(Path(tokenizer)).codebooks
    needed = any(checkpoint.arch.get(key, False) for key in ("input_emb_vqvae", "head_emb_vqvae"))
    named = section(checkpoint.config, "vqvae", checkpoint.config_path).get("ckpt")
    if named is not None:
        if not isinstance(named, str) or not named or "\0" in named:
            raise ValueError(f"{checkpoint.config_path}: vqvae.ckpt: expected a path, got {shorten(named)}")
        candidate = checkpoint.config_path.parent / named
        if candidate.exists():
            return _load_tokenizer(candidate).codebooks
        if needed:
            raise FileNotFoundError(
                f"{checkpoint.config_path}: vqvae.ckpt: no file {candidate}; give the RQ-VAE as `tokenizer`"
            )
    elif needed:
        raise ValueError(
            f"{checkpoint.config_path}: the prior embeds codes with an RQ-VAE's codebook, but names none "
            "under vqvae.ckpt; give the RQ-VAE as `tokenizer`"
        )
    return None


def _load_tokenizer(path: Path) -> RQVAE:
    if model_folder(path) is not None:
        return RQVAE.from_pretrained(path)
    checkpoint = read_checkpoint(path, name="tokenizer")
    # Checked first: a prior would search for a tokenizer of its own, and may name itself.
    if checkpoint.arch["type"] != "rq-vae":
        raise ValueError(f"tokenizer: expected an RQ-VAE, but {path} holds a prior ({checkpoint.arch['type'][:60]})")
    return _build_rqvae(checkpoint)
