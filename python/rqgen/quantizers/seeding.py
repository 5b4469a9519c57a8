"""First codebooks and replacement codes, sampled from data.

All randomness comes from torch's global generator of the vectors' device: seeding and saving that generator,
as every training loop does anyway, makes a run repeatable and a resumed run continue bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

import rqkernels

# Lloyd's algorithm gains little from more samples than this per cluster.
KMEANS_VECTORS_PER_CODE = 256
# Copies of one vector would tie for ever: the higher index would never be chosen.
DUPLICATE_NOISE = 0.01


def sample_vectors(vectors_nc: Tensor, count: int) -> Tensor:
    """`count` rows of float32 (N, C), sampled without replacement as far as N reaches.

    Beyond N the rows repeat, and all get uniform noise of 1 % of each feature's standard deviation, so that
    no two are equal.

    Raises:
        ValueError: there is no vector to sample from.
    """
    available = vectors_nc.shape[0]
    if available == 0:
        raise ValueError("vectors_nc: expected at least one finite vector to sample codes from, got none")
    rounds = -(-count // available)
    rows = torch.cat([torch.randperm(available, device=vectors_nc.device) for _ in range(rounds)])[:count]
    sampled = vectors_nc[rows]
    if rounds > 1:
        spread = vectors_nc.std(dim=0, correction=0).clamp(min=torch.finfo(torch.float32).tiny)
        sampled = sampled + (torch.rand_like(sampled) - 0.5) * (2 * DUPLICATE_NOISE * spread)
    return sampled


def kmeans(vectors_nc: Tensor, num_codes: int, iterations: int) -> Tensor:
    """Lloyd's algorithm from `num_codes` sampled vectors: float32 (num_codes, C) centers.

    Assignment is `rqkernels.residual_search` of depth 1 and the means come from `rqkernels.code_statistics`,
    so nothing of N x K is allocated. A center that loses all its vectors is sampled again.
    """
    sample = vectors_nc
    limit = KMEANS_VECTORS_PER_CODE * num_codes
    if vectors_nc.shape[0] > limit:
        sample = sample_vectors(vectors_nc, limit)
    centers = sample_vectors(sample, num_codes)
    for _ in range(iterations):
        codes_n = rqkernels.residual_search(sample, centers, 1).codes.squeeze(-1)
        counts, sums = rqkernels.code_statistics(sample, codes_n, num_codes)
        empty = counts == 0
        centers = sums / counts.clamp(min=1).unsqueeze(1)
        num_empty = int(empty.sum())
        if num_empty:
            centers[empty] = sample_vectors(sample, num_empty)
    return centers
