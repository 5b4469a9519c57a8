"""Sampling with an RQ-Transformer, in plain PyTorch: one step of a stack of blocks, and the codes of one position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .sample_logits import sample_logits

ACTIVATIONS = ("gelu", "quick_gelu")
PRECISIONS = ("fp32", "bf16", "int8")


class BlockWeights(NamedTuple):
    """Weights of one causal pre-norm block of width W, as `torch.nn.LayerNorm` and `torch.nn.Linear` have them."""

    attention_norm_weight: Tensor
    """(W,)"""
    attention_norm_bias: Tensor
    """(W,)"""
    qkv_weight: Tensor
    """(3 W, W): queries, keys, values; each head's channels stand together."""
    qkv_bias: Tensor | None
    """(3 W,)"""
    out_weight: Tensor
    """(W, W)"""
    out_bias: Tensor | None
    """(W,)"""
    mlp_norm_weight: Tensor
    """(W,)"""
    mlp_norm_bias: Tensor
    """(W,)"""
    mlp_in_weight: Tensor
    """(H, W)"""
    mlp_in_bias: Tensor | None
    """(H,)"""
    mlp_out_weight: Tensor
    """(W, H)"""
    mlp_out_bias: Tensor | None
    """(W,)"""


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of a linear layer's weight, one scale per output: `weight ~ q * scale`.

        scale_o = max_i |w_oi| / 127;   q_oi = round(w_oi / scale_o), ties to even; 0 where all weights are 0

    Args:
        weight: (outputs, inputs), float32.

    Returns:
        q int8 (outputs, inputs) in [-127, 127], scale float32 (outputs,).
    """
    scale = weight.abs().amax(dim=1) / 127
    # A row of denormals can have scale 0: its weights count as 0.
    quotient = torch.where(scale > 0, 1.0, 0.0)[:, None] * weight / torch.where(scale > 0, scale, 1.0)[:, None]
    return quotient.round().clamp(-127, 127).to(torch.int8), scale


def rounded_weight(weight: Tensor, precision: str) -> Tensor:
    """The float32 values that a layer multiplies with at this precision."""
    weight = weight.detach().float()
    if precision == "bf16":
        return weight.bfloat16().float()
    if precision == "int8":
        q, scale = quantize_weight(weight)
        return q.float() * scale[:, None]
    return weight


class PackedTransformer:
    """See `rqkernels.PackedTransformer`; here the weights stay as they are, rounded to the precision."""

    def __init__(
        self,
        blocks: Sequence[BlockWeights],
        heads: int,
        *,
        activation: str = "gelu",
        precision: str = "fp32",
        eps: float = 1e-5,
    ) -> None:
        self.heads, self.activation, self.precision, self.eps = heads, activation, precision, eps
        self.blocks = [
            BlockWeights(
                *(
                    tensor if tensor is None or tensor.dim() == 1 else rounded_weight(tensor, precision)
                    for tensor in block
                )
            )
            for block in blocks
        ]


class PackedDepthDecoder:
    """See `rqkernels.PackedDepthDecoder`; here the weights stay as they are, rounded to the precision."""

    def __init__(
        self,
        transformer: PackedTransformer,
        depth_positions: Tensor,
        vectors: Tensor,
        *,
        norm_weight: Tensor,
        norm_bias: Tensor,
        classifier_weight: Tensor,
        classifier_bias: Tensor | None = None,
        cumulative: bool = True,
        eps: float = 1e-5,
    ) -> None:
        self.transformer, self.depth_positions, self.vectors = transformer, depth_positions, vectors
        self.norm_weight, self.norm_bias, self.cumulative, self.eps = norm_weight, norm_bias, cumulative, eps
        self.depth, self.num_codes = depth_positions.shape[0], classifier_weight.shape[-2]
        weights = classifier_weight if classifier_weight.dim() == 3 else [classifier_weight]
        self.classifier_weights = [rounded_weight(weight, transformer.precision) for weight in weights]
        biases = classifier_bias if classifier_weight.dim() == 3 else [classifier_bias]
        self.classifier_biases = [None] * len(weights) if classifier_bias is None else list(biases)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def transformer_step(
    x: Tensor, packed: PackedTransformer, keys: Tensor, values: Tensor, length: int, *, step: Tensor | None = None
) -> Tensor:
    """New positions through a stack of causal pre-norm blocks, with the keys and values of those seen before.

        x <- x + out(attention(norm(x)));   x <- x + mlp_out(activation(mlp_in(norm(x))))

    Args:
        x: (B, W), or (B, n, W) for n new positions; floating point, the dtype of all arithmetic.
        packed: the stack.
        keys, values: (layers, B, heads, capacity, W / heads), the dtype of x; the new positions' are written behind
            the first `length`.
        length: positions seen so far; `step`, one int64 number, adds to it.

    Returns:
        Like x. No norm follows the last block.
    """
    shape = x.shape
    x = x.reshape(shape[0], -1, shape[-1])
    batch, new, width = x.shape
    begin = length + (0 if step is None else int(step))
    end = begin + new
    seen = torch.ones(new, end, dtype=torch.bool, device=x.device).tril(begin)
    for layer, w in enumerate(packed.blocks):
        normed = _norm(x, w.attention_norm_weight, w.attention_norm_bias, packed.eps)
        qkv = _linear(normed, w.qkv_weight, w.qkv_bias).view(batch, new, 3, packed.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        keys[layer, :, :, begin:end], values[layer, :, :, begin:end] = k, v
        scores = q @ keys[layer, :, :, :end].transpose(-1, -2) / (width // packed.heads) ** 0.5
        attention = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
        heads = attention @ values[layer, :, :, :end]
        x = x + _linear(heads.transpose(1, 2).reshape(batch, new, width), w.out_weight, w.out_bias)
        hidden = _linear(_norm(x, w.mlp_norm_weight, w.mlp_norm_bias, packed.eps), w.mlp_in_weight, w.mlp_in_bias)
        hidden = F.gelu(hidden) if packed.activation == "gelu" else hidden * torch.sigmoid(1.702 * hidden)
        x = x + _linear(hidden, w.mlp_out_weight, w.mlp_out_bias)
    return x.reshape(shape)


def _per_depth(value: object, depth: int) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * depth


def _logits_by_depth(context: Tensor, decoder: PackedDepthDecoder, code_of: object, copies: int) -> list[Tensor]:
    """Logits (B, K) of each depth; code_of(logits, d) says with which codes to go on."""
    packed, dtype = decoder.transformer, context.dtype
    head_dim = context.shape[1] // packed.heads
    shape = (len(packed.blocks), context.shape[0], packed.heads, decoder.depth, head_dim)
    keys, values = context.new_empty(shape), context.new_empty(shape)
    given, total, found = context, None, []
    for d in range(decoder.depth):
        state = transformer_step(given + decoder.depth_positions[d].to(dtype), packed, keys, values, d)
        of = d if len(decoder.classifier_weights) > 1 else 0
        normed = _norm(state, decoder.norm_weight, decoder.norm_bias, decoder.eps)
        found.append(_linear(normed, decoder.classifier_weights[of], decoder.classifier_biases[of]))
        codes = code_of(found[-1], d)
        if d + 1 < decoder.depth:
            first = d * decoder.num_codes if decoder.vectors.shape[0] > decoder.num_codes else 0
            vectors = decoder.vectors[first + codes].to(dtype).repeat(copies, 1)
            total = vectors if total is None or not decoder.cumulative else total + vectors
            given = total
    return found


def depth_decode(
    context: Tensor,
    decoder: PackedDepthDecoder,
    *,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int | None] | None = None,
    top_p: float | Sequence[float | None] | None = None,
    guidance: float = 0.0,
    seed: int,
    offset: int = 0,
    stream: int = 0,
    step: Tensor | None = None,
) -> Tensor:
    """The D codes of one position, one after another (Lee et al. 2022, equations 12-14).

        x_0 = context + positions[0];   x_d = sum_{d' < d} vectors[S_d'] + positions[d]
        S_d ~ sample_logits(classifier_d(norm(transformer(x_0 .. x_d)_d)))

    or, not cumulative, x_d = vectors[S_{d-1}] + positions[d].

    Args:
        context: (B, W), floating point, the dtype of all arithmetic up to the logits. With guidance (2 B, W), the
            second half under the null condition: logits = (1 + guidance) * first half - guidance * second half.
        temperature, top_k, top_p: one value or one per depth, as in `sample_logits`.
        seed, offset, stream: depth d draws as `sample_logits(..., seed, offset, stream + d)` does; `step`, one int64
            number, adds step * D to the stream.

    Returns:
        int64 (B, D).
    """
    settings = [_per_depth(value, decoder.depth) for value in (temperature, top_k, top_p)]
    stream += 0 if step is None else int(step) * decoder.depth
    codes: list[Tensor] = []

    def draw(logits: Tensor, d: int) -> Tensor:
        if guidance:
            conditional, null = logits.chunk(2)
            logits = (1 + guidance) * conditional - guidance * null
        options = dict(zip(("temperature", "top_k", "top_p"), (values[d] for values in settings), strict=True))
        codes.append(sample_logits(logits, **options, seed=seed, offset=offset, stream=stream + d))
        return codes[-1]

    _logits_by_depth(context, decoder, draw, 2 if guidance else 1)
    return torch.stack(codes, dim=1)


def depth_logits(context: Tensor, codes: Tensor, decoder: PackedDepthDecoder) -> Tensor:
    """Logits of every depth given all codes before it, computed as `depth_decode` computes them.

    Args:
        context: (B, W), floating point, the dtype of all arithmetic.
        codes: int64 (B, D) in [0, K).

    Returns:
        (B, D, K), like context.
    """
    return torch.stack(_logits_by_depth(context, decoder, lambda _, d: codes[:, d], 1), dim=1)
