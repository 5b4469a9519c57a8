"""RQ-Transformer: an autoregressive prior over stacks of residual codes (Lee et al., arXiv 2203.01941)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

import rqkernels
from rqgen.checks import check_targets, integers
from rqgen.config import check_bounds, check_fields
from rqgen.quantizers import CodeLayout

from .changes import as_written, computes_as
from .condition import checked_class_names, condition_ids
from .interfaces import LevelLoss, Prior, Tokenizer
from .rqvae import RQVAE
from .transformer import Cache, Transformer, TransformerConfig

_INIT_STD = 0.02
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
        spatial_embedding, depth_embedding: what stands for a code in the inputs of each stack: "codebook",
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
        # Configs read from JSON or YAML hold lists; one type makes shapes comparable.
        self.code_shape = tuple(self.code_shape)  # type: ignore[assignment]
        if len(self.code_shape) != 3 or min(self.code_shape) < 1:
            raise ValueError(f"code_shape must be three numbers >= 1 (h, w, D), got {self.code_shape}")
        for name, lowest in (("codebook_size", 1), ("code_dim", 0), ("embed_dim", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be >= {lowest}, got {getattr(self, name)}")
        widths = {name: (0, 2**24) for name in ("codebook_size", "code_dim", "condition_vocab_size")}
        check_bounds(self, **widths, embed_dim=(1, 2**17), condition_length=(0, 2**16))
        h, w, depth = self.code_shape
        if h * w > 2**20 or depth > 2**10:
            raise ValueError(f"code_shape: expected at most 2^20 positions of 2^10 codes, got {self.code_shape}")
        for name, allowed in (
            ("spatial_embedding", ("codebook", "table")),
            ("depth_embedding", ("codebook", "table")),
            ("depth_context", ("cumulative", "previous")),
            ("condition", ("none", "class", "tokens")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.code_dim == 0 and "codebook" in (self.spatial_embedding, self.depth_embedding):
            raise ValueError('code_dim is 0, but an embedding is "codebook": give the codebooks\' code_dim')
        for name in ("spatial", "depth"):
            if self.embed_dim % getattr(self, name).heads:
                raise ValueError(f"embed_dim ({self.embed_dim}) must be divisible by {name}.heads")
        for name in ("condition_dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        self._check_condition()
        classes = self.condition_vocab_size if self.condition == "class" else 0
        self.class_names = checked_class_names(self.class_names, classes)

    def _check_condition(self) -> None:
        vocab_size, length = self.condition_vocab_size, self.condition_length
        if self.condition == "none":
            if vocab_size != 0 or length != 1 or self.condition_dropout > 0:
                raise ValueError(
                    'condition is "none": condition_vocab_size, condition_length and condition_dropout must '
                    f"keep their defaults 0, 1 and 0, got {vocab_size}, {length} and {self.condition_dropout}"
                )
        elif vocab_size < 1:
            raise ValueError(f"condition_vocab_size must be >= 1 with a condition, got {vocab_size}")
        elif self.condition == "class" and length != 1:
            raise ValueError(f'condition_length must be 1 where condition is "class", got {length}')
        elif self.condition == "tokens" and length < 2:
            raise ValueError(f'condition_length must be >= 2 where condition is "tokens", got {length}')

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
        """A published size: "90M", "350M", "480M", "800M", "1.4B" (48+0 layers with one code per position).

        `settings` are further fields of the config (condition, embeddings, dropouts).

        Raises:
            ValueError: an unknown name, or a setting that the preset itself decides.
        """
        presets = _PRESETS_DEPTH_ONE if code_shape[2] == 1 else _PRESETS
        if name not in presets:
            raise ValueError(f"name must be one of {', '.join(presets)}, got {name!r}")
        if decided := sorted({"embed_dim", "spatial", "depth"} & settings.keys()):
            raise ValueError(f"preset {name!r} decides {', '.join(decided)}: change what it returns instead")
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
        """Whether the prior learns the unconditional distribution too."""
        return self.condition_dropout > 0


class SoftLabels(NamedTuple):
    """What the label `Q_tau(k | r) = softmax_k(-|r - e(k)|^2 / tau)` of every code is made of (equation 15)."""

    residuals: Tensor
    """(B, h, w, D, C): what each depth quantized, r_0 .. r_{D-1} of the search."""
    codebooks: Tensor
    """(K, C) or (D, K, C), see `RQTransformer.codebooks`."""
    tau: float
    """Temperature > 0, in squared units of the residuals."""


class CodeLoss(NamedTuple):
    """Negative log-likelihood of codes, float32."""

    mean: Tensor
    """Over all T * D codes; what is differentiated."""
    per_depth: Tensor
    """(D,): the same depth by depth, detached."""


class RQTransformerOutput(NamedTuple):
    """What a prior returns for whole code maps."""

    logits: Tensor | None
    """float32 (B, h, w, D, K): `p(S_td | S_{<t}, S_{t,<d})` before the softmax; None where `code_loss` stands."""
    condition_logits: Tensor | None = None
    """float32 (B, L - 1, V): predictions of condition tokens 2..L; only with a token condition."""
    condition_dropped: Tensor | None = None
    """bool (B,): rows whose condition the prior replaced by the null condition; None outside that."""
    code_loss: CodeLoss | None = None
    """Where the prior was called with soft labels: its loss against them, in place of logits."""


class PriorLoss(NamedTuple):
    """Terms of a prior's loss, float32."""

    total: Tensor
    codes: Tensor
    """Mean over all T * D codes."""
    per_depth: Tensor
    """(D,): the same, depth by depth."""
    condition: Tensor | None
    """Mean over the predicted condition tokens; None without a token condition."""


