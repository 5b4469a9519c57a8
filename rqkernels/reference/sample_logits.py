"""Drawing a code from logits, in plain PyTorch."""

from __future__ import annotations

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
    offset: int = 0,
    stream: int = 0,
) -> Tensor:
    """Temperature, top-k and top-p sampling with one counter-based uniform per row.

    Divide by the temperature (0 means argmax, ties to the lower index); keep exactly `top_k` codes, the
    largest (ties: lower index); softmax of those; from the likeliest down, keep a code while the mass before
    it is < `top_p`; renormalise; invert one uniform in code order. The uniform of a row is
    `philox_uniform(offset + flattened index, stream=stream)`. Arithmetic is float64.

    Args:
        logits: (..., K), floating point; -inf forbids a code.
        temperature: >= 0.
        top_k: 1 .. K, or None for all (a larger value is K).
        top_p: in (0, 1], or None for 1.

    Returns:
        int64 (...).

    Raises:
        ValueError: an argument out of range, or a row with NaN, +inf, or nothing but -inf.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    leading, num_codes = logits.shape[:-1], logits.shape[-1]
    scores = logits.detach().reshape(-1, num_codes).double()
    best = scores.amax(dim=-1) if scores.numel() else scores.new_zeros(scores.shape[0])
    if not bool(torch.isfinite(best).all()):
        raise ValueError("logits: a row has NaN, +inf, or nothing but -inf")
    if temperature == 0 or top_k == 1:
        return scores.eq(best[:, None]).int().argmax(dim=-1).reshape(leading)
    scores = scores / temperature
    if top_k is not None or top_p is not None:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(ordered, dtype=torch.bool)
        if top_k is not None:
            keep[:, top_k:] = False
        if top_p is not None:
            mass = torch.softmax(ordered.masked_fill(~keep, -torch.inf), dim=-1)
            keep &= (mass.cumsum(dim=-1) - mass) < top_p
        scores = scores.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -torch.inf)
    rows = torch.arange(scores.shape[0], device=logits.device) + offset
    uniform = philox_uniform(rows, seed=seed, stream=stream, op_id=OP_SAMPLE_LOGITS)
    return inverse_cdf(torch.softmax(scores, dim=-1), uniform).reshape(leading)
