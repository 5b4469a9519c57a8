"""A prior packed for sampling on a CPU: a call for a step of the spatial stack, and one for all codes of a position."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rqkernels
from rqgen.models import RQTransformer
from rqgen.models.parts import linear, members
from rqgen.models.transformer import Transformer, TransformerBlock, TransformerConfig

from .kv_cache import KVCache
from .params import LevelParams
from .sampler import Sampled, no_progress


class PackedPrior:
    """The weights of an `RQTransformer`, copied into the order in which `rqkernels` reads them.

    A code's vector is kept as it enters each stack, already multiplied by the linear layer before it: a look-up per
    code in place of a product, with the same bits in every batch. (The products that make the tables are float64, so
    that they do not depend on the number of threads.)

    Of the prior's modules only their tensors are used: `rqgen.inference.stacks` decides for which priors that is
    enough.

    Args:
        prior: on the CPU.
        precision: of the two stacks and the classifier, see `rqkernels.PackedTransformer`.

    Attributes:
        spatial: the stack over positions, for `rqkernels.transformer_step`. Its keys and values are float32.
        decoder: what `rqkernels.depth_decode` takes.
    """

    def __init__(self, prior: RQTransformer, precision: str) -> None:
        self.config, self.precision, self.positions = prior.config, precision, prior.positions
        self.spatial = pack_transformer(prior.spatial_transformer, prior.config.spatial, precision, prior.device)
        vectors, bias = _code_vectors(prior, prior.config.depth_embedding, getattr(prior, "depth_projection", None))
        positions = prior.depth_positions.detach().float().clone()
        positions[1:] += bias
        self.decoder = rqkernels.PackedDepthDecoder(
            pack_transformer(prior.depth_transformer, prior.config.depth, precision, prior.device),
            positions,
            vectors,
            norm_weight=prior.classifier.norm.weight,
            norm_bias=prior.classifier.norm.bias,
            classifier_weight=prior.classifier.weight,
            classifier_bias=prior.classifier.bias,
            cumulative=prior.config.depth_context == "cumulative",
            eps=prior.classifier.norm.eps,
        )
        vectors, bias = _code_vectors(prior, prior.config.spatial_embedding, getattr(prior, "spatial_projection", None))
        self._vectors = vectors
        self._positions = prior.spatial_positions.detach().float() + bias
        self._condition = prior.condition_embedding.weight.detach().float().clone()
        self._condition_positions = prior.condition_positions.detach().float().clone()

    @torch.no_grad()
    def sample(
        self,
        condition_ids: Tensor,
        params: LevelParams,
        *,
        first_image: int = 0,
        known: Tensor | None = None,
        advance: Callable[[int], None] = no_progress,
    ) -> Sampled:
        """See `rqgen.inference.Sampler`. Codes are the same in every batch, with every number of threads."""
        known_btd = known_stacks(condition_ids, known, self.config.code_shape[2])
        (batch, given, depth), copies = known_btd.shape, params.copies
        condition_bl = condition_ids
        if params.cfg_scale:
            condition_bl = torch.cat([condition_bl, torch.full_like(condition_bl, self.config.condition_vocab_size)])
        cache = self._new_cache(len(condition_bl))
        codes_btd = known_btd.new_empty(batch, self.positions, depth)
        codes_btd[:, :given] = known_btd
        u_bnw = torch.cat([self._condition_inputs(condition_bl), self._stack_inputs(known_btd, copies)], dim=1)
        for position in range(given, self.positions):
            if position > given:
                u_bnw = self._stack_inputs(codes_btd[:, position - 1 : position], copies, first=position - 1)
            codes_btd[:, position] = rqkernels.depth_decode(
                self._step(u_bnw, cache)[:, -1],
                self.decoder,
                temperature=list(params.temperature),
                top_k=list(params.top_k),
                top_p=list(params.top_p),
                guidance=params.cfg_scale[0] if params.cfg_scale else 0.0,
                seed=params.seed,
                offset=first_image,
                stream=position * depth,
            )
            advance(batch)
        return Sampled(codes_btd.view(batch, *self.config.code_shape))

    def steps(self, known: int = 0) -> int:
        """Return the number of positions that are not known."""
        return self.positions - known // self.config.code_shape[2]

    @torch.no_grad()
    def logits(self, codes: Tensor, condition_bl: Tensor) -> Tensor:
        """Return logits that `sample` would sample from after each of these codes: `RQTransformer.forward` at this
        precision.

        Args:
            codes: int64 (B, h, w, D) in [0, K).
            condition_bl: ids of `RQTransformer.condition_ids`.

        Returns:
            float32 (B, h, w, D, K).
        """
        codes_btd = codes.flatten(1, 2)
        u_bnw = torch.cat([self._condition_inputs(condition_bl), self._stack_inputs(codes_btd[:, :-1])], dim=1)
        contexts_btw = self._step(u_bnw, self._new_cache(len(codes)))[:, -self.positions :]
        logits = rqkernels.depth_logits(contexts_btw.flatten(0, 1), codes_btd.flatten(0, 1), self.decoder)
        return logits.view(*codes.shape, -1)

    def _new_cache(self, batch: int) -> KVCache:
        packed = self.spatial
        capacity = self.config.condition_length + self.positions - 1
        shape = packed.layers, batch, packed.heads, capacity, packed.width // packed.heads
        return KVCache(*shape, dtype=torch.float32, device=torch.device("cpu"))

    def _condition_inputs(self, condition_bl: Tensor) -> Tensor:
        """Return the inputs at the condition's tokens, (B, L, W)."""
        return F.embedding(condition_bl, self._condition) + self._condition_positions

    def _stack_inputs(self, codes_bnd: Tensor, copies: int = 1, *, first: int = 0) -> Tensor:
        """Return the spatial stack's inputs at the stacks of positions first, first + 1, ...: (copies * B, n, W)."""
        u_bnw = self._positions[first : first + codes_bnd.shape[1]].expand(len(codes_bnd), -1, -1)
        # One table of all depths, or one for each.
        offset = self.config.codebook_size if len(self._vectors) > self.config.codebook_size else 0
        for d, codes_bn in enumerate(codes_bnd.unbind(-1)):
            u_bnw = u_bnw + F.embedding(codes_bn + d * offset, self._vectors)
        return u_bnw.repeat(copies, 1, 1)

    def _step(self, u_bnw: Tensor, cache: KVCache) -> Tensor:
        outputs_bnw = rqkernels.transformer_step(u_bnw, self.spatial, cache.keys, cache.values, cache.length)
        cache.advance(u_bnw.shape[1])
        return outputs_bnw


