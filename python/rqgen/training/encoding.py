"""Encoding of a dataset by a tokenizer, once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar, overload

import torch
from rich.console import Console
from torch import Tensor

from rqgen.checks import check_integer, check_within
from rqgen.data.datasets import ImageDataset
from rqgen.models import Tokenizer
from rqgen.models.pretrained import eval_mode
from rqgen.quantizers import Codes

from .progress import RunProgress

EncodedT = TypeVar("EncodedT")


def check_labels(labels: Tensor, class_names: Sequence[str]) -> None:
    """Raise ValueError unless every label is one of the classes, as a prior that is conditioned on them needs. Checked
    before the training, which would otherwise fail at the first invalid label. Without classes nothing is checked."""
    if class_names:
        check_within(labels, "labels", "label", 0, len(class_names))


@overload
def encode_dataset(
    vae: Tokenizer,
    images: ImageDataset,
    *,
    batch_size: int,
    codes: Literal[True],
    count: int | None = None,
    console: Console | None = None,
) -> tuple[Codes, Tensor]: ...


@overload
def encode_dataset(
    vae: Tokenizer,
    images: ImageDataset,
    *,
    batch_size: int,
    codes: Literal[False],
    count: int | None = None,
    console: Console | None = None,
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def encode_dataset(
    vae: Tokenizer,
    images: ImageDataset,
    *,
    batch_size: int,
    codes: bool,
    count: int | None = None,
    console: Console | None = None,
) -> tuple[Codes, Tensor]:
    """Encode every image once (or the first ``count``), in order, in eval mode; the tokenizer's mode is kept.

    Args:
        codes: return codes as ``vae.encode`` does, or float32 latents.
        console: shows the progress.

    Returns:
        Codes or latents, and labels (N,), on the CPU.

    Raises:
        TypeError, ValueError: no images; a ``batch_size`` below 1; a ``count`` that is not in 1..N.
    """
    batch_size = check_integer(batch_size, "batch_size", 1)
    if len(images) == 0:
        raise ValueError("images: expected at least one, got an empty dataset")
    count = len(images) if count is None else check_integer(count, "count", 1, len(images))
    if codes:
        encode, layout = vae.encoder_for(count), vae.layout
        code_parts, labels = _encoded(
            lambda images_nchw: layout.map(Tensor.cpu, encode(images_nchw)), vae, images, count, batch_size, console
        )
        return layout.concatenate(code_parts), labels
    latent_parts, labels = _encoded(
        lambda images_nchw: vae.encode_latents(images_nchw).float().cpu(), vae, images, count, batch_size, console
    )
    return torch.cat(latent_parts), labels


def _encoded(
    encode: Callable[[Tensor], EncodedT],
    vae: Tokenizer,
    images: ImageDataset,
    count: int,
    batch_size: int,
    console: Console | None,
) -> tuple[list[EncodedT], Tensor]:
    """Encode the first ``count`` images, ``batch_size`` at a time. Return the batches and labels (N,)."""
    parts, labels = [], []
    began = time.perf_counter()
    with eval_mode(vae), RunProgress(console, "encoding", count) as progress:
        for start in range(0, count, batch_size):
            batch = [images.item(index, 0) for index in range(start, min(start + batch_size, count))]
            parts.append(encode(torch.stack([image for image, _ in batch]).to(vae.device)))
            labels += [label for _, label in batch]
            progress.report(speed=len(labels) / max(1e-9, time.perf_counter() - began))
            progress.update(len(labels))
    return parts, torch.tensor(labels)
