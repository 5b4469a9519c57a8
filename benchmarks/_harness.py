"""Harness of all benchmarks.

A benchmark passes contenders that do the same work in the same process. `compare` first checks that they agree, then
times them in turns (one call of each per round, the peers in rotating order), so that a slow minute of the machine
affects all of them alike. It reports median, 20th and 80th percentile, peak memory, ratios per row of work, and the
floor of this device for that work: max(bytes / copy bandwidth, operations / matmul rate), both measured in the same
rounds. A GPU is timed by events, with its L2 cache flushed before each call.

A bench_<op>.py is a pytest file for pytest-benchmark (`make bench`) and a script (`python benchmarks/bench_<op>.py
--device cuda`) that needs torch alone.

    RQK_BENCH_QUICK=1     tiny shapes and two rounds, to test that it runs
    RQK_BENCH_OUT=DIR     folder of the JSON (benchmarks/results)
    RQK_BENCH_THREADS=N   torch threads (torch's default)
    RQK_BENCH_SECONDS=S   approximate seconds for the rounds of one case (20)
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rqkernels import _measure

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))  # op_calls
RESULTS = ROOT / "benchmarks" / "results"
# Files written by benchmarks and renderers; they do not make a tree dirty.
GENERATED = (
    "benchmarks/results",
    "benchmarks/RESULTS.md",
    "docs/soft_labels.md",
    "docs/scaling.md",
    "docs/scaling.png",
)
QUICK = os.environ.get("RQK_BENCH_QUICK") == "1"
PRECISION = {"cpu": "fp32", "cuda": "bf16"}  # of the matrix products that define the floor
PACKAGES = (*_measure.PACKAGES, "vector-quantize-pytorch", "faiss-cpu")
_SECONDS_PER_CASE = float(os.environ.get("RQK_BENCH_SECONDS", "20"))


@dataclass(frozen=True)
class Contender:
    """One implementation of the work. `call` does `rows` rows of it and returns the result that `check` compares;
    `setting` names options that were chosen for this case."""

    name: str
    call: Callable[[], object]
    rows: int
    setting: str = ""


@dataclass(frozen=True)
class Work:
    """Work that no implementation can avoid: bytes in and out of memory, and multiplications plus additions."""

    bytes: int
    operations: int


@functools.cache
def peaks(device: torch.device) -> _measure.Peaks:
    """Return the rates of this device in float32, or in bfloat16 on a GPU, probed in every round."""
    if QUICK:
        _measure.COPIED_BYTES, _measure.PRODUCT_SIDE = (dict.fromkeys(("cpu", "cuda"), n) for n in (1 << 20, 256))
    return _measure.Peaks(device, [PRECISION[device.type]])


def floor(work: Work, our_median_ns: float, peak: _measure.Peaks) -> dict[str, Any]:
    """Return the least time of this work on this device, the limiting unit, and the percentage that ours reaches."""
    ns, limit = peak.rates.floor_ns(work.bytes, work.operations, PRECISION[peak.device.type])
    return {
        "bytes": work.bytes,
        "operations": work.operations,
        "limit": limit,
        "ns": ns,
        "percent_of_floor": 100 * ns / our_median_ns,
    }


def time_ns(call: Callable[[], object], device: torch.device) -> int:
    """Return the nanoseconds of one call, on a GPU with a cold L2."""
    return _measure.time_call(call, device, flush_l2=True)[0]


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
    """Check, time and describe one case; contenders[0] is ours.

    Args:
        check: takes each contender's result by name, raises AssertionError if they did not do the same work, and
            returns each one's agreement with the definition (1.0: equal).
        benchmark: pytest-benchmark's fixture. It times our rounds; the peers run as the setup of each.
        before_round: changes the inputs of all contenders in place, untimed, before each of them is called once.
    """
    ours, *peers = contenders
    # The first calls compile, pack and warm up; a last one determines the number of rounds.
    for contender in contenders:
        contender.call()
    before_round()
    agreement = check({c.name: c.call() for c in contenders})
    before_round()
    memory = {c.name: _measure.peak_memory(c.call, device) for c in contenders}
    before_round()
    one_round = sum(time_ns(c.call, device) for c in contenders) / 1e9
    rounds = 2 if QUICK else max(5, min(60, int(_SECONDS_PER_CASE / one_round)))

    samples: dict[str, list[int]] = {c.name: [] for c in contenders}

    peak = peaks(device)

    def peers_in_turn() -> None:
        peak.probe()
        before_round()
        first = len(samples[ours.name]) % max(1, len(peers))
        for contender in [*peers[first:], *peers[:first]]:
            samples[contender.name].append(time_ns(contender.call, device))

    def our_turn() -> None:
        samples[ours.name].append(time_ns(ours.call, device))

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
                "setting": c.setting,
                "rows": c.rows,
                "agreement": agreement[c.name],
                **_summary(samples[c.name]),
                "times_ours_per_row": statistics.median(samples[c.name]) / c.rows / (our_median / ours.rows),
                "peak_bytes": memory[c.name],
                "samples_ns": samples[c.name],
            }
            for c in contenders
        ],
        "floor": floor(work, our_median, peak),
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
    """Cases of one operator on one device, written as one JSON file.

    Raises ValueError if results of a tree with uncommitted changes would be written to the repository's folder.
    """

    slug: str
    device: torch.device
    cases: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = Path(os.environ.get("RQK_BENCH_OUT", RESULTS))
        self.checkout = clean_checkout(self.folder)

    def write(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{_measure.device_slug(self.device)}-{self.slug}.json"
        peak = peaks(self.device)
        for case in self.cases:  # with the best peaks of the whole run
            work = Work(case["floor"]["bytes"], case["floor"]["operations"])
            case["floor"] = floor(work, case["contenders"][0]["median_ns"], peak)
        content = {
            "slug": self.slug,
            "environment": _measure.environment(self.device, self.checkout, PACKAGES),
            "peaks": {"device": self.device.type, **peak.rates.described()},
            "cases": self.cases,
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
        return path


def clean_checkout(folder: Path) -> _measure.Checkout:
    """Return the state of this repository, for results that are written to ``folder``.

    Raises:
        ValueError: ``folder`` is the repository's own, and the tree has uncommitted changes.
    """
    state = _measure.checkout(ROOT, ignored=GENERATED)
    if state.dirty and folder.resolve() == RESULTS:
        raise ValueError(
            f"uncommitted changes: results in {RESULTS.relative_to(ROOT)} must come from a commit. Commit first, or "
            "write elsewhere: RQK_BENCH_OUT=DIR, or --out DIR"
        )
    return state


def set_threads() -> None:
    if "RQK_BENCH_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["RQK_BENCH_THREADS"]))


def main(slug: str, cases: Sequence[Any], run_case: Callable[..., dict[str, Any]]) -> None:
    """Run `python benchmarks/bench_<op>.py [--device cuda] [--out DIR]`, without pytest."""
    if not _measure.is_warm():
        # The allocator reads its settings when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_measure.WARM_HEAP})
    parser = argparse.ArgumentParser(description=f"Benchmark of {slug}.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="folder of the JSON (benchmarks/results)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    if args.out is not None:
        os.environ["RQK_BENCH_OUT"] = str(args.out)
    set_threads()
    try:
        run = Run(slug, torch.device(args.device))
    except ValueError as error:
        sys.exit(str(error))
    for case in cases:
        record = run_case(case, run.device)
        run.cases.append(record)
        print(describe(record), flush=True)
        path = run.write()  # after each case: an interrupted run keeps its results
    print(f"measured here: {rates_in_words(peaks(run.device).rates.described())}")
    print(path)


def described(environment: Mapping[str, Any]) -> str:
    """Describe threads, heap, versions, commit and time of a measurement.

    Raises:
        ValueError: the measurement came from a tree with uncommitted changes and cannot be repeated.
    """
    if environment["dirty"]:
        raise ValueError(f"measured with uncommitted changes on {environment['time']}: measure again from a commit")
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    threads, heap = environment["threads"], "warm" if environment["warm_heap"] else "COLD"
    return (
        f"{threads} thread{'' if threads == 1 else 's'}, {heap} heap, Python {environment['python']}, {versions}, "
        f"commit {(environment['commit'] or 'unknown')[:12]}, {environment['time']}"
    )


def rates_in_words(rates: Mapping[str, Any]) -> str:
    """Format `_measure.Rates.described`, such as "copy 24.1 GB/s, fp32 matmul 303.5 GFLOP/s"."""
    products = [f"{name} matmul {rate / 1e9:.4g} GFLOP/s" for name, rate in rates["operations_per_s"].items()]
    return ", ".join([f"copy {rates['copy_bytes_per_s'] / 1e9:.3g} GB/s", *products])


def describe(record: Mapping[str, Any]) -> str:
    """Format one case in a few lines, for the terminal."""
    floor = record["floor"]
    percent, floor_ms = floor["percent_of_floor"], floor["ns"] / 1e6
    lines = [f"{record['case']}: {percent:.1f} % of the floor, {floor_ms:.3f} ms ({floor['limit']})"]
    for c in record["contenders"]:
        setting = f"  ({c['setting']})" if c["setting"] else ""
        lines.append(
            f"  {c['name']:<28} {c['median_ns'] / 1e6:10.3f} ms  {c['times_ours_per_row']:8.2f} x ours{setting}"
        )
    return "\n".join(lines)


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between two markers. Raise ValueError unless both are present, in order."""
    before, found_begin, rest = path.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{path} must hold {begin} and after it {end}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
