"""What drawing code maps costs, counted from a prior's config: the work that no implementation can avoid."""

from __future__ import annotations

from typing import NamedTuple

from rqgen.models import RQTransformerConfig


class Cost(NamedTuple):
    """Work of one stack (with what stands around it) while a batch of code maps is drawn."""

    weights: int
    """Weights read, each once per step for the whole batch."""
    states: int
    """Keys and values written, and read again at every later position, of all images."""
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


def sampling_cost(config: RQTransformerConfig, batch: int) -> SamplingCost:
    """Work of drawing `batch` code maps, position by position and code by code, with caches.

    With width W, N_s and N_d layers, T positions, D codes at each of them, L condition tokens and B = `batch`,
    the leading terms are

        weights      12 W^2 (N_s T + N_d T D) + K W T D           attention    2 W B (N_s (L + T)^2 + N_d T D^2)

    which is the paper's O(N_s T^2 + N_d T D^2) in the term that grows with the length (section 3.2.2), against
    O(N T^2 D^2) of N layers over all T D codes one after another: the prior of code shape (h, w * D, 1). Biases,
    norms, position embeddings, condition and code look-ups are left out; keys and values of the depth stack stay in
    registers or cache and count as no traffic.
    """
    width = config.embed_dim
    height, columns, depth = config.code_shape
    positions = height * columns
    # The last code map position is nobody's input; the condition's tokens go through together, in one step.
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
