"""The published formulation of sampling, written from scratch for the weights of an `RQTransformer`: a contender.

Like the published sampler (kakaobrain/rq-vae-transformer, `RQTransformer.sample`), it embeds code after code all
positions sampled so far, every depth of each, for the spatial stack and again for the depth stack; keys and values grow
by concatenation, and are stacked again at every layer of every step; queries, keys and values come from three linear
layers; and a code is sampled by `topk` over all K logits, a host sync for NaN, softmax, a full sort for top-p and
`torch.multinomial`, whether or not anything is cut off."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rqgen.models import RQTransformer
from rqgen.models.transformer import Transformer, TransformerBlock


class PublishedSampling:
    """Sampler of code maps from the weights of `prior` by the published formulation. It shares the weights, except for
    those of queries, keys and values, which are split.

    Args:
        prior: in eval mode, of the layout that the published ImageNet priors have: code vectors through linear layers
            into both stacks, summed over depths, one classifier.

    Raises:
        ValueError: a prior of another layout.
    """

    def __init__(self, prior: RQTransformer) -> None:
        config = prior.config
        layout = (config.spatial_embedding, config.depth_embedding, config.depth_context, config.shared_classifier)
        if layout != ("codebook", "codebook", "cumulative", True) or not config.shared_codebook:
            raise ValueError("prior: the published formulation needs code vectors, one codebook and one classifier")
        prior.check_codebooks()
        if prior.codebooks is None:
            raise ValueError("prior: expected one with codebooks, got one without (code_dim is 0)")
        self.prior, self._codebook = prior, prior.codebooks
        self.spatial = [_Block(block, prior.config.spatial.heads) for block in _blocks(prior.spatial_transformer)]
        self.depth = [_Block(block, prior.config.depth.heads) for block in _blocks(prior.depth_transformer)]

    @torch.no_grad()
    def sample(
        self, condition_bl: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
    ) -> Tensor:
        """Return codes (B, T, D) for condition ids (B, L); random numbers come from torch's global generator."""
        prior = self.prior
        codes_btd = torch.zeros(len(condition_bl), prior.positions, prior.depth, dtype=torch.int64, device=prior.device)
        context_b1w = codes_btd.new_empty(0)
        try:
            for t in range(prior.positions):
                for d in range(prior.depth):
                    seen_btd = codes_btd[:, : t + 1].clone()
                    if d == 0:
                        context_b1w = self._context(seen_btd, condition_bl)
                    logits_bk = self._logits(seen_btd, context_b1w, d)
                    codes_btd[:, t, d] = _sample(logits_bk, temperature, top_k, top_p)
        finally:
            for block in (*self.spatial, *self.depth):
                block.past = None  # the next call starts from scratch, and until then the memory is free
        return codes_btd

    def _context(self, seen_btd: Tensor, condition_bl: Tensor) -> Tensor:
        prior = self.prior
        projection, positions = prior.spatial_projection, seen_btd.shape[1]
        e_btdw = F.linear(self._code_vectors(seen_btd), projection.weight, projection.bias / prior.depth)
        # Our table of positions has no row for the last one, which is not an input.
        e_btw = e_btdw.sum(dim=-2)[:, :-1] + prior.spatial_positions[: positions - 1]
        condition_blw = prior.condition_embedding(condition_bl) + prior.condition_positions
        x_bnw = torch.cat([condition_blw, e_btw], dim=1)
        if positions > 1:
            x_bnw = x_bnw[:, -1:]
        for block in self.spatial:
            x_bnw = block(x_bnw)
        return x_bnw[:, -1:]

    def _logits(self, seen_btd: Tensor, context_b1w: Tensor, d: int) -> Tensor:
        prior = self.prior
        e_btdw = prior.depth_projection(self._code_vectors(seen_btd).cumsum(dim=-2))
        inputs_bdw = torch.cat([context_b1w, e_btdw[:, -1, :-1]], dim=1) + prior.depth_positions
        x_b1w = inputs_bdw[:, d : d + 1]
        for block in self.depth:
            if d == 0:
                block.past = None
            x_b1w = block(x_b1w)
        return prior.classifier(x_b1w).flatten(0, 1)

    def _code_vectors(self, codes_btd: Tensor) -> Tensor:
        return F.embedding(codes_btd, self._codebook)


class _Block:
    """Pre-norm block with its keys and values so far, all heads of all rows in one batch of matrices."""

    def __init__(self, block: TransformerBlock, heads: int) -> None:
        self.block, self.heads = block, heads
        weights, biases = block.attention.qkv.weight.chunk(3), block.attention.qkv.bias
        self.qkv = list(zip(weights, [None] * 3 if biases is None else biases.chunk(3), strict=True))
        self.past: Tensor | None = None

    def __call__(self, x_bnw: Tensor) -> Tensor:
        x_bnw = x_bnw + self._attention(self.block.attention_norm(x_bnw))
        return x_bnw + self.block.mlp(self.block.mlp_norm(x_bnw))

    def _attention(self, x_bnw: Tensor) -> Tensor:
        batch, new, width = x_bnw.shape
        x_nbw = x_bnw.transpose(0, 1).contiguous()
        q, k, v = (
            F.linear(x_nbw, weight, bias).view(new, batch * self.heads, width // self.heads).transpose(0, 1)
            for weight, bias in self.qkv
        )
        if self.past is not None:
            k, v = torch.cat([self.past[0], k], dim=1), torch.cat([self.past[1], v], dim=1)
        self.past = torch.stack([k, v])
        total = k.shape[1]
        scores = torch.bmm(q, k.transpose(1, 2) * (1 / math.sqrt(width // self.heads)))
        causal = torch.ones(total, total, dtype=torch.bool, device=x_bnw.device).tril()[None, total - new :]
        weights = F.softmax(scores.masked_fill(~causal, -torch.inf), dim=-1)
        y_nbw = torch.bmm(weights, v).transpose(0, 1).contiguous().view(new, batch, width)
        return self.block.attention.out(y_nbw).transpose(0, 1).contiguous()


def _blocks(stack: Transformer) -> list[TransformerBlock]:
    return list(stack.blocks)  # type: ignore[arg-type]


def _sample(logits_bk: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    size = logits_bk.shape[-1]
    logits_bk = logits_bk.float() / temperature
    largest = logits_bk.topk(min(top_k or size, size)).values
    logits_bk = torch.where(logits_bk < largest[:, -1:], -torch.inf, logits_bk)
    if logits_bk.isnan().sum():
        raise ValueError("logits: NaN")
    probabilities = F.softmax(logits_bk, dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    dropped = ordered.cumsum(dim=-1) >= min(top_p or 1.0, 1.0)
    dropped = torch.cat([torch.zeros_like(dropped[:, :1]), dropped[:, :-1]], dim=-1)
    probabilities = probabilities.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)
    return torch.multinomial(probabilities / probabilities.sum(dim=-1, keepdim=True), 1).view(-1)
