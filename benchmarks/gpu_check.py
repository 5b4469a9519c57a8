"""Checks that need a card: tests marked gpu, compute-sanitizer, benchmarks. One call, JSON results in one folder.

    python benchmarks/gpu_check.py [--out DIR] [--budget SECONDS] [--ncu] [--only STEP ...]

Uses this Python as it is (torch, pytest and numpy must be there), reads the repository and writes only into
DIR. Where the repository holds no compiled libraries they are built in a temporary copy (cmake, ninja, nvcc).

Steps, in this order; one that the budget leaves no time for is skipped, and one that overruns its share is ended (what
a benchmark has measured until then stays):

    tests        the tests marked gpu
    memcheck     compute-sanitizer over ragged shapes of each operator and the smaller of the tests
    racecheck    compute-sanitizer over the ragged shapes
    bench_*      every benchmark on the card, the search first, and after it
    sampling-*   `rqgen bench sampling` with the 1.4B preset, beside the published formulation with the same weights
    ncu          with --ncu: what each kernel makes of the tensor cores, FP64 units, DRAM and L2
    ncu-position with --ncu: the same of all kernels, PyTorch's too, that draw a position of 500 images

--only takes names of steps, with * for any letters; each of them may take all the time that is left.
Exit status: 0 all well; 1 a step failed or overran; 2 something that is needed is missing, or a step was skipped;
3 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fnmatch
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))  # op_calls
# The search first: it is what most is asked of.
BENCHMARKS = sorted(
    (ROOT / "benchmarks").glob("bench_*.py"), key=lambda path: (path.stem != "bench_residual_search", path)
)
# What the models' tests import beyond torch; without all of it only the kernels are tested.
MODEL_PACKAGES = ("PIL", "accelerate", "matplotlib", "rich", "safetensors", "sklearn", "typer", "yaml")
MODEL_BENCHMARKS = ("bench_depth_decode", "bench_prior_step")
# Few launches, and none into a CUDA graph: the sanitizer takes a while for each, and sees through torch's allocator
# only where that caches nothing, which a graph cannot do without.
SMALL_TESTS = ("tests/rqkernels/test_code_statistics.py", "tests/rqkernels/test_residual_decode.py")
BUDGET = 540.0
SECONDS_PER_CASE = 3.0
QUICK = os.environ.get("RQK_BENCH_QUICK") == "1"
TAIL = 4000  # characters of a step's output that are kept


class Missing(Exception):
    """Something that this script will not fetch by itself."""


# --- steps and their time --------------------------------------------------------------------------------


class Sampling(NamedTuple):
    """A run of `rqgen bench sampling`: what is drawn, without a decoder, and its share of the budget."""

    shape: str
    precision: str
    batches: tuple[int, ...]
    share: float

    @property
    def name(self) -> str:
        return f"sampling-{self.shape}-{self.precision}"

    def options(self) -> list[object]:
        size: list[object] = ["--preset", "1.4B", "--device", "cuda"]
        if QUICK:  # on any machine
            small = {"width": 16, "spatial-layers": 1, "depth-layers": 1, "heads": 2, "codebook-size": 32}
            size = [part for name, value in small.items() for part in (f"--{name}", value)] + ["--device", "cpu"]
        batches = [part for batch in self.batches for part in ("--batch", batch)]
        what = ["--shape", self.shape, "--precision", self.precision, *batches, "--published"]
        # Seconds in which a batch of 500 is drawn a few times by us, and twice in the published way.
        return [*size, *what, "--decoder-channels", 0, "--seconds", 0 if QUICK else 8]


# The paper's figure 4, what is asked for most first. (Keys and values of 500 images at 16x16x1 would take 38 GB.)
SAMPLINGS = (
    [Sampling("2x2x2", "bf16", (1, 2), 0.25)]
    if QUICK
    else [
        Sampling("8x8x4", "bf16", (1, 100, 200, 500), 0.25),
        Sampling("16x16x1", "bf16", (1, 100, 200), 0.25),
        Sampling("8x8x4", "fp32", (1, 100), 0.15),
    ]
)


class Step(NamedTuple):
    """Part of the check. `run` gets the seconds it may take and returns its record, "outcome" among it."""

    name: str
    share: float  # of the whole budget, at most
    least: float  # seconds without which it is not begun
    run: Callable[[float], dict[str, Any]]


def run_steps(
    steps: Sequence[Step], budget: float, clock: Callable[[], float] = time.monotonic
) -> dict[str, dict[str, Any]]:
    """Each step's record by name: what it returned and its seconds, or that it was skipped or misses something."""
    start = clock()
    records = {}
    for step in steps:
        begin = clock()
        left = start + budget - begin
        if left < step.least:
            records[step.name] = {"outcome": "skipped", "why": f"{max(left, 0):.0f} s of the budget were left"}
        else:
            try:
                record = step.run(min(left, step.share * budget))
            except Missing as error:
                record = {"outcome": "missing", "why": str(error)}
            records[step.name] = {**record, "seconds": round(clock() - begin, 1)}
        why = records[step.name].get("why")
        print(f"gpu-check: {step.name}: {records[step.name]['outcome']}{f' ({why})' if why else ''}", flush=True)
    return records


