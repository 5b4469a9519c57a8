"""The VAR itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rqgen.quantizers import CodeLayout, MultiScaleDecoder

from ..changes import as_written
from ..condition import condition_ids
from ..interfaces import LevelLoss, Prior, Tokenizer
from ..multiscale_vqvae import MultiScaleVQVAE, scale_sizes
from ..parts import linear, members
from ..transformer import Cache
from .blocks import AdaptiveBlock, Modulation
from .config import VARConfig
from .loss import VAROutput, var_loss

# Blocks start close to the identity: what they add is scaled by these small factors.
_INIT_GATE, _INIT_MODULATION, _INIT_HEAD = 1e-5, 0.5, 0.02


@as_written()
class VAR(Prior):
    """Transformer over the token maps of a `MultiScaleVQVAE`, a whole map at a time.

        p(t_1, .., t_K | c) = prod_k p(t_k | t_1 .. t_{k-1}, c)         (equation 6 of the paper)

    Scale k's tokens see f_hat_{k-1}, the features of the scales before, downsampled to (h_k, w_k): every place gets its
    vector through a linear layer, plus embeddings of level and place. The first scale sees the class. All tokens of
    a scale are sampled at once.

    Args:
        config: sizes and layout.
        quantizer: the tokenizer's (`vae.quantizer`): the codebook and refinements, carried as fixed weights and saved
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
            for block in members(self.blocks, AdaptiveBlock):
                for added in (block.attention.out, linear(block.mlp, 2)):
                    added.weight.div_(math.sqrt(2 * self.config.layers))
                modulation = block.modulation
                rows = modulation.view(-1) if isinstance(modulation, Tensor) else modulation.weight
                gates = 2 * width
                rows[:gates].mul_(_INIT_GATE)
                rows[gates:].mul_(_INIT_MODULATION)

    def set_quantizer(self, quantizer: MultiScaleDecoder) -> None:
        """Copy what token maps stand for out of a tokenizer (`vae.quantizer`).

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
            raise ValueError("quantizer: expected a finite codebook and finite refinements, got NaN or infinity")
        self.quantizer.load_state_dict(wanted)

    @property
    def scales(self) -> list[list[int]]:
        """[h_k, w_k] of each token map."""
        return scale_sizes(self.config.quantizer)

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
        """True if the prior learned the unconditional distribution too."""
        return self.config.has_null_condition

    def cfg_scale_per_level(self, cfg_scale: float) -> list[float]:
        """Return `cfg_scale * k / (K - 1)` at scale k = 0 .. K - 1, as published: the coarse scales are guided less."""
        last = max(self.levels - 1, 1)
        return [cfg_scale * k / last for k in range(self.levels)]

    def codebook_pairs(self, vae: MultiScaleVQVAE) -> list[tuple[Tensor, Tensor]]:
        """Return the codebook and the refinements."""
        theirs = vae.quantizer.fixed_tensors()
        return [(tensor, theirs[name]) for name, tensor in self.quantizer.fixed_tensors().items()]

    def loss(self, codes: Sequence[Tensor], condition: Tensor | None = None) -> LevelLoss:
        """Return `var_loss` of these token maps."""
        return LevelLoss(*var_loss(self(codes, condition), codes))

    def forward(self, codes: Sequence[Tensor], condition: Tensor | None = None) -> VAROutput:
        """Return the logits of every token given all scales before its own, in one pass.

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
        """Return the condition as int64 (B, 1) ids of the class embedding. Errors: see `rqgen.models.condition`."""
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
        """Raise ValueError while this prior waits for its codebook (unchecked on CUDA, as in `forward`, and on the
        meta device)."""
        codebook = self.quantizer.codebook
        if codebook.is_cuda or codebook.is_meta or torch.compiler.is_compiling():
            return
        if bool(codebook.flatten()[0].isnan()):
            raise ValueError("prior: it has no codebook yet; call set_quantizer(tokenizer.quantizer) first")

    def modulation(self, labels_b: Tensor) -> Modulation:
        """Return the effect of the classes, int64 (B,), on every block; computed once for all scales."""
        width = self.config.embed_dim
        embedded = self.class_embedding(labels_b)
        activated = F.silu(embedded)
        blocks = [block.modulation for block in members(self.blocks, AdaptiveBlock)]
        if self.shared_modulation is not None:
            shared = self.shared_modulation(activated).view(-1, 1, 6, width)
        modulations = [
            shared + one if isinstance(one, Tensor) else one(activated).view(-1, 1, 6, width) for one in blocks
        ]
        return Modulation(embedded.unsqueeze(1), modulations, self.modulation_out(activated).view(-1, 1, 2, width))

    def scale_input(self, k: int, features: Tensor | None, modulation: Modulation) -> Tensor:
        """Return the transformer's input (B, h_k * w_k, W) at scale k, from `quantizer.downsample(f_hat, k)`; None at k
        = 0."""
        begin = self.ends[k - 1] if k else 0
        level = torch.full((), k, dtype=torch.int64, device=self.positions.device)
        places = self.level_embedding(level) + self.positions[begin : self.ends[k]]
        if features is None:
            return modulation.start + self.start_positions + places
        return self.word_embedding(features.flatten(1, 2).to(self.positions.dtype)) + places

    def scale_logits(self, k: int, features: Tensor | None, modulation: Modulation, cache: Cache) -> Tensor:
        """Return logits float32 (B, h_k * w_k, K) of scale k alone; `cache` holds the scales before, and then this
        one."""
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
