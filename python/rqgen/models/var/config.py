"""Settings of a VAR."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Self

from rqgen.config import check_bounds, check_fields
from rqgen.quantizers import MultiScaleConfig
from rqgen.reading import shorten

from ..condition import checked_class_names

_PRESET_WIDTH = 64


@dataclass
class VARConfig:
    """Everything that defines a `VAR` but its weights.

    Attributes:
        quantizer: the tokenizer's: codebook size K, scales, refinements (see `MultiScaleConfig`).
        code_dim: C, channels of the features that token maps stand for.
        embed_dim: width W of the transformer.
        layers, heads: of the transformer; heads must divide the width.
        mlp_ratio: hidden width of the MLPs over W.
        dropout: on what attention and MLP add to the residual stream.
        attention_dropout: on attention weights.
        drop_path: probability of leaving out what a block adds, for a whole image; from 0 at the first block rising
            to this at the last.
        norm_epsilon: of every LayerNorm.
        shared_adaptive_norm: one linear layer makes the modulation of all blocks (each adds a vector of its own), or
            every block has one.
        normalize_attention: queries and keys are divided by their norms, queries multiplied by a learned factor per
            head of at most 100 (6b of the paper); otherwise scaled by 1 / (4 sqrt(head_dim)), as published.
        num_classes: of the condition.
        condition_dropout: probability of replacing an image's class by the null condition in training. Above 0 the
            prior has a null condition, which classifier-free guidance needs.
        class_names: of the classes, in the order of their labels; empty where unknown.
    """

    quantizer: MultiScaleConfig = field(default_factory=MultiScaleConfig)
    code_dim: int = 32
    embed_dim: int = 1024
    layers: int = 16
    heads: int = 16
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    norm_epsilon: float = 1e-6
    shared_adaptive_norm: bool = False
    normalize_attention: bool = True
    num_classes: int = 1000
    condition_dropout: float = 0.1
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("code_dim", "embed_dim", "layers", "heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")
        check_bounds(self, code_dim=(1, 2**16), embed_dim=(1, 2**17), layers=(1, 1024), num_classes=(1, 2**24))
        if self.embed_dim % self.heads:
            raise ValueError(f"embed_dim: expected a multiple of heads, {self.heads}, got {self.embed_dim}")
        for name in ("dropout", "attention_dropout", "drop_path", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        for name in ("mlp_ratio", "norm_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        self.class_names = checked_class_names(self.class_names, self.num_classes)

    @classmethod
    def preset(
        cls, name: str, *, quantizer: MultiScaleConfig, code_dim: int, num_classes: int, **settings: Any
    ) -> Self:
        """Return the config of a published size, "d16", "d20", "d24", "d30", "d36", and every other "dN": N layers of
        width 64 N, N heads and a drop path of 0.1 N / 24; the blocks then have about 73728 N^3 parameters (own adaptive
        norm).

        Raises:
            ValueError: another name, or a setting that the preset itself decides.
        """
        if not re.fullmatch(r"d0*[1-9][0-9]{0,8}", name):
            raise ValueError(f"name: expected d16, d20, d24, d30, d36 or another dN, got {shorten(name)}")
        if decided := sorted({"embed_dim", "layers", "heads", "drop_path"} & settings.keys()):
            raise ValueError(f"{', '.join(decided)}: decided by preset {name!r}; change the config that it returns")
        depth = int(name[1:])
        return cls(
            quantizer=quantizer,
            code_dim=code_dim,
            num_classes=num_classes,
            embed_dim=_PRESET_WIDTH * depth,
            layers=depth,
            heads=depth,
            drop_path=0.1 * depth / 24,
            **settings,
        )

    @property
    def has_null_condition(self) -> bool:
        """True if the prior learns the unconditional distribution too."""
        return self.condition_dropout > 0
