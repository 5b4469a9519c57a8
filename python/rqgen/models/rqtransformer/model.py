"""The RQ-Transformer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rqgen.quantizers import CodeLayout

from ..changes import as_written, computes_as
from ..condition import condition_ids
from ..interfaces import LevelLoss, Prior, Tokenizer
from ..rqvae import RQVAE
from ..transformer import Cache, Transformer
from .classifier import INIT_STD, CodeClassifier
from .config import RQTransformerConfig
from .loss import RQTransformerOutput, SoftLabels, check_some, prior_loss, soft_label_loss


@as_written("depth", "positions")
class RQTransformer(Prior):
    """Spatial transformer over positions, depth transformer over the D codes of one position.

    With S_td the code at position t and depth d and e its embedding (equations 8-14 of the paper):

        u_1 = condition,  u_t = PE_T(t) + sum_d e(S_{t-1,d})      h = SpatialTransformer(u)
        v_t1 = PE_D(1) + h_t,  v_td = PE_D(d) + sum_{d'<d} e(S_td')
        p(S_td | ...) = softmax(classifier(DepthTransformer(v_t1 .. v_td)))

    A condition of several tokens comes before the positions; h_1 is the output at its last token, and the
    earlier outputs predict the tokens that follow them.

    Args:
        config: sizes and layout.
        codebooks: (K, C) or (D, K, C), as `config.shared_codebook` says; kept as a buffer and saved with the
            model. Without them the buffer holds NaN until `set_codebooks` or loaded weights fill it.
    """

    model_type: ClassVar[str] = "rqtransformer"
    config_class: ClassVar[type] = RQTransformerConfig
    tokenizer_class: ClassVar[type[Tokenizer]] = RQVAE
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "int8")
    edits = "rows"
    given_later: ClassVar[frozenset[str]] = frozenset({"codebooks"})
    config: RQTransformerConfig
    codebooks: Tensor | None

    def __init__(self, config: RQTransformerConfig, codebooks: Tensor | None = None) -> None:
        super().__init__(config)
        height, width, depth = config.code_shape
        channels = config.embed_dim
        self.depth = depth
        self.positions = height * width
        self._layout = CodeLayout.stacks(config.code_shape, config.codebook_size)

        # The last row is the null condition, where there is one.
        rows = max(config.condition_vocab_size, 1) + config.has_null_condition
        self.condition_embedding = nn.Embedding(rows, channels)
        self.condition_positions = nn.Parameter(torch.empty(config.condition_length, channels))
        # The first position has no stack before it: the condition takes its place.
        self.spatial_positions = nn.Parameter(torch.empty(self.positions - 1, channels))
        self.depth_positions = nn.Parameter(torch.empty(depth, channels))
        embeddings = (config.spatial_embedding, config.depth_embedding)
        if "table" in embeddings:
            self.table = nn.Embedding(config.codebook_size * (1 if config.shared_table else depth), channels)
        if config.spatial_embedding == "codebook":
            self.spatial_projection = nn.Linear(config.code_dim, channels)
        if config.depth_embedding == "codebook":
            self.depth_projection = nn.Linear(config.code_dim, channels)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.spatial_transformer = Transformer(config.spatial, channels)
        self.depth_transformer = Transformer(config.depth, channels)
        self.classifier = CodeClassifier(channels, config.codebook_size, depth, config.shared_classifier)
        if config.condition == "tokens":
            self.condition_classifier = nn.Sequential(
                nn.LayerNorm(channels), nn.Linear(channels, config.condition_vocab_size)
            )
        self._initialise()

        leading = () if config.shared_codebook else (depth,)
        shape = (*leading, config.codebook_size, config.code_dim)
        self.register_buffer("codebooks", torch.full(shape, torch.nan) if config.code_dim else None)
        if codebooks is not None:
            self.set_codebooks(codebooks)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for positions in (self.condition_positions, self.spatial_positions, self.depth_positions):
            nn.init.normal_(positions, std=INIT_STD)

    def set_codebooks(self, codebooks: Tensor) -> None:
        """Copy the tokenizer's codebooks into the buffer this prior embeds with.

        Raises:
            ValueError: a shape other than the config's, values that are not finite, or no buffer for them.
        """
        if self.codebooks is None:
            raise ValueError("codebooks: expected none, as this prior carries no codebooks (code_dim is 0)")
        if codebooks.shape != self.codebooks.shape:
            raise ValueError(f"codebooks: expected shape {tuple(self.codebooks.shape)}, got {tuple(codebooks.shape)}")
        if not bool(torch.isfinite(codebooks).all()):
            raise ValueError("codebooks: expected finite values, got NaN or infinity")
        self.codebooks.copy_(codebooks)

    def forward(
        self, codes: Tensor, condition: Tensor | None = None, soft_labels: SoftLabels | None = None
    ) -> RQTransformerOutput:
        """Return the logits of every code given all codes before it, or their loss.

        Args:
            codes: int64 (B, h, w, D) in [0, K).
            condition: as `condition_ids`. In training mode each row's condition is replaced by the null
                condition with probability `config.condition_dropout` (torch's global generator).
            soft_labels: to train without logits: classifier and loss take some rows at a time, forward and backward,
                and nothing of B * T * D x K is materialised. (A classifier with hooks, or another module in its place,
                is called for its logits, which then exist.) The loss is part of the call so that a wrapper
                (DistributedDataParallel, torch.compile) sees that all parameters are used inside.

        Raises:
            TypeError, ValueError, IndexError: wrong dtype, shape or device; a code or condition out of range
                (on CUDA the embedding kernel checks the range: reading it back here would stall training).
        """
        self.layout.check(codes, device=self.device, owner="prior")
        batch = len(codes)
        self.check_codebooks()
        if soft_labels is not None and soft_labels.residuals.shape[:-1] != codes.shape:
            expected, got = ", ".join(map(str, codes.shape)), tuple(soft_labels.residuals.shape)
            raise ValueError(f"soft_labels.residuals: expected shape ({expected}, C), got {got}")
        if soft_labels is not None:
            check_some(codes)
        condition_bl = self.condition_ids(condition, batch)
        dropped = None
        if self.config.has_null_condition and condition is not None and self.training:
            dropped = torch.rand(batch, device=codes.device, dtype=torch.float32) < self.config.condition_dropout
            condition_bl = torch.where(dropped[:, None], self.config.condition_vocab_size, condition_bl)

        codes_btd = codes.reshape(batch, self.positions, self.depth)
        outputs_bnw = self.spatial_outputs(codes_btd[:, :-1], condition_bl)
        last = self.config.condition_length - 1
        states_ndw = self.depth_transformer(self._depth_inputs(outputs_bnw[:, last:], codes_btd))
        logits = condition_logits = code_loss = None
        if soft_labels is not None and computes_as(self.classifier, CodeClassifier):
            code_loss = self.classifier.soft_label_loss(states_ndw, soft_labels)
        else:
            logits = self.classifier(states_ndw).view(*codes.shape, self.config.codebook_size)
        if soft_labels is not None and logits is not None:
            code_loss, logits = soft_label_loss(logits, soft_labels, inplace=False), None
        if self.config.condition == "tokens" and condition is not None:
            condition_logits = self.condition_classifier(outputs_bnw[:, :last]).float()
        return RQTransformerOutput(logits, condition_logits, dropped, code_loss)

    @property
    def layout(self) -> CodeLayout:
        """Stacks of D codes."""
        return self._layout

    @property
    def condition_kind(self) -> str:
        """ "none", "class" or "tokens"."""
        return self.config.condition

    @property
    def condition_size(self) -> int:
        """Classes, or token ids, that a condition may hold."""
        return self.config.condition_vocab_size

    @property
    def has_null_condition(self) -> bool:
        """True if the prior learned the unconditional distribution too."""
        return self.config.has_null_condition

    def codebook_pairs(self, vae: RQVAE) -> list[tuple[Tensor, Tensor]]:
        """Return the codebooks, where this prior carries any."""
        return [] if self.codebooks is None else [(self.codebooks, vae.codebooks)]

    def loss(self, codes: Tensor, condition: Tensor | None = None) -> LevelLoss:
        """Return `prior_loss` of hard labels, token conditions included."""
        tokens = condition if self.config.condition == "tokens" else None
        loss = prior_loss(self(codes, condition), codes=codes, condition=tokens)
        return LevelLoss(loss.total, loss.per_depth)

    def condition_ids(self, condition: Tensor | None, batch: int) -> Tensor:
        """Return the condition as int64 (B, L) ids of the condition embedding.

        Args:
            condition: None; class labels (B,) or (B, 1); token ids (B, L). None means no condition at all for
                an unconditional prior, and the null condition for one that has it.
            batch: B.

        Raises:
            TypeError, ValueError, IndexError: as `forward`; a missing condition, or one given to an unconditional
                prior.
        """
        config = self.config
        return condition_ids(
            condition,
            batch,
            kind=config.condition,
            vocab_size=config.condition_vocab_size,
            length=config.condition_length,
            has_null=config.has_null_condition,
            device=self.device,
        )

    def check_codebooks(self) -> None:
        """Raise ValueError while this prior waits for its codebooks (unchecked on CUDA, as in `forward`, and on
        the meta device)."""
        if self.codebooks is None or torch.compiler.is_compiling():
            return
        if self.codebooks.is_cuda or self.codebooks.is_meta:
            return
        if bool(self.codebooks.flatten()[0].isnan()):
            raise ValueError("prior: it has no codebooks yet; call set_codebooks(tokenizer.codebooks) first")

    def spatial_outputs(
        self, codes_bnd: Tensor, condition_bl: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return the outputs of the spatial transformer at the condition's tokens and at the n given stacks.

        The output at a stack (or at the condition's last token) is the context h of the position after it.

        Args:
            codes_bnd: int64 (B, n, D): the stacks after those the cache has seen; from the first one without.
            condition_bl: int64 (B, L) from `condition_ids`, for the first call of a sequence alone.
            cache: keys and values of the positions before, see `rqgen.inference.kv_cache`; advanced by this call.

        Returns:
            (B, L + n, W), or (B, n, W) without a condition.
        """
        if condition_bl is not None:
            first = 0
        elif cache is not None:
            first = cache.length - self.config.condition_length
        else:
            raise ValueError("condition_bl: expected ids in the first call of a sequence (no cache), got None")
        u_bnw = self.embed_stacks(codes_bnd) + self.spatial_positions[first : first + codes_bnd.shape[1]]
        if condition_bl is not None:
            condition_blw = self.condition_embedding(condition_bl) + self.condition_positions
            u_bnw = torch.cat([condition_blw, u_bnw], dim=1)
        return self.spatial_transformer(self.embedding_dropout(u_bnw), cache)

    def embed_stacks(self, codes_bnd: Tensor) -> Tensor:
        """Return the inputs of the spatial transformer at the stacks (B, n, D), short of their place's embedding: (B,
        n, W)."""
        e_bnc = self._embed(self.config.spatial_embedding, codes_bnd).sum(dim=-2)
        return self.spatial_projection(e_bnc) if self.config.spatial_embedding == "codebook" else e_bnc

    def sample_stack(self, context_bw: Tensor, sample: Callable[[Tensor, int], Tensor], cache: Cache) -> Tensor:
        """Sample the D codes of one position, one after another.

        Args:
            context_bw: (B, W), the position's context from `spatial_outputs`.
            sample: from float32 logits (B, K) and d = 0 .. D-1 to codes int64 (B,).
            cache: the depth transformer's; it is reset first.

        Returns:
            int64 (B, D).
        """
        cache.reset()
        codes: list[Tensor] = []
        x_bw = context_bw
        sum_bc: Tensor | None = None
        for d in range(self.depth):
            state_bw = self.depth_transformer((x_bw + self.depth_positions[d])[:, None], cache)[:, 0]
            codes.append(sample(self.classifier(state_bw, d), d))
            if d + 1 < self.depth:
                e_bc = self._embed(self.config.depth_embedding, codes[d][:, None], first_depth=d)[:, 0]
                cumulative = self.config.depth_context == "cumulative"
                sum_bc = sum_bc + e_bc if cumulative and sum_bc is not None else e_bc
                x_bw = self.depth_projection(sum_bc) if self.config.depth_embedding == "codebook" else sum_bc
        return torch.stack(codes, dim=-1)

    def _depth_inputs(self, contexts_btw: Tensor, codes_btd: Tensor) -> Tensor:
        """Return v_td of whole maps: (B * T, D, W)."""
        context_n1w = contexts_btw.reshape(-1, 1, self.config.embed_dim)
        e_ndc = self._embed(self.config.depth_embedding, codes_btd.reshape(-1, self.depth)[:, :-1])
        if self.config.depth_context == "cumulative":
            e_ndc = e_ndc.cumsum(dim=-2)
        if self.config.depth_embedding == "codebook":
            e_ndc = self.depth_projection(e_ndc)
        return torch.cat([context_n1w, e_ndc], dim=1) + self.depth_positions

    def _embed(self, kind: str, codes: Tensor, first_depth: int = 0) -> Tensor:
        """Return e(S) of codes (..., d) from depth first_depth on: (..., d, C), or (..., d, W) from the table."""
        config = self.config
        if not (config.shared_codebook if kind == "codebook" else config.shared_table):
            depths = torch.arange(first_depth, first_depth + codes.shape[-1], device=codes.device)
            codes = codes + depths * config.codebook_size
        if kind == "table":
            return self.table(codes)
        assert self.codebooks is not None  # checked by the config
        return F.embedding(codes, self.codebooks.flatten(0, -2))
