"""Sampling of codes from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import FLOAT_DTYPES, check_counter, check_temperature, check_top_k, check_top_p, signed_seed
from .._library import call, check_tensor
from ..reference.sample_logits import check_counters, check_place, check_shapes

_OP = "sample_logits"


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
    """Sample one code per row of logits: temperature, top-k, top-p, and one counter-based uniform per row.

        w_k = exp((logit_k - max logit) / temperature)
        top-k: keep the `top_k` codes with the largest logits, the lower index first among equal ones
        top-p: from the largest down, keep a code while the weights before it sum to < top_p times all of them
        the code: the first, in code order, at which the cumulative weight of the kept codes exceeds u times their total

    which samples from the softmax of `logits / temperature` over the kept codes. Temperature 0 takes the largest logit,
    the lowest index among equal ones. Top-p is nucleus sampling (Holtzman et al., "The curious case of neural text
    degeneration", ICLR 2020); top-k comes before it, as in the sampler of the published RQ-Transformer. Naively:
    `sort`, `softmax`, `cumsum`, two masks, `multinomial`. Here nothing is sorted and no array of rows x codes is
    formed: both cuts are thresholds, found by counting, and a thread (on CUDA a block) handles one row.

    u is Philox4x32-10 with key `seed` and counter (offset + flattened index of the row, stream, 2), as in
    `rqkernels.reference.philox_uniform`: a sample is a function of (seed, row, stream) and the row's values alone, the
    same for every batch size, position in the batch and thread count.

    Codes are those of the float64 arithmetic of `rqkernels.reference.sample_logits` on every device and instruction set
    (a CPU computes weights in float32 with an error bound, and in float64 for rows that the bound leaves undecided).
    They may differ if u or top_p lies within rounding of a boundary between two codes: a relative 1e-12 on a CPU, and
    K 2^-(62 - log2 K) on CUDA, where weights are integers (1e-10 at K = 16384).

    Not differentiable: logits are detached. Autocast does not affect it.

    Args:
        logits: (..., K), float32, float16 or bfloat16, any strides, on cpu or cuda; taken as float32. -inf forbids a
            code.
        temperature: >= 0, finite.
        top_k: >= 1; None, or K and more: all.
        top_p: in (0, 1]; None: 1, all.
        seed: 0 <= seed < 2^64.
        offset: index of the first row, >= 0: with it a part of a batch samples the same codes as within the batch.
        stream: 0 <= stream < 2^32; a depth, or a token's index. `offset` and `stream` may also be an int64 tensor of
            one element on the device of the logits, which is read when the kernel runs: every replay of a captured CUDA
            graph can then sample differently.
        streams: number of adjacent rows, the innermost, that differ in their stream and not in their index: row n has
            the counter (offset + n // streams, stream + n % streams). A call for (B, L, K) with streams = L samples the
            codes of L calls for (B, K), one per stream. Must divide the number of rows.

    Returns:
        int64 (...). On CUDA -1 for a row with NaN, +inf, or only -inf; on a CPU such a row is an error.

    Raises:
        TypeError: logits of another dtype (float64 among them) or not a tensor, temperature or top_p not a number,
            top_k, seed, offset, stream or streams not an integer (or, offset and stream, not an int64 tensor).
        ValueError: no codes; temperature, top_k, top_p, seed, offset, stream or streams out of range (the value of a
            CUDA tensor is not checked); a tensor of more than one element or on another device; on a CPU a row with
            NaN, +inf, or only -inf.
    """
    check_tensor(_OP, "logits", logits, FLOAT_DTYPES)
    temperature, top_k, top_p = check_temperature(_OP, temperature), check_top_k(_OP, top_k), check_top_p(_OP, top_p)
    seed = check_counter(_OP, "seed", seed, 64)
    offset, stream = check_place(_OP, "offset", offset, 63), check_place(_OP, "stream", stream, 32)
    streams = check_counter(_OP, "streams", streams, 32)
    offset_tensor = stream_tensor = None
    if isinstance(offset, Tensor):
        offset, offset_tensor = 0, offset
    if isinstance(stream, Tensor):
        stream, stream_tensor = 0, stream
    if logits.requires_grad:
        logits = logits.detach()
    return call(
        _OP,
        torch.ops.rqkernels.sample_logits,
        logits,
        temperature,
        top_k,
        top_p,
        signed_seed(seed),
        offset,
        stream,
        offset_tensor,
        stream_tensor,
        streams,
    )


@torch.library.register_fake("rqkernels::sample_logits")
def _fake(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    offset: int,
    stream: int,
    offset_tensor: Tensor | None = None,
    stream_tensor: Tensor | None = None,
    streams: int = 1,
) -> Tensor:
    check_shapes(
        _OP,
        logits,
        offset if offset_tensor is None else offset_tensor,
        stream if stream_tensor is None else stream_tensor,
        streams,
    )
    rows = logits.shape[:-1].numel()
    if all(isinstance(value, int) for value in (rows, offset, stream, streams)):
        check_counters(_OP, offset, stream, rows, streams)
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)
