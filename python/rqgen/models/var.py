"""VAR: a prior that predicts whole token maps, scale after scale (Tian et al., arXiv 2404.02905)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from rqgen.checks import check_targets
from rqgen.config import check_bounds, check_fields
from rqgen.quantizers import CodeLayout, MultiScaleConfig, MultiScaleDecoder

from .changes import as_written
from .condition import checked_class_names, condition_ids
from .interfaces import LevelLoss, Prior, Tokenizer
from .multiscale_vqvae import MultiScaleVQVAE
from .transformer import Cache

_MAX_LOG_SCALE = math.log(100.0)
_PRESET_WIDTH = 64
# Blocks begin close to the identity: what they add is scaled by so little at first.
_INIT_GATE, _INIT_MODULATION, _INIT_HEAD = 1e-5, 0.5, 0.02


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
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        check_bounds(self, code_dim=(1, 2**16), embed_dim=(1, 2**17), layers=(1, 1024), num_classes=(1, 2**24))
        if self.embed_dim % self.heads:
            raise ValueError(f"embed_dim ({self.embed_dim}) must be divisible by heads ({self.heads})")
        for name in ("dropout", "attention_dropout", "drop_path", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("mlp_ratio", "norm_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        self.class_names = checked_class_names(self.class_names, self.num_classes)

    @classmethod
    def preset(
        cls, name: str, *, quantizer: MultiScaleConfig, code_dim: int, num_classes: int, **settings: Any
    ) -> Self:
        """The published sizes "d16", "d20", "d24", "d30", "d36", and every other "dN": N layers of width 64 N, N heads
        and a drop path of 0.1 N / 24; the blocks then have about 73728 N^3 parameters (own adaptive norm).

        Raises:
            ValueError: another name, or a setting that the preset itself decides.
        """
        if not (name[:1] == "d" and name[1:].isascii() and name[1:].isdigit() and int(name[1:]) > 0):
            raise ValueError(f"name must be d16, d20, d24, d30, d36 or another dN, got {name!r}")
        if decided := sorted({"embed_dim", "layers", "heads", "drop_path"} & settings.keys()):
            raise ValueError(f"preset {name!r} decides {', '.join(decided)}: change what it returns instead")
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
        """Whether the prior learns the unconditional distribution too."""
        return self.condition_dropout > 0


class VAROutput(NamedTuple):
    """What a prior returns for whole token maps."""

    logits: Tensor
    """float32 (B, L, K): of every token of every scale, from coarse to fine, before the softmax."""
    condition_logits: None = None
    condition_dropped: Tensor | None = None
    """bool (B,): rows whose class the prior replaced by the null condition; None outside that."""


class VARLoss(NamedTuple):
    """Terms of a prior's loss, float32."""

    total: Tensor
    """Mean over all L tokens."""
    per_scale: Tensor
    """(K,): the same, scale by scale."""


class Modulation(NamedTuple):
    """What a condition does to the transformer, computed once for all scales."""

    start: Tensor  # (B, 1, W): the condition's embedding, which stands before the first scale
    blocks: list[Tensor]  # per block (B, 1, 6, W): gates, scales and shifts of attention and MLP
    head: Tensor  # (B, 1, 2, W): scale and shift before the classifier


