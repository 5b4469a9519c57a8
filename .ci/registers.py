"""Compiles every kernel for every shipped architecture and prints what ptxas says of it.

Fails where a kernel spills registers, has a stack frame, or needs more static shared memory than a launch may have.

    python .ci/registers.py [residual_search ...]
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
STATIC_SHARED_LIMIT = 48 * 1024


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int

    @property
    def trouble(self) -> str:
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > STATIC_SHARED_LIMIT:
            found.append(f"more than {STATIC_SHARED_LIMIT} bytes of shared memory")
        return ", ".join(found)


def kernels_in(report: str) -> list[Kernel]:
    """What `nvcc -Xptxas -v` wrote, one entry per kernel and architecture."""
    found = []
    for entry in report.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\S+)' for 'sm_(\w+)'", entry).groups()
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        stack, stores, loads = map(int, memory.groups())
        registers = int(re.search(r"Used (\d+) registers", entry).group(1))
        shared = re.search(r"(\d+) bytes smem", entry)
        found.append(
            Kernel(name, architecture, registers, stack, stores + loads, int(shared.group(1)) if shared else 0)
        )
    return found


def compile_self_test(nvcc: str) -> None:
    """The emulation's own kernels must be CUDA: nvcc takes them, and every instruction of common/ptx.cuh."""
    source = ROOT / "csrc" / "emulation" / "self_test.cpp"
    # No instruction of ptx.cuh is younger than sm_80.
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-arch=sm_80", "-x", "cu", "-w", "-c", source]
        done = subprocess.run([*command, "-o", Path(folder) / "self_test.o"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source.relative_to(ROOT)} is not what nvcc compiles:\n{done.stdout}{done.stderr}")


def compile_op(nvcc: str, source: Path) -> list[Kernel]:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}"]  # as CMakeLists.txt has it
        command = [nvcc, *flags, *targets, "-Xptxas=-v", "--threads=2"]
        done = subprocess.run([*command, "-c", source, "-o", Path(folder) / "kernel.o"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source.relative_to(ROOT)} does not compile:\n{done.stdout}{done.stderr}")
    kernels = kernels_in(done.stdout + done.stderr)
    if {k.architecture for k in kernels} != set(ARCHITECTURES):
        sys.exit(f"{source.relative_to(ROOT)}: ptxas did not report on all of sm_{ARCHITECTURES}:\n{done.stderr}")
    names = subprocess.run(["c++filt", "-p"], input="\n".join(k.name for k in kernels), capture_output=True, text=True)
    return [k._replace(name=n) for k, n in zip(kernels, names.stdout.splitlines(), strict=True)]


def main() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("registers: skipped, there is no nvcc")
        return
    ops = sys.argv[1:] or sorted(p.parent.name for p in (ROOT / "csrc" / "ops").glob("*/cuda.cu"))
    kernels = [k for op in ops for k in compile_op(nvcc, ROOT / "csrc" / "ops" / op / "cuda.cu")]
    width = max(len(k.name) for k in kernels)
    print(f"{'kernel':{width}}  {'arch':>7}  registers  static shared  stack  spills")
    for k in sorted(kernels, key=lambda k: (k.name, int(k.architecture))):
        architecture = f"sm_{k.architecture}"
        row = f"{k.name:{width}}  {architecture:>7}  {k.registers:9}  {k.shared:13}  {k.stack:5}  {k.spills:6}"
        print(f"{row}  <- {k.trouble}" if k.trouble else row)
    compile_self_test(nvcc)
    if any(k.trouble for k in kernels):
        sys.exit("registers: see the marked lines")


if __name__ == "__main__":
    main()
