"""Cost of sampling code maps, counted from a prior's config: the work that no implementation can avoid."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from rqgen.models import RQTransformerConfig, VARConfig


class Cost(NamedTuple):
    """Work of one stack or scale (with what stands around it) while a batch of code maps is sampled."""

    weights: int
    """Weights read, each once per step for the whole batch. A step is a position, a code of one, or a scale."""
    states: int
    """Keys and values written, and read again at every later step, of all images."""
    products: int
    """Multiplications and additions of states with weights."""
    attention: int
    """Multiplications and additions of queries with keys and of attention weights with values."""


class SamplingCost(NamedTuple):
    """`Cost` of the two stacks. They take turns, position by position, so their times add up."""

    spatial: Cost
    """The stack over positions, with the projection of the code vectors."""
    depth: Cost
    """The stack over the codes of a position, with the projection of the code vectors and the classifier."""


@functools.singledispatch
def sampling_cost(config: Any, batch: int) -> Any:
    """Return the work of sampling `batch` images' codes with caches, in parts that follow one another: of an
    RQ-Transformer its two stacks (`SamplingCost`), of a VAR its scales (a list of `Cost`). With guidance every image is
    two rows: give twice as many.

    RQ-Transformer, position by position and code by code. With width W, N_s and N_d layers, T positions, D codes at
    each of them, L condition tokens and B = `batch`, the leading terms are

        weights      12 W^2 (N_s T + N_d T D) + K W T D           attention    2 W B (N_s (L + T)^2 + N_d T D^2)

    which is the paper's O(N_s T^2 + N_d T D^2) in the term that grows with the length (section 3.2.2), against
    O(N T^2 D^2) of N layers over all T D codes one after another: the prior of code shape (h, w * D, 1). Keys and
    values of the depth stack stay in registers or cache and count as no traffic.

    VAR, scale by scale. With N layers, S scales of l_k tokens each and e_k = l_1 + .. + l_k,

        weights      (12 N W^2 + K W) S + 6 N W^2                 attention    4 W B N sum_k l_k e_k

    and products 2 B e_S (12 N W^2 + K W): every token passes through all layers, as in an RQ-Transformer of one stack,
    but the weights are read S times in all and not once per token. The 6 N W^2 are the adaptive norms', which see one
    row per image and count to the first scale.

    Biases, norms, position embeddings, condition and code look-ups are not counted, nor the computation of a VAR's next
    input from a token map (3x3 convolutions of C channels).
    """
    raise TypeError(f"config: expected an RQTransformerConfig or a VARConfig, got {type(config).__name__}")


@sampling_cost.register
def _stacks_cost(config: RQTransformerConfig, batch: int) -> SamplingCost:
    width = config.embed_dim
    height, columns, depth = config.code_shape
    positions = height * columns
    # The last position of a code map is not an input; the condition's tokens go through together, in one step.
    tokens = config.condition_length + positions - 1
    seen = tokens * (tokens + 1) // 2
    layer = 12 * width * width
    spatial_weights = config.spatial.layers * layer
    depth_weights = config.depth.layers * layer
    classifier = config.codebook_size * width
    spatial_projection = config.code_dim * width if config.spatial_embedding == "codebook" else 0
    depth_projection = config.code_dim * width if config.depth_embedding == "codebook" else 0
    return SamplingCost(
        spatial=Cost(
            weights=positions * spatial_weights + (positions - 1) * spatial_projection,
            states=batch * config.spatial.layers * 2 * width * (seen + tokens),
            products=2 * batch * (tokens * spatial_weights + (positions - 1) * spatial_projection),
            attention=4 * batch * config.spatial.layers * width * seen,
        ),
        depth=Cost(
            weights=positions * (depth * (depth_weights + classifier) + (depth - 1) * depth_projection),
            states=0,
            products=2 * batch * positions * (depth * (depth_weights + classifier) + (depth - 1) * depth_projection),
            attention=2 * batch * config.depth.layers * positions * width * depth * (depth + 1),
        ),
    )


@sampling_cost.register
def _scales_cost(config: VARConfig, batch: int) -> list[Cost]:
    width, layers = config.embed_dim, config.layers
    per_token = layers * (4 * width * width + 2 * width * round(config.mlp_ratio * width))
    per_token += config.quantizer.codebook_size * width
    modulation = (6 * (1 if config.shared_adaptive_norm else layers) + 2) * width * width
    costs, seen = [], 0
    for k, tokens in enumerate(config.quantizer.tokens):
        seen += tokens
        # The first scale sees the class, through the adaptive norms too; the others what was sampled.
        embedding = config.code_dim * width if k else 0
        once = 0 if k else modulation
        costs.append(
            Cost(
                weights=per_token + embedding + once,
                states=batch * layers * 2 * width * (seen + tokens),
                products=2 * batch * (tokens * (per_token + embedding) + once),
                attention=4 * batch * layers * width * tokens * seen,
            )
        )
    return costs
