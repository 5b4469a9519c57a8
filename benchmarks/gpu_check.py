"""What needs a card: tests marked gpu, compute-sanitizer, the benchmarks. Results as JSON in one folder, in one call.

    python benchmarks/gpu_check.py [--out DIR] [--budget SECONDS] [--ncu]

Uses this Python as it is (torch, pytest and numpy must be there), reads the repository and writes only into
DIR. Where the repository holds no compiled libraries they are built in a temporary copy (cmake, ninja, nvcc).

Steps, in this order; one that the budget leaves no time for is skipped, and one that overruns its share is ended (what
a benchmark has measured until then stays):

    tests        the tests marked gpu
    memcheck     compute-sanitizer over ragged shapes of each operator and the smaller of the tests
    racecheck    compute-sanitizer over the ragged shapes
    bench_*      every benchmark on the card
    ncu          with --ncu: what each kernel makes of the tensor cores, FP64 units, DRAM and L2

Exit status: 0 all well; 1 a step failed or overran; 2 something that is needed is missing, or a step was skipped;
3 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
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
# The search first: it is what most is asked of.
BENCHMARKS = sorted(
    (ROOT / "benchmarks").glob("bench_*.py"), key=lambda path: (path.stem != "bench_residual_search", path)
)
# What the models' tests import beyond torch; without all of it only the kernels are tested.
MODEL_PACKAGES = ("accelerate", "omegaconf", "rich", "safetensors", "sklearn", "typer", "yaml")
MODEL_BENCHMARKS = ("bench_prior_step",)
# Few launches, and none into a CUDA graph: the sanitizer takes a while for each, and sees through torch's allocator
# only where that caches nothing, which a graph cannot do without.
SMALL_TESTS = ("tests/rqkernels/test_code_statistics.py", "tests/rqkernels/test_residual_decode.py")
BUDGET = 540.0
SECONDS_PER_CASE = 3.0
TAIL = 4000  # characters of a step's output that are kept


class Missing(Exception):
    """Something that this script will not fetch by itself."""


# --- steps and their time --------------------------------------------------------------------------------


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


def steps_on(scratch: Path, environment: Mapping[str, str], out: Path, with_ncu: bool) -> Iterator[Step]:
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

    def ncu(seconds: float) -> dict[str, Any]:
        report = scratch / "ncu.csv"
        sections = [part for name in NCU_SECTIONS for part in ("--section", name)]
        command = [tool("ncu"), "--csv", "--page", "raw", *sections, "--kernel-name-base", "demangled"]
        command += ["--kernel-name", "regex:rqk::", sys.executable, __file__, "--calls", "typical"]
        record = execute(command, seconds, environment, scratch, stdout=report)
        kernels = summarize_ncu(report.read_text(errors="replace")) if report.exists() else {}
        if record["outcome"] == "passed" and not kernels:
            tail = report.read_text(errors="replace")[-TAIL:]
            record |= {"outcome": "failed", "why": "its report names no kernel of ours", "tail": tail}
        return {**record, "kernels": kernels}

    ragged = [sys.executable, __file__, "--calls", "ragged"]
    yield Step("tests", 0.35, 20, tests)
    yield Step("memcheck", 0.2, 20, sanitize("memcheck", ragged, pytest_command(*SMALL_TESTS)))
    yield Step("racecheck", 0.15, 20, sanitize("racecheck", ragged))
    for path in BENCHMARKS:
        yield Step(path.stem, 0.6 if path.stem == "bench_residual_search" else 0.25, 20, bench(path))
    if with_ncu:
        yield Step("ncu", 0.25, 20, ncu)


def test_outcomes(report: Path) -> dict[str, str]:
    """The outcome of each test by name, from pytest's XML; empty where pytest did not get as far as writing it."""
    cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    return {f"{case.get('classname')}::{case.get('name')}": case[0].tag if len(case) else "passed" for case in cases}


# --- one call of each operator ---------------------------------------------------------------------------


