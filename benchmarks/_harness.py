"""What every benchmark here does the same way.

A benchmark hands over contenders that do the same work in the same process. `compare` first looks whether
they agree, then times them in turns (one call of each per round, the peers in rotating order), so that a slow
minute of the machine hits all of them alike. Reported: median, 20th and 80th percentile, peak memory, ratios
per row of work, and the floor of this device for that work: max(bytes / copy bandwidth, operations / matmul
rate), both measured in the same rounds. A GPU is timed by events, with its L2 cache flushed before each call.

A bench_<slug>.py is a pytest file for pytest-benchmark (`make bench`) and a script (`python
benchmarks/bench_<slug>.py --device cuda`) that needs torch alone.

    RQK_BENCH_QUICK=1     tiny shapes, two rounds: does it run at all
    RQK_BENCH_OUT=DIR     where the JSON goes (benchmarks/results)
    RQK_BENCH_THREADS=N   torch threads (torch's own default)
    RQK_BENCH_SECONDS=S   how long the rounds of one case take, roughly (20)
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
QUICK = os.environ.get("RQK_BENCH_QUICK") == "1"
WARM_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
}
_SECONDS_PER_CASE = float(os.environ.get("RQK_BENCH_SECONDS", "20"))


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `call` does `rows` rows of it and returns what `check` compares."""

    name: str
    call: Callable[[], object]
    rows: int


@dataclass(frozen=True)
class Work:
    """What no implementation can avoid: bytes in and out of memory, and multiplications plus additions."""

    bytes: int
    operations: int


# --- the machine -----------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*args: str) -> str | None:
    try:
        return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Where a number comes from: without it, the number says nothing."""
    import rqkernels

    changes = _git("status", "--porcelain", "--untracked-files=no")
    packages = ("rqkernels", "torch", "numpy", "vector-quantize-pytorch", "faiss-cpu")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "versions": {name: version for name in packages if (version := _version(name))},
        "rqkernels": rqkernels.info(paths=False),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "warm_heap": all(os.environ.get(name) == value for name, value in WARM_HEAP.items()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class Peaks:
    """Copy bandwidth (bytes read and written) and matmul rate (float32 on CPU, bfloat16 on CUDA), measured here.

    Probed in every round, and the best of all kept: a peak is what the device can do, not what it did in a slow
    minute.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.device, self.dtype = device, torch.bfloat16 if cuda else torch.float32
        self._size = 1 << 20 if QUICK else (1 << 30 if cuda else 1 << 28)
        self._side = 256 if QUICK else (8192 if cuda else 1024)
        self._source = torch.ones(self._size // 4, device=device)
        self._target = torch.empty_like(self._source)
        self._matrix = torch.randn(self._side, self._side, device=device).to(self.dtype)
        self.copy_bytes_per_s = self.matmul_flop_per_s = 0.0
        self.probe()

    def probe(self) -> None:
        copy_ns = time_call(lambda: self._target.copy_(self._source), self.device)[0]
        matmul_ns = time_call(lambda: self._matrix @ self._matrix, self.device)[0]
        self.copy_bytes_per_s = max(self.copy_bytes_per_s, 2e9 * self._size / copy_ns)
        self.matmul_flop_per_s = max(self.matmul_flop_per_s, 2e9 * self._side**3 / matmul_ns)

    def floor(self, work: Work, our_median_ns: float) -> dict[str, Any]:
        """The least time of that work on this device, what limits it, and how near ours comes."""
        ns = {
            "memory bandwidth": 1e9 * work.bytes / self.copy_bytes_per_s,
            "matrix unit": 1e9 * work.operations / self.matmul_flop_per_s,
        }
        limit = max(ns, key=lambda unit: ns[unit])
        return {
            "bytes": work.bytes,
            "operations": work.operations,
            "limit": limit,
            "ns": ns[limit],
            "percent_of_floor": 100 * ns[limit] / our_median_ns,
        }

    def described(self) -> dict[str, Any]:
        return {
            "device": self.device.type,
            "copy_bytes_per_s": self.copy_bytes_per_s,
            "matmul_dtype": str(self.dtype).removeprefix("torch."),
            "matmul_flop_per_s": self.matmul_flop_per_s,
        }


@functools.cache
def peaks(device: torch.device) -> Peaks:
    return Peaks(device)


# --- one call --------------------------------------------------------------------------------------------


@functools.cache
def _l2_flush(device: torch.device) -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device=device)  # several times any L2 there is


def time_call(call: Callable[[], object], device: torch.device) -> tuple[int, object]:
    """(nanoseconds, result) of one call."""
    if device.type != "cuda":
        start = time.perf_counter_ns()
        result = call()
        return time.perf_counter_ns() - start, result
    _l2_flush(device).zero_()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    result = call()
    end_event.record()
    torch.cuda.synchronize(device)
    return round(start_event.elapsed_time(end_event) * 1e6), result


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call needs beyond what stood before it, its result included; None where nobody tells.

    On a GPU torch's allocator knows. On Linux the high-water mark of the process is reset and read, which
    sees every allocation that was touched, whoever made it.
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
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left on the warm heap goes back first
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


# --- one case --------------------------------------------------------------------------------------------


