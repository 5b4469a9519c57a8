"""Machine of a benchmark: its environment, and the lower bound on the time of counted work."""

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
# Keys and values are float32 with int8 weights, bfloat16 with bfloat16 weights.
STATE_BYTES = {"fp32": 4, "bf16": 2, "int8": 4}


def environment(device: torch.device) -> dict[str, Any]:
    """Return `_measure.environment` of this package's checkout."""
    return _measure.environment(device, _measure.checkout(Path(__file__).parent))


def check_runs(batch_sizes: Sequence[int], precisions: Sequence[str], seconds: float) -> None:
    """Raise TypeError or ValueError, which names the option, for runs that a benchmark cannot measure."""
    check_choices(batch_sizes, "--batch")
    for batch in batch_sizes:
        check_integer(batch, "--batch", 1)
    check_choices(precisions, "--precision")
    check_nonnegative(seconds, "--seconds")


def floor_seconds(rates: Rates, costs: Iterable[Cost], precision: str) -> float:
    """Return the lower bound in seconds on the time of parts that run one after another, each with its own bound;
    weights and states have the size of the precision."""
    ns = 0.0
    for cost in costs:
        moved = cost.weights * BYTES[precision] + cost.states * STATE_BYTES[precision]
        ns += rates.floor_ns(moved, cost.products + cost.attention, precision)[0]
    return ns / 1e9


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes that one call allocates on a GPU at its peak; None on a CPU, where it is not called."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return _measure.peak_memory(call, device)
