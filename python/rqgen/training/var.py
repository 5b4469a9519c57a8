"""Stage 2 of VAR: the prior learns the tokenizer's token maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rqgen.data.datasets import ImageDataset
from rqgen.data.stream import Batch, TensorItems
from rqgen.models import VAR, MultiScaleVQVAE, VARConfig, var_loss

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


@torch.no_grad()
def encode_token_maps(vae: MultiScaleVQVAE, images: ImageDataset, *, batch_size: int) -> tuple[Tensor, Tensor]:
    """Every image once, in order: all its tokens side by side, int64 (N, L), and labels (N,), on the CPU."""
    vae.eval()
    tokens, labels = [], []
    for start in range(0, len(images), batch_size):
        batch = [images.item(index, 0) for index in range(start, min(start + batch_size, len(images)))]
        images_nchw = torch.stack([image for image, _ in batch]).to(vae.device)
        tokens.append(flat_tokens(vae.encode(images_nchw)).cpu())
        labels += [label for _, label in batch]
    if not tokens:
        raise ValueError("images: expected at least one, got an empty dataset")
    return torch.cat(tokens), torch.tensor(labels)


def flat_tokens(codes: Sequence[Tensor]) -> Tensor:
    """Token maps (B, h_k, w_k) side by side: (B, L)."""
    return torch.cat([maps.flatten(1) for maps in codes], dim=1)


def token_maps(tokens_bl: Tensor, scales: Sequence[Sequence[int]]) -> list[Tensor]:
    """The opposite of `flat_tokens`."""
    parts = tokens_bl.split([h * w for h, w in scales], dim=1)
    return [part.unflatten(1, (h, w)) for part, (h, w) in zip(parts, scales, strict=True)]


def var_prior_items(
    config: VARPriorConfig, vae: MultiScaleVQVAE, images: ImageDataset, *, batch_size: int
) -> ImageDataset | TensorItems:
    """What a prior learns from: tokens (L,), or the images themselves. ValueError for cached codes of images that
    differ from epoch to epoch."""
    if not config.cache_codes:
        return images
    if images.varies:
        raise ValueError("prior.cache_codes: the images differ from epoch to epoch (crops, flips): set it to false")
    return TensorItems(*encode_token_maps(vae, images, batch_size=batch_size))


class VARStage:
    """Cross-entropy over all tokens of all scales."""

    name = "prior"

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
            codes = token_maps(batch.inputs, self._vae.scales)
        loss = var_loss(self.model(codes, batch.labels), codes)
        return StepResult(loss.total, {f"loss/scale_{k + 1}": term for k, term in enumerate(loss.per_scale)})

    def usage(self) -> dict[str, Tensor]:
        return {}

    def pictures(self, model: VAR) -> dict[str, Tensor]:
        if self._preview is None:
            return {}
        return self._preview(model, self._vae)