def compare(
    name: str,
    shape: Mapping[str, object],
    device: torch.device,
    contenders: Sequence[Contender],
    work: Work,
    check: Callable[[Mapping[str, object]], Mapping[str, float]],
    benchmark: Any = None,
    before_round: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Checks, times and describes one case; contenders[0] is ours.

    Args:
        check: gets each contender's result by name, raises AssertionError where they did not do the same
            work, and returns each one's agreement with the definition (1.0: equal).
        benchmark: pytest-benchmark's fixture. It times our rounds, and runs the peers' as the setup of each.
        before_round: changes in place what all contenders work on, untimed, before each of them is called once.
    """
    ours, *peers = contenders
    # The first calls compile, pack and warm; the last of them tells how many rounds there is time for.
    for contender in contenders:
        contender.call()
    before_round()
    agreement = check({c.name: c.call() for c in contenders})
    before_round()
    memory = {c.name: peak_memory(c.call, device) for c in contenders}
    before_round()
    one_round = sum(time_call(c.call, device)[0] for c in contenders) / 1e9
    rounds = 2 if QUICK else max(5, min(60, int(_SECONDS_PER_CASE / one_round)))

    samples: dict[str, list[int]] = {c.name: [] for c in contenders}

    peak = peaks(device)

    def peers_in_turn() -> None:
        peak.probe()
        before_round()
        first = len(samples[ours.name]) % max(1, len(peers))
        for contender in [*peers[first:], *peers[:first]]:
            samples[contender.name].append(time_call(contender.call, device)[0])

    def our_turn() -> None:
        samples[ours.name].append(time_call(ours.call, device)[0])

    if benchmark is None:
        for _ in range(rounds):
            peers_in_turn()
            our_turn()
    else:
        benchmark.pedantic(our_turn, setup=peers_in_turn, rounds=rounds, iterations=1)

    our_median = statistics.median(samples[ours.name])
    record = {
        "case": name,
        "shape": dict(shape),
        "rounds": rounds,
        "contenders": [
            {
                "name": c.name,
                "rows": c.rows,
                "agreement": agreement[c.name],
                **_summary(samples[c.name]),
                "times_ours_per_row": statistics.median(samples[c.name]) / c.rows / (our_median / ours.rows),
                "peak_bytes": memory[c.name],
                "samples_ns": samples[c.name],
            }
            for c in contenders
        ],
        "floor": peak.floor(work, our_median),
    }
    if benchmark is not None:
        benchmark.extra_info.update({key: record[key] for key in ("shape", "floor")})
        benchmark.extra_info["times_ours"] = {c["name"]: c["times_ours_per_row"] for c in record["contenders"]}
    return record


def _summary(samples_ns: Sequence[int]) -> dict[str, float]:
    quantiles = statistics.quantiles(samples_ns, n=10, method="inclusive")
    return {"median_ns": statistics.median(samples_ns), "p20_ns": quantiles[1], "p80_ns": quantiles[7]}


# --- one run ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The cases of one slug on one device, written as one JSON file."""

    slug: str
    device: torch.device
    cases: list[dict[str, Any]] = field(default_factory=list)

    def write(self) -> Path:
        folder = Path(os.environ.get("RQK_BENCH_OUT", ROOT / "benchmarks" / "results"))
        folder.mkdir(parents=True, exist_ok=True)
        device = re.sub(r"[^a-z0-9]+", "-", device_name(self.device).lower()).strip("-")
        path = folder / f"{device}-{self.slug}.json"
        peak = peaks(self.device)
        for case in self.cases:  # by the best peaks of the whole run
            work = Work(case["floor"]["bytes"], case["floor"]["operations"])
            case["floor"] = peak.floor(work, case["contenders"][0]["median_ns"])
        content = {
            "slug": self.slug,
            "environment": environment(self.device),
            "peaks": peak.described(),
            "cases": self.cases,
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
        return path


def set_threads() -> None:
    if "RQK_BENCH_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["RQK_BENCH_THREADS"]))


def main(slug: str, cases: Sequence[Any], run_case: Callable[..., dict[str, Any]]) -> None:
    """`python benchmarks/bench_<slug>.py [--device cuda] [--out DIR]`, without pytest."""
    if any(os.environ.get(name) != value for name, value in WARM_HEAP.items()):
        # The allocator reads its settings when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **WARM_HEAP})
    parser = argparse.ArgumentParser(description=f"Benchmark of {slug}.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="folder of the JSON (benchmarks/results)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    if args.out is not None:
        os.environ["RQK_BENCH_OUT"] = str(args.out)
    set_threads()
    run = Run(slug, torch.device(args.device))
    for case in cases:
        record = run_case(case, run.device)
        run.cases.append(record)
        print(describe(record), flush=True)
        path = run.write()  # after each case: what is ended early has what it measured
    peak = peaks(run.device)
    copy, matmul = peak.copy_bytes_per_s / 1e9, peak.matmul_flop_per_s / 1e9
    print(f"measured here: copy {copy:.4g} GB/s, {peak.dtype} matmul {matmul:.4g} GFLOP/s".replace("torch.", ""))
    print(path)


def describe(record: Mapping[str, Any]) -> str:
    """One case in a few lines, for the terminal."""
    floor = record["floor"]
    percent, floor_ms = floor["percent_of_floor"], floor["ns"] / 1e6
    lines = [f"{record['case']}: {percent:.1f} % of the floor, {floor_ms:.3f} ms ({floor['limit']})"]
    for c in record["contenders"]:
        lines.append(f"  {c['name']:<28} {c['median_ns'] / 1e6:10.3f} ms  {c['times_ours_per_row']:8.2f} x ours")
    return "\n".join(lines)


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between two markers. Raises ValueError where they are not both there, in order."""
    before, found_begin, rest = path.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{path} must hold {begin} and after it {end}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
