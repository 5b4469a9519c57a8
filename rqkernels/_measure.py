"""Timing, peak memory, device peaks and the environment of a measurement, for every benchmark of both packages.

Needs torch alone, so that the kernels' benchmarks run where the models' dependencies are missing.

Rules: a GPU is timed by events, with its L2 cache flushed before a call where the caller asks for it; a CPU by the wall
clock. A peak is the best of all probes: the most that the device can do, not what it did in a slow minute. The floor of
some work is max(bytes / copy bandwidth, operations / matmul rate) of those peaks.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

# glibc then keeps large blocks in the process, so that no call pays for page faults, and a second OpenMP pool sleeps.
WARM_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
}
PACKAGES = ("rqkernels", "torch", "numpy")
# Bytes of the copy and side of the square product that peaks are measured with: more than a CPU's caches hold, and on a
# GPU enough that a launch does not count.
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}


# --- where a number comes from ----------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the processor; a virtual machine's generic name is completed by family and model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = _cpuinfo()
    name = facts.get("model name", platform.processor() or platform.machine())
    if not re.search(r"\d", name) and {"cpu family", "model"} <= facts.keys():
        name += f", family {facts['cpu family']} model {facts['model']}"
    return name


def device_slug(device: torch.device) -> str:
    """`device_name` as part of a file's name."""
    return slug(device_name(device))


def slug(name: str) -> str:
    """Lower-case letters, digits and single hyphens of a name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpuinfo() -> dict[str, str]:
    """First processor of /proc/cpuinfo; empty on other systems."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
    return facts


def is_warm() -> bool:
    """Whether the process was started with the settings of `WARM_HEAP`."""
    return all(os.environ.get(name) == value for name, value in WARM_HEAP.items())


class Checkout(NamedTuple):
    """State of the git checkout that a file lies in; both None outside one."""

    commit: str | None
    dirty: bool | None


