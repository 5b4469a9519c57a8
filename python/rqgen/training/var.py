"""Settings of a VAR to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rqgen.config import check_bounds
from rqgen.models import VAR, MultiScaleVQVAE, VARConfig


@dataclass
class VARPriorConfig:
    """Settings of a VAR: its size and dropouts. Scales and codebook are the tokenizer's."""

    preset: str | None = None
    """A published size "dN", see `VARConfig.preset`; then ``embed_dim``, ``layers``, ``heads`` and ``drop_path`` are
    ignored."""
    embed_dim: int = 256
    """Width of the transformer."""
    layers: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads; their number must divide the width."""
    dropout: float = 0.0
    """Dropout of what attention and MLP add to the residual stream."""
    attention_dropout: float = 0.0
    """Dropout of attention weights."""
    drop_path: float = 0.0
    """Probability that an image skips the last block; it falls linearly to 0 at the first."""
    shared_adaptive_norm: bool = False
    """Modulate all blocks by one linear layer; false: each block has its own."""
    normalize_attention: bool = True
    """Divide queries and keys by their norms, see `VARConfig`."""
    condition_dropout: float = 0.1
    """Probability that a class is replaced by the null condition in training; 0: no guidance when sampling."""
    cache_codes: bool = True
    """Encode every training image once, before the first step; false: at every step, as random crops and flips need."""

    def __post_init__(self) -> None:
        check_bounds(self, embed_dim=(1, 2**17), layers=(1, 1024), heads=(1, 2**16))
        for name in ("dropout", "attention_dropout", "drop_path", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {getattr(self, name)}")

    def build(self, vae: MultiScaleVQVAE, num_classes: int, class_names: Sequence[str] = ()) -> VAR:
        """Return a prior for the token maps of ``vae`` with the names of its classes. Raise ValueError for images
        without classes."""
        return VAR(self.model_config(vae, num_classes, class_names), vae.quantizer)

    def model_config(self, vae: MultiScaleVQVAE, num_classes: int, class_names: Sequence[str] = ()) -> VARConfig:
        """Return the config of the prior that `build` makes."""
        if num_classes < 1:
            raise ValueError("data: a VAR is conditioned on classes, and these images have none")
        common: dict[str, Any] = {
            "quantizer": vae.config.quantizer,
            "code_dim": vae.config.z_channels,
            "num_classes": num_classes,
            "class_names": tuple(class_names),
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "shared_adaptive_norm": self.shared_adaptive_norm,
            "normalize_attention": self.normalize_attention,
            "condition_dropout": self.condition_dropout,
        }
        if self.preset is not None:
            return VARConfig.preset(self.preset, **common)
        return VARConfig(
            **common, embed_dim=self.embed_dim, layers=self.layers, heads=self.heads, drop_path=self.drop_path
        )
