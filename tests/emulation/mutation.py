"""Does without each barrier of each kernel (*.cuh) in turn, and expects the emulation's tests of that operator to fail.

A mutant that survives is either a barrier that no test needs (add a shape that does) or one that nothing needs
(take it out of the kernel). All mutants are compiled once, into one copy of the sources in which an environment
variable names the barrier that is passed over. Run by .ci/run; by hand, for one operator:

    python tests/emulation/mutation.py [residual_search ...]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __package__:
    from .build import ROOT, Unavailable, build
else:
    # As a script, this folder is on the path. tests/ must never be: its folders would hide rqkernels and rqgen.
    from build import ROOT, Unavailable, build

WORK = ROOT / "build" / "mutation"
# A call that yields a value leaves the thread's own share of it, so that only the meeting is gone.
SYNCHRONISATION = re.compile(
    r"(?<![\w:])(?:\w+::)*(?P<name>__syncthreads(?:_count|_and|_or)?|__syncwarp|cp_async_commit|cp_async_wait(?:<[^>]*>)?)\s*\("
)


# What operators share and no kernel of its own stands for: whose tests must catch the mutants.
SHARED = {"sample_logits": ("sample_row.cuh",)}
BUILDS = ("race", "plain", "asan")


# Read once, when the module or the executable is loaded; 0 is none.
CHOICE = "RQK_MUTANT"
CHOSEN = f"""
#include <cstdlib>
namespace rqk {{
inline const int chosen_mutant = [] {{
  const char* number = std::getenv("{CHOICE}");
  return number == nullptr ? 0 : std::atoi(number);
}}();
}}
"""


class Mutant(NamedTuple):
    op: str
    file: Path  # from csrc on
    line: int
    barrier: str


def mutated(source: str, first: int) -> tuple[str, list[tuple[int, str]]]:
    """The source with each barrier left out where it is the chosen mutant (numbered from `first` on), and each
    barrier's line and text."""
    code = re.sub(r"//[^\n]*", lambda comment: " " * len(comment.group()), source)
    parts, barriers, done = [], [], 0
    for found in SYNCHRONISATION.finditer(code):
        end, open_brackets = found.end(), 1
        while open_brackets:
            open_brackets += {"(": 1, ")": -1}.get(code[end], 0)
            end += 1
        argument = code[found.end() : end - 1].strip()
        own = f"int(({argument}) != 0)" if found["name"].startswith("__syncthreads_") else "static_cast<void>(0)"
        barrier = source[found.start() : end]
        choice = f"(::rqk::chosen_mutant == {first + len(barriers)} ? {own} : {barrier})"
        parts += [source[done : found.start()], choice]
        barriers.append((source.count("\n", 0, found.start()) + 1, barrier))
        done = end
    return "".join([*parts, source[done:]]), barriers


def make_mutants(ops: Sequence[str], target: Path) -> list[Mutant]:
    """Copies csrc to `target`, with all mutants of these operators in it. Mutant n of the list is number n + 1."""
    csrc = ROOT / "csrc"
    shutil.rmtree(target, ignore_errors=True)
    # With new times: by the originals', older than what an earlier run left, a change back would stay unbuilt.
    shutil.copytree(csrc, target, copy_function=shutil.copyfile)
    with (target / "common" / "device.h").open("a") as file:
        file.write(CHOSEN)
    found: list[Mutant] = []
    for op in ops:
        files = sorted((csrc / "ops" / op).glob("*.cuh")) + [csrc / "shared" / name for name in SHARED.get(op, ())]
        for path in files:
            file = path.relative_to(csrc)
            text, barriers = mutated(path.read_text(), len(found) + 1)
            (target / file).write_text(text)
            found += [Mutant(op, file, line, barrier) for line, barrier in barriers]
    return found


def caught_by(op: str, number: int, builds: Path) -> str | None:
    """The build whose tests of `op` fail with this mutant, the likeliest first; None where all pass."""
    for name in BUILDS:
        command = [sys.executable, "-m", "pytest", ROOT / "tests" / "emulation" / f"test_{op}.py", "-x", "-q"]
        environment = os.environ | {"RQK_EMULATION_FOLDER": str(builds), CHOICE: str(number)}
        done = subprocess.run(
            [*command, "-k", name, "-p", "no:cacheprovider"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode == 1:
            return name
        if done.returncode != 0:
            raise RuntimeError(f"the tests of {op} do not run:\n{done.stdout}{done.stderr}")
    return None


def main() -> int:
    ops = sys.argv[1:] or sorted(path.parent.name for path in (ROOT / "csrc" / "ops").glob("*/kernel.cuh"))
    source = WORK / "source"
    mutants = make_mutants(ops, source / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    builds = build(source, WORK / "build", quiet=True)

    def attempt(op: str, number: int) -> tuple[str | None, float]:
        start = time.monotonic()
        return caught_by(op, number, builds), time.monotonic() - start

    survivors = 0
    # The tests of the emulation run on one core each.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wanted = sorted({mutant.op for mutant in mutants})
        for op, (name, _) in zip(wanted, pool.map(lambda op: attempt(op, 0), wanted), strict=True):
            if name is not None:
                sys.exit(f"mutation: the tests of {op} fail in the {name} build with every barrier in its place")
        numbers = range(1, len(mutants) + 1)
        tried = pool.map(lambda number: attempt(mutants[number - 1].op, number), numbers)
        for mutant, (name, seconds) in zip(mutants, tried, strict=True):
            survivors += name is None
            verdict = "SURVIVES" if name is None else f"caught by {name}"
            where = f"{mutant.op}: {mutant.file}:{mutant.line}"
            print(f"mutation: {where}: {mutant.barrier}: {verdict} ({seconds:.0f} s)", flush=True)
    print(f"mutation: {len(mutants) - survivors} of {len(mutants)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Unavailable, RuntimeError) as reason:
        sys.exit(f"mutation: {reason}")
