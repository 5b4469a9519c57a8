"""This machine, as a benchmark sees it."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rqkernels
from rqgen.sampling import Cost

from ..check import installed_versions

COPIED = 1 << 26  # numbers of the copy: more than a CPU's caches hold; on a GPU 16 times that, or its start would count
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
# Keys and values stay float32 where weights are int8, bfloat16 where they are.
STATE_BYTES = {"fp32": 4, "bf16": 2, "int8": 4}


@dataclass
class Peaks:
    """What this device reaches at its easiest, measured here: the best of several tries.

    Attributes:
        copy_bytes_per_s: bytes read and written by a large copy.
        operations_per_s: multiplications and additions of a square product, by precision: float32, bfloat16, and on a
            CPU int8 into int32. A precision may compute in a wider one, so it never counts for less than the wider.
    """

    copy_bytes_per_s: float
    operations_per_s: dict[str, float]

    def floor_seconds(self, costs: Iterable[Cost], precision: str) -> float:
        """The least time for parts that follow one another, each with its own limit: the greater of its bytes over the
        copy's rate and its operations over the product's (weights and states in the precision's size)."""
        total = 0.0
        for cost in costs:
            moved = cost.weights * BYTES[precision] + cost.states * STATE_BYTES[precision]
            operations = cost.products + cost.attention
            total += max(moved / self.copy_bytes_per_s, operations / self.operations_per_s[precision])
        return total


def measure_peaks(device: torch.device) -> Peaks:
    cuda = device.type == "cuda"
    side = 8192 if cuda else 1024
    copied = min(16 * COPIED, torch.cuda.mem_get_info(device)[0] // 16) if cuda else COPIED
    source = torch.ones(copied, device=device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, device=device)
    half = square.bfloat16()
    products: dict[str, Callable[[], object]] = {"fp32": lambda: square @ square, "bf16": lambda: half @ half}
    if not cuda:  # where nothing is sampled in int8, and cuBLAS has it for some layouts alone
        byte = square.mul(30).clamp(-127, 127).to(torch.int8)
        products["int8"] = lambda: torch._int_mm(byte, byte)
    copy = best_seconds(lambda: target.copy_(source), device)
    rates, widest = {}, 0.0
    for precision, product in products.items():
        widest = max(widest, 2 * side**3 / best_seconds(product, device))
        rates[precision] = widest
    return Peaks(2 * source.nbytes / copy, rates)


def best_seconds(call: Callable[[], object], device: torch.device, tries: int = 5) -> float:
    return min(seconds(call, device) for _ in range(tries + 1))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device has done what it asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def interleaved_seconds(
    calls: Sequence[Callable[[], object]], device: torch.device, budget: float, *, warm_up: bool = True
) -> list[dict[str, Any]]:
    """Each call's median, fastest and slowest time and its number of rounds, taken in turns.

    After one round to warm up, another tells how many there is time for: each call may spend the same part of `budget`
    seconds, in at most 20 rounds and at least two, or in one where that already takes longer than the whole budget.
    Calls with fewer rounds than others have theirs spread evenly among them.
    """
    if warm_up:
        for call in calls:
            call()
    samples = [[seconds(call, device)] for call in calls]
    rounds = [
        max(1 if once > budget else 2, min(20, int(budget / len(calls) / max(once, 1e-9)))) for (once,) in samples
    ]
    most = max(rounds, default=0)
    for past in range(1, most):
        for times, call, count in zip(samples, calls, rounds, strict=True):
            if past * count // most > (past - 1) * count // most:
                times.append(seconds(call, device))
    return [
        {"median": statistics.median(times), "min": min(times), "max": max(times), "rounds": len(times)}
        for times in samples
    ]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """What one call needs on a GPU, beyond what stands there before it; None on a CPU, where it is not called."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds(call, device)
    return torch.cuda.max_memory_allocated(device) - before


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Where a number comes from: without it, the number says nothing."""
    return {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": installed_versions(),
        "rqkernels": rqkernels.info(paths=False),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": _git("status", "--porcelain", "--untracked-files=no") not in (None, ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git says of the checkout this file lies in; None for an installed package."""
    folder = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
