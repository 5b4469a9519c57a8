"""Timing, peak memory, device peaks and the environment of a measurement, for every benchmark of both packages.

Needs torch alone, so that the kernels' benchmarks run without the models' dependencies.

Rules: a GPU is timed by events, with its L2 cache flushed before a call if the caller asks for it; a CPU by the wall
clock. A peak is the best of all probes: what the device is capable of, not what it did in a slow minute. The floor of
some work is max(bytes / copy bandwidth, operations / matmul rate) at those peaks.
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

# With these, glibc keeps large blocks in the process, so that no call takes page faults, and idle OpenMP threads sleep.
WARM_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
}
PACKAGES = ("rqkernels", "torch", "numpy")
# Bytes of the copy and side of the square matrix product that measure the peaks: larger than a CPU's caches, and on a
# GPU large enough that launch overhead does not count.
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}


# --- where a number comes from ----------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of the processor; family and model complete a virtual machine's generic name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = _cpuinfo()
    name = facts.get("model name", platform.processor() or platform.machine())
    if not re.search(r"\d", name) and {"cpu family", "model"} <= facts.keys():
        name += f", family {facts['cpu family']} model {facts['model']}"
    return name


def device_slug(device: torch.device) -> str:
    """Return `device_name` in a form for file names."""
    return slug(device_name(device))


def slug(name: str) -> str:
    """Reduce a name to lower-case letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpuinfo() -> dict[str, str]:
    """Return the entry of the first processor in /proc/cpuinfo; empty on other systems."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
    return facts


def is_warm() -> bool:
    """True if the process was started with the settings of `WARM_HEAP`."""
    return all(os.environ.get(name) == value for name, value in WARM_HEAP.items())


class Checkout(NamedTuple):
    """State of a git checkout; both fields are None outside of one."""

    commit: str | None
    dirty: bool | None


def checkout(folder: Path, *, ignored: Sequence[str] = ()) -> Checkout:
    """Return the commit of the checkout at ``folder`` and if tracked files differ from it.

    Paths in ``ignored``, relative to the folder, do not count.
    """
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
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def environment(device: torch.device, state: Checkout, packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Return everything a reader needs to repeat a measurement, as JSON values."""
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


# --- peaks and floors ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Copy bandwidth (bytes read and written per second) and operations per second of a matrix product.

    Operations are multiplications and additions, by precision: "fp32", "bf16", "int8".
    """

    copy_bytes_per_s: float
    operations_per_s: Mapping[str, float]

    def floor_ns(self, moved: float, operations: float, precision: str) -> tuple[float, str]:
        """Return the least time in nanoseconds for this many bytes and operations, and the unit that limits it."""
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
        device: the device to measure.
        precisions: of the matrix products; by default all that the device supports ("int8" on a CPU only). Work in a
            precision can be done in a wider one, so its rate is never taken as less than the wider one's.
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
        if self.device.type == "cpu":  # cuBLAS supports int8 for some layouts only
            products["int8"] = lambda: torch._int_mm(byte, byte)
        return {name: product for name, product in products.items() if name in precisions}

    def probe(self) -> None:
        """Measure each rate once more and keep the best."""
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


# --- timing and memory ------------------------------------------------------------------------------------


@functools.cache
def _l2_flush(device: torch.device) -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device=device)  # several times the largest L2


def time_call(call: Callable[[], object], device: torch.device, *, flush_l2: bool = False) -> tuple[int, object]:
    """Return the nanoseconds of one call, until the device has finished its work, and its result."""
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
    """Time calls in turns, so that a slow minute of the machine affects all of them alike.

    After a warm-up round, a second round determines the number of rounds: each call gets the same share of ``seconds``,
    at least two and at most 20 rounds, or one round if that alone takes longer than ``seconds``. The rounds of a call
    that gets fewer are spread evenly over the others'.
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
    """Return the bytes that one call allocates at its peak, its result included; None if the system does not tell.

    On a GPU torch's allocator counts them. On Linux the high-water mark of the process is reset and read: it sees every
    allocation that was touched, by any library.
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
