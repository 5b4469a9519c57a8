"""Sampling of codes from logits, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import (
    REFERENCE_DTYPES,
    check_counter,
    check_device,
    check_elements,
    check_temperature,
    check_tensor,
    check_top_k,
    check_top_p,
    differ,
    is_below,
    shape_of,
)
from .philox import OP_SAMPLE_LOGITS, inverse_cdf, philox_uniform

_OP = "sample_logits"


def check_place(op: str, name: str, value: object, bits: int) -> int | Tensor:
    """Check an offset or a stream: an integer, or an int64 tensor on the device of the logits."""
    if isinstance(value, Tensor):
        check_tensor(op, name, value, (torch.int64,))
        return value
    return check_counter(op, name, value, bits)


def check_shapes(op: str, logits: Tensor, offset: int | Tensor, stream: int | Tensor, streams: int) -> None:
    """Check shapes and devices with the messages of op.cpp."""
    if logits.dim() < 1:
        raise ValueError(f"{op}: logits must be (..., K), got a scalar")
    if is_below(logits.shape[-1], 1):
        raise ValueError(f"{op}: logits must have at least one code, got {shape_of(logits)}")
    check_elements(op, "logits", logits)
    rows = logits.shape[:-1].numel()
    if streams < 1 or (isinstance(rows, int) and differ(rows % streams, 0)):
        raise ValueError(f"{op}: streams must be >= 1 and divide the number of rows ({rows}), got {streams}")
    for name, value in (("offset", offset), ("stream", stream)):
        if isinstance(value, Tensor):
            if differ(value.numel(), 1):
                raise ValueError(f"{op}: {name} must be one number, got a tensor {shape_of(value)}")
            check_device(op, "logits", logits, name, value)


def check_counters(op: str, offset: int, stream: int, rows: int, streams: int) -> None:
    if not 0 <= offset <= (1 << 63) - 1 - rows // streams:
        raise ValueError(f"{op}: offset must be >= 0, and offset + rows below 2^63; got {offset} with {rows} rows")
    if not 0 <= stream < 1 << 32:
        raise ValueError(f"{op}: stream must be in [0, 2^32), got {stream}")
    if stream > (1 << 32) - streams:
        raise ValueError(f"{op}: stream + streams must be <= 2^32, got {stream} + {streams}")


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
    """Sample with temperature, top-k and top-p, and one counter-based uniform per row.

    Keep exactly `top_k` codes, the largest (ties: lower index). The weight of a code is exp((logit - largest) /
    temperature), the softmax up to a factor (temperature 0 means argmax, ties to the lower index). From the likeliest
    down, keep a code while the weights before it sum to < `top_p` times all of them. Invert one uniform in code order.
    The uniform of row n is `philox_uniform(offset + n // streams, stream=stream + n % streams)`. Arithmetic is float64.
    The largest logits have weight 1, so that cuts among equal ones are exact.

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
        TypeError: an argument of another type.
        ValueError: an argument out of range, or a row with NaN, +inf, or only -inf.
    """
    check_tensor(_OP, "logits", logits, REFERENCE_DTYPES)
    temperature, top_k, top_p = check_temperature(_OP, temperature), check_top_k(_OP, top_k), check_top_p(_OP, top_p)
    seed = check_counter(_OP, "seed", seed, 64)
    offset, stream = check_place(_OP, "offset", offset, 63), check_place(_OP, "stream", stream, 32)
    streams = check_counter(_OP, "streams", streams, 32)
    check_shapes(_OP, logits, offset, stream, streams)
    leading, num_codes = logits.shape[:-1], logits.shape[-1]
    check_counters(_OP, int(offset), int(stream), leading.numel(), streams)
    scores = logits.detach().reshape(-1, num_codes).double()
    best = scores.amax(dim=-1, keepdim=True)
    bad = (~torch.isfinite(best[:, 0])).nonzero()
    if len(bad) > 0:
        raise ValueError(f"{_OP}: logits: row {int(bad[0])} has NaN, +inf, or nothing but -inf")
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
