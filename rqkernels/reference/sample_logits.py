"""Drawing a code from logits, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .philox import OP_SAMPLE_LOGITS, inverse_cdf, philox_uniform


def sample_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int,
    offset: int | Tensor = 0,
    stream: int | Tensor = 0,
    streams: int = 1,
) -> Tensor:
    """Temperature, top-k and top-p sampling with one counter-based uniform per row.

    Keep exactly `top_k` codes, the largest (ties: lower index). A code weighs exp((logit - largest) / temperature),
    which is the softmax but for a factor (temperature 0 means argmax, ties to the lower index). From the likeliest
    down, keep a code while the weights before it sum to < `top_p` times all of them. Invert one uniform in code order.
    The uniform of row n is `philox_uniform(offset + n // streams, stream=stream + n % streams)`. Arithmetic is float64,
    and weights of equal logits that are the largest are ones, so that cuts among them are exact.

    Args:
        logits: (..., K), floating point; -inf forbids a code.
        temperature: >= 0, finite.
        top_k: 1 .. K, or None for all (a larger value is K).
        top_p: in (0, 1], or None for 1.
        offset, stream: integers, or int64 tensors of one element.
        streams: divides the number of rows.

    Returns:
        int64 (...).

    Raises:
        ValueError: an argument out of range, or a row with NaN, +inf, or nothing but -inf.
    """
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be >= 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    leading, num_codes = logits.shape[:-1], logits.shape[-1]
    if streams < 1 or leading.numel() % streams:
        raise ValueError(f"streams must be >= 1 and divide the number of rows ({leading.numel()}), got {streams}")
    if not 0 <= int(stream) <= (1 << 32) - streams:
        raise ValueError(f"stream must be in [0, 2^32 - streams], got {int(stream)} with {streams} streams")
    scores = logits.detach().reshape(-1, num_codes).double()
    best = scores.amax(dim=-1, keepdim=True)
    if not bool(torch.isfinite(best).all()):
        raise ValueError("logits: a row has NaN, +inf, or nothing but -inf")
    if temperature == 0 or top_k == 1:
        return scores.eq(best).int().argmax(dim=-1).reshape(leading)
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    weights = torch.exp((ordered - best) / temperature)
    if top_k is not None:
        weights[:, top_k:] = 0
    if top_p is not None and top_p < 1:
        total = weights.sum(dim=-1, keepdim=True)
        before = torch.cat([torch.zeros_like(total), weights.cumsum(dim=-1)[:, :-1]], dim=-1)
        weights = weights.masked_fill(before >= top_p * total, 0)
    rows = torch.arange(scores.shape[0], device=logits.device)
    uniform = philox_uniform(
        rows // streams + int(offset), seed=seed, stream=rows % streams + int(stream), op_id=OP_SAMPLE_LOGITS
    )
    return inverse_cdf(torch.zeros_like(weights).scatter(-1, order, weights), uniform).reshape(leading)