def chosen(steps: Sequence[Step], patterns: Sequence[str]) -> list[Step]:
    """The steps of these names, none with a share that it must keep to.

    Raises:
        ValueError: a name that no step has.
    """
    for pattern in patterns:
        if not fnmatch.filter([step.name for step in steps], pattern):
            raise ValueError(f"--only: no step is called {pattern}; there are {', '.join(s.name for s in steps)}")
    wanted = [step for step in steps if any(fnmatch.fnmatchcase(step.name, pattern) for pattern in patterns)]
    return [step._replace(share=1.0) for step in wanted]


def exit_status(records: Mapping[str, Mapping[str, Any]]) -> int:
    outcomes = {record["outcome"] for record in records.values()}
    if outcomes & {"failed", "timed out"}:
        return 1
    return 2 if outcomes & {"missing", "skipped"} else 0


def execute(
    command: Sequence[object],
    seconds: float,
    environment: Mapping[str, str],
    folder: Path,
    *,
    stdout: Path | None = None,
) -> dict[str, Any]:
    """Runs a command in its own process group, which ends with it; its output is shown, or goes to a file."""
    with tempfile.TemporaryFile() as shown, open(stdout, "wb") if stdout else contextlib.nullcontext(shown) as target:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=folder, env=dict(environment), stdout=target, stderr=shown,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
            outcome = "passed" if status == 0 else "failed"
        except subprocess.TimeoutExpired:
            status, outcome = None, "timed out"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shown.seek(0)
        text = shown.read().decode(errors="replace")
    print(text, end="", flush=True)
    record: dict[str, Any] = {"outcome": outcome, "status": status}
    if outcome != "passed":
        record |= {
            "why": f"ended after {seconds:.0f} s" if status is None else f"exit status {status}",
            "tail": text[-TAIL:],
        }
    return record


