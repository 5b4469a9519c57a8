"""Stage 2 of any system: training of a prior on the tokenizer's codes by the prior's own loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor

from rqgen.data.codes import EncodedImages
from rqgen.data.datasets import ImageDataset
from rqgen.data.stream import Batch, TensorItems
from rqgen.models import Prior, Tokenizer

from .encoding import check_labels, encode_dataset
from .loop import StepResult


def code_items(
    vae: Tokenizer,
    source: ImageDataset | EncodedImages,
    *,
    cache: bool,
    batch_size: int,
    console: Console | None = None,
) -> ImageDataset | TensorItems:
    """Return items for a `CodesStage`: all codes of an image in one row (L,), or without `cache` the images themselves.

    Raise ValueError for codes of another tokenizer, for invalid labels, and for cached codes of images
    that differ from epoch to epoch.
    """
    if isinstance(source, EncodedImages):
        source.check_tokenizer(vae.layout, vae.fingerprint())
        check_labels(source.labels, source.class_names)
        return TensorItems(source.layout.flatten(source.codes), source.labels)
    if not cache:
        return source
    if source.varies:
        raise ValueError("prior.cache_codes: the images differ from epoch to epoch (crops, flips): set it to false")
    codes, labels = encode_dataset(vae, source, batch_size=batch_size, codes=True, console=console)
    check_labels(labels, source.class_names)
    return TensorItems(vae.layout.flatten(codes), labels)


class CodesStage:
    """Training by `Prior.loss` on cached codes, or on images that are encoded at every step."""

    name = "prior"

    def __init__(
        self,
        model: Prior,
        vae: Tokenizer,
        *,
        preview: Callable[[Prior, Tokenizer], dict[str, Tensor]] | None = None,
    ) -> None:
        self.model = model
        self.axis = vae.layout.axis
        self._vae = vae.eval().requires_grad_(False)
        self._layout, self._conditional = vae.layout, model.condition_kind == "class"
        self._preview = preview

    def to(self, device: torch.device) -> None:
        self._vae.to(device)

    def step(self, batch: Batch) -> StepResult:
        if batch.inputs.is_floating_point():
            codes = self._vae.encode(batch.inputs)
        else:
            codes = self._layout.unflatten(batch.inputs)
        loss = self.model.loss(codes, batch.labels if self._conditional else None)
        terms = {f"loss/{self.axis}_{level + 1}": term for level, term in enumerate(loss.per_level)}
        return StepResult(loss.total, terms)

    def usage(self) -> dict[str, Tensor]:
        return {}

    def previews(self, model: Prior) -> dict[str, Tensor]:
        return {} if self._preview is None else self._preview(model, self._vae)
