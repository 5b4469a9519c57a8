"""Settings of an RQ-Transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Self

from rqgen.config import check_bounds, check_fields, one_of

from ..condition import checked_class_names
from ..transformer import TransformerConfig

# name -> width, spatial layers, depth layers, heads
_PRESETS = {
    "90M": (512, 24, 4, 8),
    "350M": (1024, 24, 4, 16),
    "480M": (1536, 12, 4, 24),
    "800M": (1536, 24, 4, 24),
    "1.4B": (1536, 42, 6, 24),
}
# One code per position leaves the depth transformer nothing to attend to: its layers go to the other stack.
_PRESETS_DEPTH_ONE = {**_PRESETS, "1.4B": (1536, 48, 0, 24)}


def _default_spatial() -> TransformerConfig:
    return TransformerConfig(layers=12, heads=8)


def _default_depth() -> TransformerConfig:
    return TransformerConfig(layers=4, heads=8)


@dataclass
class RQTransformerConfig:
    """Everything that defines an `RQTransformer` but its weights.

    Attributes:
        code_shape: (h, w, D) of a code map; T = h * w positions of D codes each.
        codebook_size: K.
        code_dim: C, the length of a code vector; 0 for a prior that carries no codebooks (then both
            embeddings must be "table", and soft labels need the codebooks passed in).
        shared_codebook: codebooks are (K, C) for all depths, else (D, K, C).
        embed_dim: width W of both transformers.
        spatial, depth: the stack over positions and the stack over the codes of one position.
        spatial_embedding, depth_embedding: the representation of a code in the inputs of each stack: "codebook",
            its code vector through a linear layer, or "table", a learned vector of width W. One table
            serves both stacks where both ask for it.
        shared_table: one table (K, W) for all depths, else (D * K, W), depth d at rows d * K onwards.
        depth_context: input d of the depth stack holds the sum of the codes before it ("cumulative",
            equation 12) or only the last of them ("previous").
        shared_classifier: one output layer for all depths, else one per depth.
        condition: "none", "class" (one label) or "tokens" (a sequence, itself predicted by the prior).
        condition_vocab_size: number of classes or of token ids.
        condition_length: tokens in a condition; 1 unless condition is "tokens".
        condition_dropout: probability of replacing an image's condition by the null condition in training.
            Above 0 the prior has a null condition, which classifier-free guidance needs.
        embedding_dropout: on the inputs of the spatial stack.
        class_names: of the classes of a class condition, in the order of their labels; empty where unknown.
    """

    code_shape: tuple[int, int, int]
    codebook_size: int
    code_dim: int
    shared_codebook: bool = True
    embed_dim: int = 512
    spatial: TransformerConfig = field(default_factory=_default_spatial)
    depth: TransformerConfig = field(default_factory=_default_depth)
    spatial_embedding: str = "codebook"
    depth_embedding: str = "codebook"
    shared_table: bool = True
    depth_context: str = "cumulative"
    shared_classifier: bool = True
    condition: str = "none"
    condition_vocab_size: int = 0
    condition_length: int = 1
    condition_dropout: float = 0.0
    embedding_dropout: float = 0.0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.code_shape) != 3 or min(self.code_shape) < 1:
            raise ValueError(f"code_shape: expected three numbers >= 1 (h, w, D), got {tuple(self.code_shape)}")
        # Configs read from JSON or YAML hold lists; one type makes shapes comparable.
        h, w, depth = self.code_shape
        self.code_shape = h, w, depth
        for name, lowest in (("codebook_size", 1), ("code_dim", 0), ("embed_dim", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}: expected a number >= {lowest}, got {getattr(self, name)}")
        widths = {name: (0, 2**24) for name in ("codebook_size", "code_dim", "condition_vocab_size")}
        check_bounds(self, **widths, embed_dim=(1, 2**17), condition_length=(0, 2**16))
        if h * w > 2**20 or depth > 2**10:
            raise ValueError(f"code_shape: expected at most 2^20 positions of 2^10 codes, got {self.code_shape}")
        for name, allowed in (
            ("spatial_embedding", ("codebook", "table")),
            ("depth_embedding", ("codebook", "table")),
            ("depth_context", ("cumulative", "previous")),
            ("condition", ("none", "class", "tokens")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {one_of(allowed, getattr(self, name))}")
        if self.code_dim == 0 and "codebook" in (self.spatial_embedding, self.depth_embedding):
            raise ValueError('code_dim: expected that of the codebooks where an embedding is "codebook", got 0')
        for name in ("spatial", "depth"):
            heads = getattr(self, name).heads
            if self.embed_dim % heads:
                raise ValueError(f"embed_dim: expected a multiple of {name}.heads, {heads}, got {self.embed_dim}")
        for name in ("condition_dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        self._check_condition()
        classes = self.condition_vocab_size if self.condition == "class" else 0
        self.class_names = checked_class_names(self.class_names, classes)

    def _check_condition(self) -> None:
        vocab_size, length = self.condition_vocab_size, self.condition_length
        if self.condition == "none":
            if vocab_size != 0 or length != 1 or self.condition_dropout > 0:
                raise ValueError(
                    "condition_vocab_size, condition_length, condition_dropout: expected their defaults 0, 1 and 0 "
                    f'where condition is "none", got {vocab_size}, {length} and {self.condition_dropout}'
                )
        elif vocab_size < 1:
            raise ValueError(f"condition_vocab_size: expected a number >= 1 with a condition, got {vocab_size}")
        elif self.condition == "class" and length != 1:
            raise ValueError(f'condition_length: expected 1 where condition is "class", got {length}')
        elif self.condition == "tokens" and length < 2:
            raise ValueError(f'condition_length: expected a number >= 2 where condition is "tokens", got {length}')

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        code_shape: tuple[int, int, int],
        codebook_size: int,
        code_dim: int,
        **settings: Any,
    ) -> Self:
        """Return the config of a published size: "90M", "350M", "480M", "800M", "1.4B" (48+0 layers with one code per
        position).

        `settings` are further fields of the config (condition, embeddings, dropouts).

        Raises:
            ValueError: an unknown name, or a setting that the preset itself decides.
        """
        presets = _PRESETS_DEPTH_ONE if code_shape[2] == 1 else _PRESETS
        if name not in presets:
            raise ValueError(f"name: {one_of(presets, name)}")
        if decided := sorted({"embed_dim", "spatial", "depth"} & settings.keys()):
            raise ValueError(f"{', '.join(decided)}: decided by preset {name!r}; change the config that it returns")
        width, spatial_layers, depth_layers, heads = presets[name]
        return cls(
            code_shape=code_shape,
            codebook_size=codebook_size,
            code_dim=code_dim,
            embed_dim=width,
            spatial=TransformerConfig(layers=spatial_layers, heads=heads),
            depth=TransformerConfig(layers=depth_layers, heads=heads),
            **settings,
        )

    @property
    def has_null_condition(self) -> bool:
        """True if the prior learns the unconditional distribution too."""
        return self.condition_dropout > 0
