"""The machine of a benchmark: its environment, and the least time of counted work on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rqgen.checks import check_choices, check_integer, check_nonnegative
from rqgen.sampling import Cost
from rqkernels import _measure
from rqkernels._measure import Peaks, Rates, Times, interleave, time_call

__all__ = [
    "Peaks",
    "Rates",
    "Times",
    "check_runs",
    "environment",
    "floor_seconds",
    "interleave",
    "peak_bytes",
    "time_call",
]

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
# Keys and values stay float32 where weights are int8, bfloat16 where they are.
STATE_BYTES = {"fp32": 4, "bf16": 2, "int8": 4}


def environment(device: torch.device) -> dict[str, Any]:
    """`_measure.environment` of this package's checkout."""
    return _measure.environment(device, _measure.checkout(Path(__file__).parent))


def check_runs(batch_sizes: Sequence[int], precisions: Sequence[str], seconds: float) -> None:
    """Raise TypeError or ValueError, which names the option, for runs that a benchmark cannot measure."""
    check_choices(batch_sizes, "--batch")
    for batch in batch_sizes:
        check_integer(batch, "--batch", 1)
    check_choices(precisions, "--precision")
    check_nonnegative(seconds, "--seconds")


def floor_seconds(rates: Rates, costs: Iterable[Cost], precision: str) -> float:
    """Least time for parts that follow one another, each with its own limit (weights and states in the precision's
    size)."""
    ns = 0.0
    for cost in costs:
        moved = cost.weights * BYTES[precision] + cost.states * STATE_BYTES[precision]
        ns += rates.floor_ns(moved, cost.products + cost.attention, precision)[0]
    return ns / 1e9


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call needs on a GPU, beyond what stands there before it; None on a CPU, where it is not called."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return _measure.peak_memory(call, device)