def tool(name: str) -> str:
    """The path of a tool of the CUDA toolkit.

    Raises:
        Missing: it is not installed.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join([f"{home}/bin", f"{home}/compute-sanitizer"]))
    if found is None:
        raise Missing(f"{name} is not installed here")
    return found


# --- what is run on the card -----------------------------------------------------------------------------


def find_package(scratch: Path) -> Path:
    """The folder that holds `rqkernels` with both libraries: the repository, or a build in `scratch`."""
    libraries = [ROOT / "rqkernels" / f"{name}.abi3.so" for name in ("_C", "_cuda")]
    if all(path.is_file() for path in libraries):
        return ROOT
    missing = [tool for tool in ("cmake", "ninja", "nvcc") if shutil.which(tool) is None]
    if missing:
        raise Missing(f"rqkernels is not built here, and to build it {', '.join(missing)} is missing")
    print("gpu-check: building in a temporary folder", flush=True)
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, scratch)
    for name in ("csrc", "rqkernels", "python"):
        shutil.copytree(ROOT / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    environment = {**os.environ, "RQK_CUDA": "1", "RQK_CUDA_ARCHITECTURES": capability()}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=scratch, env=environment, check=True
    )
    return scratch


def capability() -> str:
    import torch

    return "{}{}".format(*torch.cuda.get_device_capability())


def pytest_command(*paths: str) -> list[object]:
    # Not from the repository's root: its own rqkernels, perhaps without libraries, would be found first.
    options = ["-m", "gpu", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    return [sys.executable, "-m", "pytest", *options, *(ROOT / path for path in paths)]


def steps_on(scratch: Path, environment: Mapping[str, str], out: Path, device: str) -> Iterator[Step]:
    """All there are. `device`: as results are named after it."""
    without = [name for name in MODEL_PACKAGES if importlib.util.find_spec(name) is None]

    def tests(seconds: float) -> dict[str, Any]:
        folders = ["tests/rqkernels", *([] if without else ["tests/rqgen"])]
        report = scratch / "gpu-tests.xml"
        record = execute([*pytest_command(*folders), f"--junitxml={report}"], seconds, environment, scratch)
        return {**record, "folders": folders, "packages_missing": without, "outcomes": test_outcomes(report)}

    def sanitize(name: str, *commands: Sequence[object]) -> Callable[[float], dict[str, Any]]:
        def run(seconds: float) -> dict[str, Any]:
            # Every tensor its own allocation, so that what lies beyond one is beyond memory.
            uncached = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            sanitizer, end = tool("compute-sanitizer"), time.monotonic() + seconds
            record: dict[str, Any] = {}
            for command in commands:
                watched = [sanitizer, "--tool", name, "--error-exitcode", "1", *command]
                record = execute(watched, max(1.0, end - time.monotonic()), uncached, scratch)
                if record["outcome"] != "passed":
                    break
            return record

        return run

    def bench(path: Path) -> Callable[[float], dict[str, Any]]:
        environment_of_bench = {**environment, "RQK_BENCH_SECONDS": str(SECONDS_PER_CASE)}
        command = [sys.executable, path, "--device", "cuda", "--out", out]

        def run(seconds: float) -> dict[str, Any]:
            if without and path.stem in MODEL_BENCHMARKS:
                raise Missing(f"the models need {', '.join(without)}")
            return execute(command, seconds, environment_of_bench, scratch)

        return run

    def sampling(run_: Sampling) -> Callable[[float], dict[str, Any]]:
        def run(seconds: float) -> dict[str, Any]:
            if without:
                raise Missing(f"the models need {', '.join(without)}")
            folder = scratch / run_.name
            command = [sys.executable, "-m", "rqgen", "bench", "sampling", *run_.options(), "--out", folder]
            record = execute(command, seconds, environment, scratch)
            (out / "sampling").mkdir(exist_ok=True)
            # Written after each batch size, so what was measured before an end stays.
            for path in (folder / "sampling.json", folder / "sampling.png"):
                if path.exists():
                    target = out / "sampling" / f"{device}-{run_.name.removeprefix('sampling-')}{path.suffix}"
                    shutil.copy(path, target)
            return record

        return run

    def ncu(calls: str, *which: str) -> Callable[[float], dict[str, Any]]:
        def run(seconds: float) -> dict[str, Any]:
            if without and calls == "position":
                raise Missing(f"the models need {', '.join(without)}")
            report = scratch / f"ncu-{calls}.csv"
            # Clocks are left alone, as they are for the benchmarks.
            command = [tool("ncu"), "--csv", "--page", "raw", "--clock-control", "none"]
            command += ["--kernel-name-base", "demangled", *which]
            command += [part for name in NCU_SECTIONS for part in ("--section", name)]
            command += [sys.executable, __file__, "--calls", calls]
            record = execute(command, seconds, environment, scratch, stdout=report)
            text = report.read_text(errors="replace") if report.exists() else ""
            kernels = summarize_ncu(text)
            if record["outcome"] == "passed" and not kernels:
                record |= {"outcome": "failed", "why": "its report names no kernel", "tail": text[-TAIL:]}
            return {**record, "kernels": kernels}

        return run

    ragged = [sys.executable, __file__, "--calls", "ragged"]
    yield Step("tests", 0.35, 20, tests)
    yield Step("memcheck", 0.2, 20, sanitize("memcheck", ragged, pytest_command(*SMALL_TESTS)))
    yield Step("racecheck", 0.15, 20, sanitize("racecheck", ragged))
    first, *others = BENCHMARKS
    yield Step(first.stem, 0.6, 20, bench(first))
    for run in SAMPLINGS:
        yield Step(run.name, run.share, 20, sampling(run))
    for path in others:
        yield Step(path.stem, 0.25, 20, bench(path))
    yield Step("ncu", 0.25, 20, ncu("typical", "--kernel-name", "regex:rqk::"))
    yield Step("ncu-position", 0.15, 20, ncu("position", "--profile-from-start", "off"))


def test_outcomes(report: Path) -> dict[str, str]:
    """The outcome of each test by name, from pytest's XML; empty where pytest did not get as far as writing it."""
    cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    return {f"{case.get('classname')}::{case.get('name')}": case[0].tag if len(case) else "passed" for case in cases}


