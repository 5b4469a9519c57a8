"""Stage 2 of VAR: the prior learns the tokenizer's token maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rqgen.config import check_finite
from rqgen.data.codes import EncodedImages, code_fingerprint, flatten_codes, unflatten_codes
from rqgen.data.datasets import ImageDataset
from rqgen.data.stream import Batch, TensorItems
from rqgen.models import VAR, MultiScaleVQVAE, VARConfig, var_loss

from .encoding import encode_dataset
from .loop import StepResult


@dataclass
class VARPriorConfig:
    """The prior's size; scales and codebook are the tokenizer's, classes the images'."""

    preset: str | None = None
    """A published size "dN", see `VARConfig.preset`; then ``embed_dim``, ``layers``, ``heads`` and ``drop_path`` do not
    count."""
    embed_dim: int = 256
    layers: int = 4
    heads: int = 4
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    shared_adaptive_norm: bool = False
    normalize_attention: bool = True
    condition_dropout: float = 0.1
    """How often a class is replaced by the null condition; 0: no guidance when sampling."""
    cache_codes: bool = True
    """Encode every training image once, before the first step; off: at every step, as random crops and flips need."""

    def __post_init__(self) -> None:
        check_finite(self)

    def build(self, vae: MultiScaleVQVAE, num_classes: int) -> VAR:
        """A prior for the token maps of ``vae``. Raises ValueError for images without classes."""
        if num_classes < 1:
            raise ValueError("data: a VAR is conditioned on classes, and these images have none")
        common = {
            "quantizer": vae.config.quantizer,
            "code_dim": vae.config.z_channels,
            "num_classes": num_classes,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "shared_adaptive_norm": self.shared_adaptive_norm,
            "normalize_attention": self.normalize_attention,
            "condition_dropout": self.condition_dropout,
        }
        if self.preset is not None:
            config = VARConfig.preset(self.preset, **common)
        else:
            config = VARConfig(
                **common, embed_dim=self.embed_dim, layers=self.layers, heads=self.heads, drop_path=self.drop_path
            )
        return VAR(config, vae.quantizer)


def var_prior_items(
    config: VARPriorConfig, vae: MultiScaleVQVAE, source: ImageDataset | EncodedImages, *, batch_size: int
) -> ImageDataset | TensorItems:
    """What a prior learns from: all tokens of an image side by side, (L,), or the images themselves.

    Raises ValueError for codes of another tokenizer, and for cached codes of images that differ from epoch to epoch.
    """
    if isinstance(source, EncodedImages):
        source.check_tokenizer(vae.scales, code_fingerprint(*vae.quantizer.code_tensors()))
        return TensorItems(flatten_codes(source.codes), source.labels)
    if not config.cache_codes:
        return source
    if source.varies:
        raise ValueError("prior.cache_codes: the images differ from epoch to epoch (crops, flips): set it to false")
    codes, labels = encode_dataset(vae, source, batch_size=batch_size, codes=True)
    return TensorItems(flatten_codes(codes), labels)


class VARStage:
    """Cross-entropy over all tokens of all scales."""

    name = "prior"
    axis = "scale"

    def __init__(
        self,
        model: VAR,
        vae: MultiScaleVQVAE,
        *,
        preview: Callable[[VAR, MultiScaleVQVAE], dict[str, Tensor]] | None = None,
    ) -> None:
        self.model = model
        self._vae = vae.eval().requires_grad_(False)
        self._preview = preview

    def to(self, device: torch.device) -> None:
        self._vae.to(device)

    def step(self, batch: Batch) -> StepResult:
        if batch.inputs.is_floating_point():
            codes = self._vae.encode(batch.inputs)
        else:
            codes = unflatten_codes(batch.inputs, self._vae.scales)
        loss = var_loss(self.model(codes, batch.labels), codes)
        return StepResult(loss.total, {f"loss/scale_{k + 1}": term for k, term in enumerate(loss.per_scale)})

    def usage(self) -> dict[str, Tensor]:
        return {}

    def pictures(self, model: VAR) -> dict[str, Tensor]:
        if self._preview is None:
            return {}
        return self._preview(model, self._vae)
