"""What needs a card: the tests marked gpu, then the benchmarks on it. Results as JSON in one folder.

    python benchmarks/gpu_check.py [--out DIR]

Uses this Python as it is (torch, pytest and numpy must be there), reads the repository and writes only into
DIR. Where the repository holds no compiled libraries they are built in a temporary copy (cmake, ninja, nvcc).

Exit status: 0 all well; 1 a test or a benchmark failed; 2 something that is needed is missing; 3 no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = sorted((ROOT / "benchmarks").glob("bench_*.py"))
# What the models' tests import beyond torch; without all of it only the kernels are tested.
MODEL_PACKAGES = ("accelerate", "omegaconf", "rich", "safetensors", "sklearn", "typer", "yaml")


class Missing(Exception):
    """Something that this script will not fetch by itself."""


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


def run_tests(environment: dict[str, str], scratch: Path) -> dict[str, object]:
    """The tests marked gpu, their outcome by name."""
    without = [name for name in MODEL_PACKAGES if importlib.util.find_spec(name) is None]
    folders = ["tests/rqkernels", *([] if without else ["tests/rqgen"])]
    report = scratch / "gpu-tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, *(ROOT / name for name in folders)]
    # Not from the repository's root: its own rqkernels, perhaps without libraries, would be found first.
    status = subprocess.run(command, cwd=scratch, env=environment).returncode
    cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    outcomes = {
        f"{case.get('classname')}::{case.get('name')}": case[0].tag if len(case) else "passed" for case in cases
    }
    return {"status": status, "folders": folders, "packages_missing": without, "outcomes": outcomes}


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests and benchmarks that need a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    args = parser.parse_args()
    try:
        import pytest  # noqa: F401
        import torch
    except ImportError as error:
        print(f"gpu-check: {sys.executable} has no {error.name}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"gpu-check: no GPU: torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 3
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
        tests = run_tests(environment, scratch)
        failed = [
            path.stem
            for path in BENCHMARKS
            if subprocess.run(
                [sys.executable, path, "--device", "cuda", "--out", out], cwd=scratch, env=environment
            ).returncode
        ]
    name = "-".join(torch.cuda.get_device_name().lower().split())
    summary = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tests": tests,
        "benchmarks_failed": failed,
    }
    (out / f"{name}-gpu-tests.json").write_text(json.dumps(summary, indent=1) + "\n")
    ok = tests["status"] == 0 and not failed
    print(f"gpu-check: {'passed' if ok else 'FAILED'}, results in {out}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