class ScaleAttention(nn.Module):
    """Multi-head attention in which a token sees the scales before its own, and all of its own.

    Scale by scale its queries meet the keys up to its end: no mask of L x L is needed, and nothing is computed that
    a mask would hide.
    """

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # A key's bias would move all scores of a query alike.
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = None
        self.scale = 0.25 / math.sqrt(width // config.heads)
        if config.normalize_attention:
            self.log_scale = nn.Parameter(torch.full((config.heads, 1, 1), math.log(4.0)))
            self.scale = 1.0
        self.out = nn.Linear(width, width)

    def forward(self, x_blw: Tensor, ends: Sequence[int], cache: Cache | None, layer: int) -> Tensor:
        batch, length, width = x_blw.shape
        # The layer is called, and not its weight used: adapters and hooks on it count.
        qkv = self.qkv(x_blw)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        qkv = (qkv + bias).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.log_scale is not None:
            q = F.normalize(q, dim=-1) * self.log_scale.clamp(max=_MAX_LOG_SCALE).exp()
            k = F.normalize(k, dim=-1)
            q, k = q.to(v.dtype), k.to(v.dtype)
        seen = 0
        if cache is not None:
            seen = cache.length
            k, v = cache.write(layer, k, v)
        parts, begin = [], 0
        for end in ends:
            parts.append(
                F.scaled_dot_product_attention(
                    q[:, :, begin:end],
                    k[:, :, : seen + end],
                    v[:, :, : seen + end],
                    dropout_p=self.dropout if self.training else 0.0,
                    scale=self.scale,
                )
            )
            begin = end
        y_bhle = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return self.out(y_bhle.transpose(1, 2).reshape(batch, length, width))


class AdaptiveBlock(nn.Module):
    """`x + gate1 attention(norm(x) (1 + scale1) + shift1)`, then the same with the MLP; the condition gives the six
    vectors (adaptive LayerNorm, Peebles and Xie 2023)."""

    def __init__(self, config: VARConfig, drop_path: float) -> None:
        super().__init__()
        width, hidden = config.embed_dim, round(config.embed_dim * config.mlp_ratio)
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(width, eps=config.norm_epsilon, elementwise_affine=False)
        self.attention = ScaleAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(config.dropout)
        if config.shared_adaptive_norm:
            self.modulation = nn.Parameter(torch.randn(6, width) / math.sqrt(width))
        else:
            self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, x_blw: Tensor, modulation: Tensor, ends: Sequence[int], cache: Cache | None, layer: int
    ) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        y = self.attention(self.norm(x_blw) * (1 + scale1) + shift1, ends, cache, layer)
        x_blw = x_blw + self._dropped(self.dropout(y) * gate1)
        y = self.mlp(self.norm(x_blw) * (1 + scale2) + shift2)
        return x_blw + self._dropped(self.dropout(y) * gate2)

    def _dropped(self, y: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return y
        kept = torch.rand(y.shape[0], 1, 1, device=y.device, dtype=torch.float32) >= self.drop_path
        return y * (kept / (1 - self.drop_path)).to(y.dtype)


@as_written()
class VAR(Prior):
    """Transformer over the token maps of a `MultiScaleVQVAE`, a whole map at a time.

        p(t_1, .., t_K | c) = prod_k p(t_k | t_1 .. t_{k-1}, c)         (equation 6 of the paper)

    Scale k's tokens see f_hat_{k-1}, what the scales before stand for, shrunken to (h_k, w_k): every place gets its
    vector through a linear layer, plus embeddings of level and place. The first scale sees the class. All tokens of
    a scale are sampled at once.

    Args:
        config: sizes and layout.
        quantizer: the tokenizer's (`vae.quantizer`): what token maps stand for, carried as fixed weights and saved
            with the model. Without it they hold NaN until `set_quantizer` or loaded weights fill them.
    """

    model_type: ClassVar[str] = "var"
    config_class: ClassVar[type] = VARConfig
    tokenizer_class: ClassVar[type[Tokenizer]] = MultiScaleVQVAE
    edits = "regions"
    has_smooth_sampling: ClassVar[bool] = True
    given_later: ClassVar[frozenset[str]] = frozenset({"quantizer.codebook"})
    config: VARConfig

    def __init__(self, config: VARConfig, quantizer: MultiScaleDecoder | None = None) -> None:
        super().__init__(config)
        width, tokens = config.embed_dim, config.quantizer.tokens
        self.ends = [sum(tokens[: k + 1]) for k in range(len(tokens))]
        self.quantizer = MultiScaleDecoder(config.quantizer, config.code_dim).requires_grad_(False)
        self.quantizer.codebook.fill_(torch.nan)
        self.word_embedding = nn.Linear(config.code_dim, width)
        # The last row is the null condition; published checkpoints have it whether they use it or not.
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.start_positions = nn.Parameter(torch.empty(tokens[0], width))
        self.positions = nn.Parameter(torch.empty(self.ends[-1], width))
        self.level_embedding = nn.Embedding(len(tokens), width)
        self.shared_modulation = nn.Linear(width, 6 * width) if config.shared_adaptive_norm else None
        last = max(config.layers - 1, 1)
        self.blocks = nn.ModuleList(
            AdaptiveBlock(config, config.drop_path * layer / last) for layer in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=config.norm_epsilon, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.classifier = nn.Linear(width, config.quantizer.codebook_size)
        self._initialise()
        if quantizer is not None:
            self.set_quantizer(quantizer)

    def _initialise(self) -> None:
        width = self.config.embed_dim
        std = math.sqrt(1 / width / 3)
        for name, module in self.named_modules():
            if name.startswith("quantizer"):
                continue
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for positions in (self.start_positions, self.positions):
            nn.init.trunc_normal_(positions, std=std)
        with torch.no_grad():
            self.classifier.weight.mul_(_INIT_HEAD)
            self.modulation_out.weight.mul_(_INIT_MODULATION)
            for block in self.blocks:
                for added in (block.attention.out, block.mlp[2]):
                    added.weight.div_(math.sqrt(2 * self.config.layers))
                shared = self.config.shared_adaptive_norm
                rows = block.modulation.view(-1) if shared else block.modulation.weight
                gates = 2 * width
                rows[:gates].mul_(_INIT_GATE)
                rows[gates:].mul_(_INIT_MODULATION)

    def set_quantizer(self, quantizer: MultiScaleDecoder) -> None:
        """Copies what token maps stand for out of a tokenizer (`vae.quantizer`).

        Raises:
            ValueError: other settings than `config.quantizer`'s, another C, or values that are not finite.
        """
        ours, theirs = self.config.quantizer, quantizer.config
        for name in ("codebook_size", "scales", "refinements", "refinement_ratio"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(f"quantizer: expected {name} {getattr(ours, name)}, got {getattr(theirs, name)}")
        if quantizer.code_dim != self.config.code_dim:
            raise ValueError(f"quantizer: expected code_dim {self.config.code_dim}, got {quantizer.code_dim}")
        wanted = quantizer.fixed_tensors()
        if not all(bool(tensor.isfinite().all()) for tensor in wanted.values()):
            raise ValueError("quantizer: its codebook and refinements must be finite")
        self.quantizer.load_state_dict(wanted)

    @property
    def scales(self) -> list[list[int]]:
        """[h_k, w_k] of each token map."""
        return self.config.quantizer.scales

    @property
    def layout(self) -> CodeLayout:
        """A token map per scale."""
        return self.quantizer.layout

    @property
    def condition_kind(self) -> str:
        """Always "class"."""
        return "class"

    @property
    def condition_size(self) -> int:
        """Classes that it can be asked for."""
        return self.config.num_classes

    @property
    def has_null_condition(self) -> bool:
        """Whether the prior learnt the unconditional distribution too."""
        return self.config.has_null_condition

    def cfg_scale_per_level(self, cfg_scale: float) -> list[float]:
        """`cfg_scale * k / (K - 1)` at scale k = 0 .. K - 1, as published: the coarse scales are guided less."""
        last = max(self.levels - 1, 1)
        return [cfg_scale * k / last for k in range(self.levels)]

    def codebook_pairs(self, vae: MultiScaleVQVAE) -> list[tuple[Tensor, Tensor]]:
        """The codebook and the refinements."""
        theirs = vae.quantizer.fixed_tensors()
        return [(tensor, theirs[name]) for name, tensor in self.quantizer.fixed_tensors().items()]

    def loss(self, codes: Sequence[Tensor], condition: Tensor | None = None) -> LevelLoss:
        """`var_loss` of these token maps."""
        return LevelLoss(*var_loss(self(codes, condition), codes))

    def forward(self, codes: Sequence[Tensor], condition: Tensor | None = None) -> VAROutput:
        """Logits of every token given all scales before its own, in one pass.

        Args:
            codes: token maps int64 (B, h_k, w_k), from coarse to fine.
            condition: class labels int64 (B,) or (B, 1); None is the null condition. In training mode each row's
                class is replaced by the null condition with probability `config.condition_dropout` (torch's global
                generator).

        Raises:
            TypeError, ValueError, IndexError: wrong dtype, shape or device; a code or class out of range (unchecked
                on CUDA: reading it back would stall training).
        """
        self.quantizer.check_codes(codes)
        self.check_codebooks()
        batch = codes[0].shape[0]
        labels_b = self.condition_ids(condition, batch)[:, 0]
        dropped = None
        if self.config.has_null_condition and condition is not None and self.training:
            dropped = torch.rand(batch, device=labels_b.device, dtype=torch.float32) < self.config.condition_dropout
            labels_b = torch.where(dropped, self.config.num_classes, labels_b)
        modulation = self.modulation(labels_b)
        inputs = [self.scale_input(0, None, modulation)]
        with torch.no_grad():
            features = list(self.quantizer.next_inputs(codes))
        inputs += [self.scale_input(k, some, modulation) for k, some in enumerate(features, start=1)]
        return VAROutput(self._transform(torch.cat(inputs, dim=1), self.ends, modulation, None), None, dropped)

    def condition_ids(self, condition: Tensor | None, batch: int) -> Tensor:
        """The condition as int64 (B, 1) ids of the class embedding. Errors: see `rqgen.models.condition`."""
        return condition_ids(
            condition,
            batch,
            kind="class",
            vocab_size=self.config.num_classes,
            length=1,
            has_null=self.config.has_null_condition,
            device=self.device,
        )

    def check_codebooks(self) -> None:
        """Raises ValueError while this prior waits for its codebook (unchecked on CUDA, as in `forward`)."""
        codebook = self.quantizer.codebook
        if not (codebook.is_cuda or torch.compiler.is_compiling()) and bool(codebook.flatten()[0].isnan()):
            raise ValueError("prior: it has no codebook yet; call set_quantizer(tokenizer.quantizer) first")

    def modulation(self, labels_b: Tensor) -> Modulation:
        """What the classes, int64 (B,), do to every block; computed once, however many scales follow."""
        width = self.config.embed_dim
        embedded = self.class_embedding(labels_b)
        activated = F.silu(embedded)
        if self.shared_modulation is not None:
            shared = self.shared_modulation(activated).view(-1, 1, 6, width)
            blocks = [shared + block.modulation for block in self.blocks]
        else:
            blocks = [block.modulation(activated).view(-1, 1, 6, width) for block in self.blocks]
        return Modulation(embedded.unsqueeze(1), blocks, self.modulation_out(activated).view(-1, 1, 2, width))

    def scale_input(self, k: int, features: Tensor | None, modulation: Modulation) -> Tensor:
        """Transformer's input (B, h_k * w_k, W) at scale k, from `quantizer.downsample(f_hat, k)`; None at k = 0."""
        begin = self.ends[k - 1] if k else 0
        level = torch.full((), k, dtype=torch.int64, device=self.positions.device)
        places = self.level_embedding(level) + self.positions[begin : self.ends[k]]
        if k == 0:
            return modulation.start + self.start_positions + places
        return self.word_embedding(features.flatten(1, 2).to(self.positions.dtype)) + places

    def scale_logits(self, k: int, features: Tensor | None, modulation: Modulation, cache: Cache) -> Tensor:
        """Logits float32 (B, h_k * w_k, K) of scale k alone; `cache` holds the scales before, and then this one."""
        x_blw = self.scale_input(k, features, modulation)
        return self._transform(x_blw, [x_blw.shape[1]], modulation, cache)

    def _transform(self, x_blw: Tensor, ends: Sequence[int], modulation: Modulation, cache: Cache | None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x_blw = block(x_blw, modulation.blocks[layer], ends, cache, layer)
        if cache is not None:
            cache.advance(x_blw.shape[1])
        scale, shift = modulation.head.unbind(2)
        # In half precision the last norm is float32.
        x_blw = self.norm_out(x_blw.to(torch.promote_types(x_blw.dtype, torch.float32)))
        return self.classifier((x_blw * (1 + scale) + shift).to(self.dtype)).float()


def var_loss(output: VAROutput, codes: Sequence[Tensor]) -> VARLoss:
    """Cross-entropy of all tokens, `-log softmax(logits)[token]`, and its mean over each scale.

    Args:
        output: of `VAR.forward` for these codes.
        codes: token maps int64 (B, h_k, w_k).

    Raises:
        ValueError: as many tokens as logits are expected; no images.
        TypeError, IndexError: codes that are not int64, or out of range (unchecked on CUDA).
    """
    flat = [tokens.flatten(1) for tokens in codes]
    target = torch.cat(flat, dim=1)
    if target.shape != output.logits.shape[:2]:
        raise ValueError(f"codes: expected {tuple(output.logits.shape[:2])} tokens, got {tuple(target.shape)}")
    if len(target) == 0:
        raise ValueError("codes: expected those of at least one image to train on, got none")
    check_targets(target, output.logits.shape[-1], "codes")
    per_token = F.cross_entropy(output.logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    parts = per_token.detach().split([tokens.shape[1] for tokens in flat], dim=1)
    return VARLoss(per_token.mean(), torch.stack([part.mean() for part in parts]))