@as_written()
class CodeClassifier(nn.Module):
    """LayerNorm, then a linear layer to K logits: one for all depths (K, W), or one per depth (D, K, W)."""

    def __init__(self, width: int, codebook_size: int, depth: int, shared: bool) -> None:
        super().__init__()
        leading = () if shared else (depth,)
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.empty(*leading, codebook_size, width))
        self.bias = nn.Parameter(torch.zeros(*leading, codebook_size))
        nn.init.normal_(self.weight, std=_INIT_STD)

    def forward(self, x: Tensor, d: int | None = None) -> Tensor:
        """(N, D, W) -> (N, D, K) float32; with `d`, the states of that one depth: (N, W) -> (N, K)."""
        x = self.norm(x)
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias).float()
        if d is not None:
            return F.linear(x, self.weight[d], self.bias[d]).float()
        return (torch.einsum("ndw,dkw->ndk", x, self.weight) + self.bias).float()

    def soft_label_loss(self, x: Tensor, labels: SoftLabels) -> CodeLoss:
        """The loss of the logits of x (N, D, W) against soft labels; at most 32 MiB of these logits exist at a time.
        It stands for `forward` and the loss of its result, and does not call it."""
        x = self.norm(x)
        rows, depth, _ = x.shape
        residuals, codebooks, tau = labels
        residuals = residuals.reshape(rows, depth, -1)
        if self.weight.dim() == 2:
            losses = x.new_empty(rows, depth, dtype=torch.float32)
            mean = rqkernels.fused_linear_soft_label_cross_entropy(
                x, self.weight, self.bias, residuals, codebooks, tau, losses_out=losses
            )
            return CodeLoss(mean, losses.mean(dim=0))
        books = codebooks if codebooks.dim() == 3 else [codebooks] * depth
        means = [
            rqkernels.fused_linear_soft_label_cross_entropy(x[:, d], weight, bias, residuals[:, d], books[d], tau)
            for d, (weight, bias) in enumerate(zip(self.weight.unbind(), self.bias.unbind(), strict=True))
        ]
        per_depth = torch.stack(means)
        return CodeLoss(per_depth.mean(), per_depth.detach())