# --- calls of each operator ------------------------------------------------------------------------------


def every_call(kind: str) -> Iterator[tuple[str, Any]]:
    """Calls of every operator, "ragged" or "typical" ones, each with its operator's name."""
    import torch
    from op_calls import OPS, calls_of

    for op in OPS:
        module = calls_of(op)
        calls = module.RAGGED if kind == "ragged" else module.typical(torch.device("cuda"), QUICK)
        yield from ((op, call) for call in calls)


def call_ragged() -> None:
    """Shapes that fit no tile, each result compared with the CPU's: for compute-sanitizer."""
    for op, call in every_call("ragged"):
        inputs = call.draw(0)
        ours = call.run(*(tensor.cuda() for tensor in inputs))
        try:
            call.check(ours, call.run(*inputs))
        except AssertionError as error:
            raise AssertionError(f"{op}: {error}") from None


def call_typical(device: str = "cuda") -> None:
    """Every operator in the shapes of the benchmarks, one call each: for ncu."""
    import torch

    for _, call in every_call("typical"):
        call.run(*(tensor.to(device) for tensor in call.draw(0)))
    if device == "cuda":
        torch.cuda.synchronize()


def call_position(device: str = "cuda") -> None:
    """One position of a batch, for ncu, which sees what lies between the profiler's start and stop: the 1.4B prior's
    layers in their proportion, launched one by one."""
    import torch

    from rqgen.inference import SamplingParams
    from rqgen.inference.cuda_graph import CapturedSampler
    from rqgen.models import RQTransformer, RQTransformerConfig
    from rqgen.models.transformer import TransformerConfig

    width, heads, k, batch, positions = (16, 2, 32, 2, 4) if QUICK else (1536, 24, 16384, 500, 64)
    stacks = {name: TransformerConfig(layers, heads) for name, layers in (("spatial", 7), ("depth", 1))}
    with torch.device(device):
        config = RQTransformerConfig((positions // 2, 2, 4), k, 256, embed_dim=width, **stacks)
        prior = RQTransformer(config, torch.randn(k, 256)).bfloat16().eval()
    begun = iter(range(positions))

    def advance(images: int) -> None:
        position = next(begun)
        if position == positions // 2:
            torch.cuda.profiler.start()
        elif position == positions // 2 + 1:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()

    sampler = CapturedSampler(prior, capture=False)
    sampler.sample(prior.condition_ids(None, batch), SamplingParams().resolve(prior, None), advance=advance)


# --- what ncu says ---------------------------------------------------------------------------------------

NCU_SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")
# By what a metric's name holds: names differ a little from one architecture to the next.
NCU_METRICS = {
    "sm": "sm__throughput.avg.pct_of_peak",
    "tensor": "pipe_tensor",
    "fp64": "pipe_fp64",
    "dram": "dram__throughput.avg.pct_of_peak",
    "l2": "lts__throughput.avg.pct_of_peak",
}
NCU_NS = {"ns": 1.0, "nsecond": 1.0, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9}


def summarize_ncu(report: str) -> dict[str, dict[str, Any]]:
    """`ncu --csv --page raw`, by kernel: launches, nanoseconds of all, and percent of peak by unit, weighted by time.

    Of several metrics of one unit the largest counts (a pipe has one for each kind of instruction).
    """
    lines = report.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return {}
    header, units, *rows = csv.reader(io.StringIO("\n".join(lines[first:])))
    kernels: dict[str, dict[str, Any]] = {}
    for row in rows:
        if len(row) != len(header):
            continue
        entry = dict(zip(header, row, strict=True))
        duration = next(i for i, name in enumerate(header) if name.startswith("gpu__time_duration"))
        ns = number(row[duration]) * NCU_NS[units[duration]]
        kernel = kernels.setdefault(entry["Kernel Name"].split("(")[0], {"launches": 0, "ns": 0.0, "percent": {}})
        kernel["launches"] += 1
        kernel["ns"] += ns
        for unit, part in NCU_METRICS.items():
            values = [
                number(v) for name, u, v in zip(header, units, row, strict=True) if part in name and u == "%" and v
            ]
            if values:
                kernel["percent"][unit] = kernel["percent"].get(unit, 0.0) + max(values) * ns
    for kernel in kernels.values():
        kernel["percent"] = {unit: round(sum_ / kernel["ns"], 1) for unit, sum_ in kernel["percent"].items()}
    return kernels


def number(text: str) -> float:
    return float(text.replace(",", ""))


# --- the whole -------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests and benchmarks that need a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all steps (%(default).0f)")
    parser.add_argument("--ncu", action="store_true", help="also profile each kernel")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone, such as 'sampling-*' ncu")
    parser.add_argument("--calls", choices=["ragged", "typical", "position"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    start = time.monotonic()
    try:
        import pytest  # noqa: F401
        import torch
    except ImportError as error:
        print(f"gpu-check: {sys.executable} has no {error.name}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"gpu-check: no GPU: torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 3
    if args.calls is not None:
        {"ragged": call_ragged, "typical": call_typical, "position": call_position}[args.calls]()
        return 0
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        try:
            package = find_package(scratch)
        except Missing as error:
            print(f"gpu-check: {error}", file=sys.stderr)
            return 2
        paths = [str(package), str(package / "python"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        built = time.monotonic() - start
        name = "-".join(torch.cuda.get_device_name().lower().split())
        steps = list(steps_on(scratch, environment, out, name))
        try:
            steps = (
                chosen(steps, args.only)
                if args.only
                else [step for step in steps if args.ncu or not step.name.startswith("ncu")]
            )
        except ValueError as error:
            print(f"gpu-check: {error}", file=sys.stderr)
            return 2
        path = out / f"{name}-gpu-tests.json"
        # What other calls found of other steps stays, where this one was asked for some.
        others = json.loads(path.read_text())["steps"] if args.only and path.exists() else {}
        records = run_steps(steps, args.budget - built)
    summary = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "budget_seconds": args.budget,
        "build_seconds": round(built, 1),
        "steps": {**others, **records},
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(partial, path)
    status = exit_status(records)
    print(f"gpu-check: {('passed', 'FAILED', 'INCOMPLETE')[status]}, results in {out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
