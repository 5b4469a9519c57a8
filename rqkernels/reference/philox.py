"""Counter-based uniforms: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

A uniform is a pure function of (seed, row, stream, op): it cannot depend on the batch size, the position in the batch,
the number of threads or the replay of a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_counter, check_tensor

# The fourth counter word: the operation that samples. Two operations never share a uniform.
OP_STOCHASTIC_RESIDUAL_SEARCH = 1
OP_SAMPLE_LOGITS = 2

_MASK32 = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox_uniform(rows: Tensor, *, seed: int, stream: int | Tensor, op_id: int) -> Tensor:
    """Generate one uniform in (0, 1) per row: `u = (word0 + 0.5) * 2^-32`.

    key = seed (64 bit), counter = (row low, row high, stream, op_id).

    Args:
        rows: int64 (...), the row counters (offset already added), each >= 0.
        seed: 0 <= seed < 2^64.
        stream: 0 <= stream < 2^32; a depth or a token index. Also an int64 tensor that broadcasts with rows (its values
            are not checked).
        op_id: 0 <= op_id < 2^32; see `OP_STOCHASTIC_RESIDUAL_SEARCH`, `OP_SAMPLE_LOGITS`.

    Returns:
        float64 (...), on the device of `rows`. float64 because `word0 + 0.5` has 33 significant bits.

    Raises:
        TypeError: rows is not int64.
        ValueError: seed, stream or op_id out of range.
    """
    op = "philox_uniform"
    check_tensor(op, "rows", rows, (torch.int64,))
    seed, op_id = check_counter(op, "seed", seed, 64), check_counter(op, "op_id", op_id, 32)
    if isinstance(stream, Tensor):
        check_tensor(op, "stream", stream, (torch.int64,))
    else:
        stream = check_counter(op, "stream", stream, 32)
    # int64 holds an unsigned 32-bit word; products wrap modulo 2^64, which keeps the needed bits.
    word0, word1 = rows & _MASK32, (rows >> 32) & _MASK32
    word2, word3 = torch.as_tensor(stream, device=rows.device), torch.full_like(rows, op_id)
    key0, key1 = seed & _MASK32, seed >> 32
    for _ in range(_ROUNDS):
        product0, product1 = word0 * _MULTIPLIER_0, word2 * _MULTIPLIER_1
        high0, low0 = (product0 >> 32) & _MASK32, product0 & _MASK32
        high1, low1 = (product1 >> 32) & _MASK32, product1 & _MASK32
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = (key0 + _WEYL_0) & _MASK32, (key1 + _WEYL_1) & _MASK32
    return (word0.to(torch.float64) + 0.5) * 2.0**-32


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the first code, in code order, whose cumulative mass exceeds `uniform` times the total mass.

    Args:
        probabilities: float64 (n, K), non-negative, each row with a positive sum, not necessarily one.
        uniform: float64 (n,), in (0, 1).

    Returns:
        int64 (n,). A code without mass is never returned.
    """
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    codes = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # Rounding may push the target up to the total: then the last code with mass is chosen.
    last_with_mass = (cumulative < cumulative[:, -1:]).sum(dim=-1)
    return torch.minimum(codes, last_with_mass)