def call_ragged() -> None:
    """Shapes that fit no tile, each result compared with the CPU's: for compute-sanitizer."""
    import torch

    import rqkernels

    generator = torch.Generator().manual_seed(0)

    def everything(x: Any, codebooks: Any, depth: int) -> list[Any]:
        found = rqkernels.residual_search(x, codebooks, depth, return_residuals=True, return_statistics=True)
        decoded = rqkernels.residual_decode(found.codes, codebooks, check=False)
        counted = rqkernels.code_statistics(x, found.codes[..., 0], codebooks.shape[-2])
        results = [*found[:4], *found.statistics, decoded, *counted]
        if codebooks.dim() == 2:
            results += rqkernels.residual_search(x, rqkernels.FrozenCodebook(codebooks), depth)[:3]
        return results

    shapes = [(0, 5, 4, 1), (1, 1, 1, 1), (129, 257, 17, 3), (70, 256, 256, 2), (300, 31, 8, 4), (1500, 1, 3, 1)]
    for n, k, c, depth in shapes:
        for leading in ((), (depth,)):
            x = torch.randn(n, c, generator=generator)
            codebooks = torch.randn(*leading, k, c, generator=generator)
            if n > 3:
                x[2] = torch.nan
            ours, expected = everything(x.cuda(), codebooks.cuda(), depth), everything(x, codebooks, depth)
            for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
                same = torch.allclose(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
                assert same, f"result {i} differs from the CPU's at N, K, C, D = {n, k, c, depth}"
    for n, k, c in [(1, 1, 1), (129, 257, 17), (70, 300, 256), (9, 40, 900)]:
        x, codebook, logits = (torch.randn(*size, generator=generator) for size in ((n, c), (k, c), (n, k)))
        tau = c / 4

        def labelled(x: Any, codebook: Any, logits: Any, tau: float = tau) -> list[Any]:
            leaf = logits.detach().requires_grad_()
            loss = rqkernels.soft_label_cross_entropy(leaf, x, codebook, tau)
            drawn = rqkernels.stochastic_residual_search(x, codebook, 2, tau=tau, seed=1)
            grad = torch.autograd.grad(loss, leaf)[0]
            return [loss, grad, rqkernels.distance_softmax(x, codebook, tau), drawn.codes]

        ours, expected = labelled(x.cuda(), codebook.cuda(), logits.cuda()), labelled(x, codebook, logits)
        for i, (a, b) in enumerate(zip(ours[:3], expected[:3], strict=True)):
            assert torch.allclose(a.cpu(), b, rtol=1e-4, atol=1e-6), f"soft labels {i} differ at N, K, C = {n, k, c}"
        # A draw may fall on the other side of a boundary that the two round differently.
        same = (ours[3].cpu() == expected[3]).double().mean().item()
        assert same > 0.98, f"only {same:.1%} of the codes drawn are the CPU's at N, K, C = {n, k, c}"
    for n, k in [(0, 5), (1, 1), (129, 257), (9, 3000)]:
        logits = torch.randn(n, k, generator=generator)
        for settings in ({}, {"temperature": 0}, {"top_k": 1 + k // 2}, {"top_k": 1 + k // 2, "top_p": 0.9}):
            ours, expected = (rqkernels.sample_logits(x, seed=1, **settings) for x in (logits.cuda(), logits))
            assert torch.equal(ours.cpu(), expected), f"codes differ from the CPU's at N, K = {n, k}, {settings}"

    def attended(q: Any, k: Any, v: Any) -> list[Any]:
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = rqkernels.depth_attention(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n, heads, queries, keys, head_dim in (
            (3, 5, 4, 4, 64),
            (7, 1, 3, 9, 20),
            (1, 2, 32, 32, 128),
            (0, 1, 2, 2, 8),
        ):
            given = [torch.randn(n, heads, r, head_dim, generator=generator).to(dtype) for r in (queries, keys, keys)]
            ours, expected = attended(*(t.cuda() for t in given)), attended(*given)
            close = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
            for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
                same = torch.allclose(a.cpu(), b, rtol=close, atol=close)
                assert same, f"result {i} differs from the CPU's at {dtype}, {n, heads, queries, keys, head_dim}"

    def codes_of(precision: str, context: Any, vectors: Any, *block: Any) -> Any:
        stack = rqkernels.PackedTransformer([rqkernels.BlockWeights(*block)], 1, precision=precision)
        norm = {"norm_weight": block[0], "norm_bias": block[1]}
        decoder = rqkernels.PackedDepthDecoder(stack, vectors[:3], vectors, **norm, classifier_weight=vectors)
        return rqkernels.depth_decode(context, decoder, temperature=0.0, seed=0)

    def random(*sizes: int) -> Any:
        return torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5

    for rows, width, hidden, k in ((1, 5, 70, 40), (40, 33, 9, 131)):
        linears = ((3 * width, width), (width, width), (hidden, width), (width, hidden))
        qkv, out, mlp_in, mlp_out = ((random(*sizes), random(sizes[0])) for sizes in linears)
        norms = random(width), random(width), random(width), random(width)
        given = [5 * random(rows, width), 5 * random(k, width), *norms[:2], *qkv, *out, *norms[2:], *mlp_in, *mlp_out]
        for precision in ("fp32", "bf16", "int8"):
            ours, expected = codes_of(precision, *(t.cuda() for t in given)), codes_of(precision, *given)
            assert torch.equal(ours.cpu(), expected), f"codes of {precision} differ from the CPU's at {rows} rows"


def call_typical(device: str = "cuda") -> None:
    """Shapes of the benchmarks, one call each: for ncu."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from _shapes import SHAPES

    import rqkernels

    for case in SHAPES[:3]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(case.rows(torch.device(device)), case.channels, generator=generator).to(device)
        codebooks = case.codebooks(generator).to(device)
        found = rqkernels.residual_search(x, codebooks, case.depth, return_statistics=True)
        rqkernels.residual_decode(found.codes, codebooks, check=False).cpu()


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
    parser.add_argument("--calls", choices=["ragged", "typical"], help=argparse.SUPPRESS)
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
        {"ragged": call_ragged, "typical": call_typical}[args.calls]()
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
        records = run_steps(list(steps_on(scratch, environment, out, args.ncu)), args.budget - built)
    name = "-".join(torch.cuda.get_device_name().lower().split())
    summary = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "budget_seconds": args.budget,
        "build_seconds": round(built, 1),
        "steps": records,
    }
    (out / f"{name}-gpu-tests.json").write_text(json.dumps(summary, indent=1) + "\n")
    status = exit_status(records)
    print(f"gpu-check: {('passed', 'FAILED', 'INCOMPLETE')[status]}, results in {out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