@as_written("depth", "positions")
class RQTransformer(Prior):
    """Spatial transformer over positions, depth transformer over the D codes of one position.

    With S_td the code at position t and depth d and e its embedding (equations 8-14 of the paper):

        u_1 = condition,  u_t = PE_T(t) + sum_d e(S_{t-1,d})      h = SpatialTransformer(u)
        v_t1 = PE_D(1) + h_t,  v_td = PE_D(d) + sum_{d'<d} e(S_td')
        p(S_td | ...) = softmax(classifier(DepthTransformer(v_t1 .. v_td)))

    A condition of several tokens stands before the positions; h_1 is the output at its last token, and the
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
        # The first position has no stack before it: the condition stands in its place.
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
                nn.init.normal_(module.weight, std=_INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for positions in (self.condition_positions, self.spatial_positions, self.depth_positions):
            nn.init.normal_(positions, std=_INIT_STD)

    def set_codebooks(self, codebooks: Tensor) -> None:
        """Copies the tokenizer's codebooks into the buffer this prior embeds with.

        Raises:
            ValueError: a shape other than the config's, values that are not finite, or no buffer for them.
        """
        if self.codebooks is None:
            raise ValueError("codebooks: this prior carries none (code_dim is 0)")
        if codebooks.shape != self.codebooks.shape:
            raise ValueError(f"codebooks: expected shape {tuple(self.codebooks.shape)}, got {tuple(codebooks.shape)}")
        if not bool(torch.isfinite(codebooks).all()):
            raise ValueError("codebooks must be finite")
        self.codebooks.copy_(codebooks)

    def forward(
        self, codes: Tensor, condition: Tensor | None = None, soft_labels: SoftLabels | None = None
    ) -> RQTransformerOutput:
        """Logits of every code given all codes before it, or their loss.

        Args:
            codes: int64 (B, h, w, D) in [0, K).
            condition: as `condition_ids`. In training mode each row's condition is replaced by the null
                condition with probability `config.condition_dropout` (torch's global generator).
            soft_labels: to train without logits: classifier and loss take some rows at a time, forward and backward,
                and nothing of B * T * D x K ever exists. (A classifier with hooks, or another module in its place, is
                called for its logits, which then exist.) The loss is part of the call so that what wraps a model
                (DistributedDataParallel, torch.compile) sees all of its parameters used inside.

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
            _check_some(codes)
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
            code_loss, logits = _code_loss(RQTransformerOutput(logits), None, soft_labels, inplace=False), None
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
        """Whether the prior learnt the unconditional distribution too."""
        return self.config.has_null_condition

    def codebook_pairs(self, vae: RQVAE) -> list[tuple[Tensor, Tensor]]:
        """The codebooks, where this prior carries any."""
        return [] if self.codebooks is None else [(self.codebooks, vae.codebooks)]

    def loss(self, codes: Tensor, condition: Tensor | None = None) -> LevelLoss:
        """`prior_loss` of hard labels, token conditions included."""
        tokens = condition if self.config.condition == "tokens" else None
        loss = prior_loss(self(codes, condition), codes=codes, condition=tokens)
        return LevelLoss(loss.total, loss.per_depth)

    def condition_ids(self, condition: Tensor | None, batch: int) -> Tensor:
        """The condition as int64 (B, L) ids of the condition embedding.

        Args:
            condition: None; class labels (B,) or (B, 1); token ids (B, L). None means no condition at all for
                an unconditional prior, and the null condition for one that has it.
            batch: B.

        Raises:
            TypeError, ValueError, IndexError: as `forward`; a condition missing, or given in vain.
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
        """Raises ValueError while this prior waits for its codebooks (unchecked on CUDA, as in `forward`)."""
        if self.codebooks is None or self.codebooks.is_cuda or torch.compiler.is_compiling():
            return
        if bool(self.codebooks.flatten()[0].isnan()):
            raise ValueError("prior: it has no codebooks yet; call set_codebooks(tokenizer.codebooks) first")

    def spatial_outputs(
        self, codes_bnd: Tensor, condition_bl: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Outputs of the spatial transformer at the condition's tokens and at the n given stacks.

        The output at a stack (or at the condition's last token) is the context h of the position after it.

        Args:
            codes_bnd: int64 (B, n, D): the stacks after those the cache has seen; from the first one without.
            condition_bl: int64 (B, L) from `condition_ids`, for the first call of a sequence alone.
            cache: keys and values of what came before, see `rqgen.inference.kv_cache`; moved on by this call.

        Returns:
            (B, L + n, W), or (B, n, W) without a condition.
        """
        first = 0 if condition_bl is not None else cache.length - self.config.condition_length
        u_bnw = self.embed_stacks(codes_bnd) + self.spatial_positions[first : first + codes_bnd.shape[1]]
        if condition_bl is not None:
            condition_blw = self.condition_embedding(condition_bl) + self.condition_positions
            u_bnw = torch.cat([condition_blw, u_bnw], dim=1)
        return self.spatial_transformer(self.embedding_dropout(u_bnw), cache)

    def embed_stacks(self, codes_bnd: Tensor) -> Tensor:
        """Inputs of the spatial transformer at the stacks (B, n, D), short of their place's embedding: (B, n, W)."""
        e_bnc = self._embed(self.config.spatial_embedding, codes_bnd).sum(dim=-2)
        return self.spatial_projection(e_bnc) if self.config.spatial_embedding == "codebook" else e_bnc

    def sample_stack(self, context_bw: Tensor, sample: Callable[[Tensor, int], Tensor], cache: Cache) -> Tensor:
        """Samples the D codes of one position, one after another.

        Args:
            context_bw: (B, W), the position's context from `spatial_outputs`.
            sample: from float32 logits (B, K) and d = 0 .. D-1 to codes int64 (B,).
            cache: the depth transformer's; its former content is forgotten.

        Returns:
            int64 (B, D).
        """
        cache.reset()
        codes: list[Tensor] = []
        x_bw, sum_bc = context_bw, None
        for d in range(self.depth):
            state_bw = self.depth_transformer((x_bw + self.depth_positions[d])[:, None], cache)[:, 0]
            codes.append(sample(self.classifier(state_bw, d), d))
            if d + 1 < self.depth:
                e_bc = self._embed(self.config.depth_embedding, codes[d][:, None], first_depth=d)[:, 0]
                cumulative = sum_bc is not None and self.config.depth_context == "cumulative"
                sum_bc = sum_bc + e_bc if cumulative else e_bc
                x_bw = self.depth_projection(sum_bc) if self.config.depth_embedding == "codebook" else sum_bc
        return torch.stack(codes, dim=-1)

    def _depth_inputs(self, contexts_btw: Tensor, codes_btd: Tensor) -> Tensor:
        """v_td of whole maps: (B * T, D, W)."""
        context_n1w = contexts_btw.reshape(-1, 1, self.config.embed_dim)
        e_ndc = self._embed(self.config.depth_embedding, codes_btd.reshape(-1, self.depth)[:, :-1])
        if self.config.depth_context == "cumulative":
            e_ndc = e_ndc.cumsum(dim=-2)
        if self.config.depth_embedding == "codebook":
            e_ndc = self.depth_projection(e_ndc)
        return torch.cat([context_n1w, e_ndc], dim=1) + self.depth_positions

    def _embed(self, kind: str, codes: Tensor, first_depth: int = 0) -> Tensor:
        """e(S) of codes (..., d) from depth first_depth on: (..., d, C), or (..., d, W) from the table."""
        config = self.config
        if not (config.shared_codebook if kind == "codebook" else config.shared_table):
            depths = torch.arange(first_depth, first_depth + codes.shape[-1], device=codes.device)
            codes = codes + depths * config.codebook_size
        return F.embedding(codes, self.codebooks.flatten(0, -2)) if kind == "codebook" else self.table(codes)


def prior_loss(
    output: RQTransformerOutput,
    *,
    codes: Tensor | None = None,
    residuals: Tensor | None = None,
    codebooks: Tensor | None = None,
    tau: float | None = None,
    condition: Tensor | None = None,
    condition_weight: float = 0.1,
    inplace: bool = False,
) -> PriorLoss:
    """Negative log-likelihood of all T * D codes (equation 14), with hard or soft labels (equation 15).

        hard: -log softmax(logits)[code]           soft: -sum_k Q_tau(k | r_{d-1}) log softmax(logits)[k]

    With a token condition: total = (1 - condition_weight) * codes + condition_weight * condition.

    Args:
        output: of `RQTransformer.forward`. Where it was called with soft labels, it holds the loss of the codes, and
            no labels are given here.
        codes: hard labels, int64 (B, h, w, D). Give these, or the next three.
        residuals, codebooks, tau: soft labels, see `SoftLabels`.
        condition: the token ids (B, L) that `output` was computed with; a row whose condition was dropped
            does not count in their loss.
        condition_weight: in [0, 1].
        inplace: let the gradient of soft labels overwrite `output.logits`, which nobody may need afterwards, and
            allocate nothing of their size; see `rqkernels.soft_label_cross_entropy`.

    Raises:
        ValueError: both or neither kind of label, no condition, a weight out of range, shapes that differ, inplace
            without soft labels, no images.
        TypeError, IndexError: codes that are not int64, token ids that are no integers; either out of range (unchecked
            on CUDA).
    """
    if not 0 <= condition_weight <= 1:
        raise ValueError(f"condition_weight must be in [0, 1], got {condition_weight}")
    code_loss = _code_loss(output, codes, (residuals, codebooks, tau), inplace)
    if output.condition_logits is None:
        return PriorLoss(code_loss.mean, *code_loss, None)

    if condition is None:
        raise ValueError("condition: the output has condition_logits, so the token ids are needed")
    batch, predicted, _ = output.condition_logits.shape
    if condition.shape != (batch, predicted + 1):
        raise ValueError(f"condition: expected shape {(batch, predicted + 1)}, got {tuple(condition.shape)}")
    condition = integers(condition, "condition")
    check_targets(condition, output.condition_logits.shape[-1], "condition")
    per_token = F.cross_entropy(output.condition_logits.transpose(1, 2), condition[:, 1:], reduction="none")
    kept = per_token.new_ones(batch) if output.condition_dropped is None else ~output.condition_dropped
    condition_loss = (per_token.mean(dim=1) * kept).sum() / kept.sum().clamp(min=1)
    total = (1 - condition_weight) * code_loss.mean + condition_weight * condition_loss
    return PriorLoss(total, *code_loss, condition_loss)


def _check_some(codes: Tensor) -> None:
    if len(codes) == 0:
        raise ValueError(f"codes: expected those of at least one image to train on, got shape {tuple(codes.shape)}")


def _code_loss(
    output: RQTransformerOutput,
    codes: Tensor | None,
    soft: tuple[Tensor | None, Tensor | None, float | None],
    inplace: bool,
) -> CodeLoss:
    hard, *parts = given = [part is not None for part in (codes, *soft)]
    if output.code_loss is not None:
        if any(given) or inplace:
            raise ValueError("prior_loss: the output holds the loss of its codes: give neither labels nor inplace")
        return output.code_loss
    if any(parts) if hard else not all(parts):
        raise ValueError("prior_loss: give either codes, or residuals with codebooks and tau")
    if inplace and hard:
        raise ValueError("inplace: the loss of hard labels leaves the logits as they are")
    logits = output.logits
    _check_some(logits[..., 0])
    if not hard:
        losses = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
        # The mean, so that its gradient is written once; what the depths are logged by comes on the side.
        mean = rqkernels.soft_label_cross_entropy(logits, *soft, inplace=inplace, losses_out=losses)
    else:
        if codes.shape != logits.shape[:-1]:
            raise ValueError(f"codes: expected shape {tuple(logits.shape[:-1])}, got {tuple(codes.shape)}")
        check_targets(codes, logits.shape[-1], "codes")
        losses = F.cross_entropy(logits.flatten(0, -2), codes.flatten(), reduction="none").view(codes.shape)
        mean = losses.mean()
    return CodeLoss(mean, losses.detach().mean(dim=(0, 1, 2)))