def known_stacks(condition_ids: Tensor, known: Tensor | None, depth: int) -> Tensor:
    """Return the known codes (B, n) of a `Sampler` as stacks (B, n / D, D)."""
    if known is None:
        known = condition_ids.new_empty(len(condition_ids), 0)
    return known.reshape(len(known), known.shape[1] // depth, depth)


def pack_transformer(
    stack: Transformer, config: TransformerConfig, precision: str, device: torch.device
) -> rqkernels.PackedTransformer:
    """Return the blocks of `stack`, which are on `device`, for `rqkernels.transformer_step`."""
    blocks = [
        rqkernels.BlockWeights(
            block.attention_norm.weight,
            block.attention_norm.bias,
            block.attention.qkv.weight,
            block.attention.qkv.bias,
            block.attention.out.weight,
            block.attention.out.bias,
            block.mlp_norm.weight,
            block.mlp_norm.bias,
            linear(block.mlp, 0).weight,
            linear(block.mlp, 0).bias,
            linear(block.mlp, 2).weight,
            linear(block.mlp, 2).bias,
        )
        for block in members(stack.blocks, TransformerBlock)
    ]
    return rqkernels.PackedTransformer(
        blocks, stack.heads, activation=config.activation, precision=precision, width=stack.width, device=device
    )


def _code_vectors(prior: RQTransformer, kind: str, projection: nn.Linear | None) -> tuple[Tensor, Tensor]:
    """Return the vector that a code adds to a stack's input, (K, W) or (D * K, W), and what a position adds once,
    (W,)."""
    if kind == "table":
        return prior.table.weight.detach().float().clone(), torch.zeros(prior.config.embed_dim, dtype=torch.float32)
    assert prior.codebooks is not None and projection is not None  # checked by the config
    vectors = prior.codebooks.double().flatten(0, -2) @ projection.weight.detach().double().t()
    return vectors.float(), projection.bias.detach().float()


# --- packing once ------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    packed: PackedPrior
    description: str  # what it was made from, other than tensors
    tensors: list[Tensor]  # copies of what it was made from


_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def packed_prior(prior: RQTransformer, precision: str) -> PackedPrior:
    """Return the `PackedPrior` of `prior`, as `packed_once` keeps it."""
    tensors = (*prior.parameters(), *prior.buffers())
    return packed_once(prior, tensors, f"{precision} {prior.config!r}", lambda: PackedPrior(prior, precision))


def packed_once(
    owner: nn.Module, weights: Iterable[Tensor], description: str, pack: Callable[[], PackedPrior]
) -> PackedPrior:
    """Return the result of `pack`, kept from the last call while `owner` lives and both are the same: the `weights`,
    and the `description` of everything else that it is made by.

    Packing takes as long as sampling an image or two, comparing all weights with copies of them a small part of one. So
    every change is seen, also one that version counters do not show, such as an average updated through `.data`. The
    weights of the last precision are kept, and those copies.
    """
    tensors = [tensor.detach() for tensor in weights]
    kept = _KEPT.get(owner)
    if kept is None or kept.description != description or not _same(tensors, kept.tensors):
        # Copied first: a write of another thread meanwhile is then a change at the next call.
        copies = [tensor.clone() for tensor in tensors]
        kept = _Kept(pack(), description, copies)
        _KEPT[owner] = kept
    return kept.packed


def _same(tensors: list[Tensor], others: list[Tensor]) -> bool:
    return len(tensors) == len(others) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(tensors, others, strict=True)
    )