def checkout(folder: Path, *, ignored: Sequence[str] = ()) -> Checkout:
    """Commit of the checkout at ``folder``, and whether tracked files differ from it; paths in ``ignored`` (relative to
    the folder) do not count."""
    status = _git(
        folder, "status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in ignored)
    )
    return Checkout(_git(folder, "rev-parse", "HEAD"), None if status is None else bool(status))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def environment(device: torch.device, state: Checkout, packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Everything a reader needs to repeat a measurement, as JSON holds it."""
    import rqkernels

    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": versions(packages),
        "rqkernels": rqkernels.info(paths=False),
        "commit": state.commit,
        "dirty": state.dirty,
        "warm_heap": is_warm(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# --- the least time ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Copy bandwidth, bytes read and written per second, and operations (multiplications and additions) per second of a
    matrix product, by precision: "fp32", "bf16", "int8"."""

    copy_bytes_per_s: float
    operations_per_s: Mapping[str, float]

    def floor_ns(self, moved: float, operations: float, precision: str) -> tuple[float, str]:
        """Least time in nanoseconds for that many bytes and operations, and the unit that limits it."""
        ns = {
            "memory bandwidth": 1e9 * moved / self.copy_bytes_per_s,
            "matrix unit": 1e9 * operations / self.operations_per_s[precision],
        }
        limit = max(ns, key=lambda unit: ns[unit])
        return ns[limit], limit

    def described(self) -> dict[str, Any]:
        return {"copy_bytes_per_s": self.copy_bytes_per_s, "operations_per_s": dict(self.operations_per_s)}


class Peaks:
    """Best rates of a device over all probes so far.

    Args:
        device: where.
        precisions: of the products; by default all that the device has ("int8" on a CPU alone). A precision may compute
            in a wider one, so it never counts for less than the wider.
    """

    def __init__(self, device: torch.device, precisions: Sequence[str] = ("fp32", "bf16", "int8")) -> None:
        self.device, self._side = device, PRODUCT_SIDE[device.type]
        copied = COPIED_BYTES[device.type]
        if device.type == "cuda":
            copied = min(copied, torch.cuda.mem_get_info(device)[0] // 4)
        self._source = torch.ones(copied // 4, device=device)
        self._target = torch.empty_like(self._source)
        self._products = self._make_products(precisions)
        self._copy, self._rates = 0.0, dict.fromkeys(self._products, 0.0)
        for _ in range(3):
            self.probe()

    def _make_products(self, precisions: Sequence[str]) -> dict[str, Callable[[], object]]:
        square = torch.randn(self._side, self._side, device=self.device)
        half, byte = square.bfloat16(), square.mul(30).clamp(-127, 127).to(torch.int8)
        products: dict[str, Callable[[], object]] = {"fp32": lambda: square @ square, "bf16": lambda: half @ half}
        if self.device.type == "cpu":  # cuBLAS has int8 for some layouts alone
            products["int8"] = lambda: torch._int_mm(byte, byte)
        return {name: product for name, product in products.items() if name in precisions}

    def probe(self) -> None:
        """Measures each rate once more and keeps the best."""
        copy_ns = time_call(lambda: self._target.copy_(self._source), self.device)[0]
        self._copy = max(self._copy, 2e9 * self._source.nbytes / copy_ns)
        for name, product in self._products.items():
            ns = time_call(product, self.device)[0]
            self._rates[name] = max(self._rates[name], 2e9 * self._side**3 / ns)

    @property
    def rates(self) -> Rates:
        widest, rates = 0.0, {}
        for name, rate in self._rates.items():
            rates[name] = widest = max(widest, rate)
        return Rates(self._copy, rates)


# --- one call ---------------------------------------------------------------------------------------------


@functools.cache
def _l2_flush(device: torch.device) -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device=device)  # several times any L2 there is


def time_call(call: Callable[[], object], device: torch.device, *, flush_l2: bool = False) -> tuple[int, object]:
    """Nanoseconds of one call, until the device has done what it asked for, and its result."""
    if device.type != "cuda":
        start = time.perf_counter_ns()
        result = call()
        return time.perf_counter_ns() - start, result
    if flush_l2:
        _l2_flush(device).zero_()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    result = call()
    end_event.record()
    torch.cuda.synchronize(device)
    return round(start_event.elapsed_time(end_event) * 1e6), result


class Times(NamedTuple):
    """Nanoseconds of the calls of one contender."""

    samples: list[int]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def least(self) -> int:
        return min(self.samples)

    @property
    def most(self) -> int:
        return max(self.samples)


def interleave(
    calls: Sequence[Callable[[], object]], device: torch.device, seconds: float, *, warm_up: bool = True
) -> list[Times]:
    """Times calls in turns, so that a slow minute of the machine hits all of them alike.

    After one round to warm up, another tells how many there is time for: each call may spend the same part of
    ``seconds``, in at most 20 rounds and at least two, or in one where that already takes longer than all of it. Calls
    with fewer rounds than others have theirs spread evenly among them.
    """
    if warm_up:
        for call in calls:
            call()
    samples = [[time_call(call, device)[0]] for call in calls]
    budget = 1e9 * seconds
    rounds = [max(1 if once > budget else 2, min(20, int(budget / len(calls) / max(once, 1)))) for (once,) in samples]
    most = max(rounds, default=0)
    for past in range(1, most):
        for times, call, count in zip(samples, calls, rounds, strict=True):
            if past * count // most > (past - 1) * count // most:
                times.append(time_call(call, device)[0])
    return [Times(times) for times in samples]


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call needs beyond what stood before it, its result included; None where nobody tells.

    On a GPU torch's allocator knows. On Linux the high-water mark of the process is reset and read, which sees every
    allocation that was touched, whoever made it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # free blocks of earlier calls go back first
        Path("/proc/self/clear_refs").write_text("5")
        before = _proc_status("VmRSS")
        result = call()
        peak = _proc_status("VmHWM")
        del result
    except (OSError, AttributeError):
        return None
    return max(0, peak - before)


def _proc_status(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{key} not in /proc/self/status")
    return int(match.group(1)) * 1024
