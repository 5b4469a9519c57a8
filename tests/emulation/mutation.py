"""Deletes each barrier of each kernel (*.cuh) in turn, and expects the emulation's tests of that operator to fail.

A mutant that survives is either a barrier that no test needs (add a shape that does) or one that nothing needs
(take it out of the kernel). Run by .ci/run; by hand, for one operator:

    python tests/emulation/mutation.py [residual_search ...]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
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
TARGETS = {"race": "rqk_emulation_race", "plain": "rqk_emulation", "asan": "rqk_emulation_asan"}


class Mutant(NamedTuple):
    line: int
    deleted: str
    text: str  # of the whole file


def mutants(source: str) -> Iterator[Mutant]:
    code = re.sub(r"//[^\n]*", lambda comment: " " * len(comment.group()), source)
    for found in SYNCHRONISATION.finditer(code):
        end, open_brackets = found.end(), 1
        while open_brackets:
            open_brackets += {"(": 1, ")": -1}.get(code[end], 0)
            end += 1
        argument = code[found.end() : end - 1].strip()
        own = f"int(({argument}) != 0)" if found["name"].startswith("__syncthreads_") else "static_cast<void>(0)"
        line = source.count("\n", 0, found.start()) + 1
        yield Mutant(line, source[found.start() : end], source[: found.start()] + own + source[end:])


def caught_by(slug: str, source: Path) -> str | None:
    """The build of `source` whose tests fail, the likeliest first; None where all pass."""
    for name, target in TARGETS.items():
        folder = build(source, WORK / "build", target=target, quiet=True)
        command = [sys.executable, "-m", "pytest", ROOT / "tests" / "emulation" / f"test_{slug}.py", "-x", "-q"]
        environment = os.environ | {"RQK_EMULATION_FOLDER": str(folder)}
        done = subprocess.run(
            [*command, "-k", name, "-p", "no:cacheprovider"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode == 1:
            return name
        if done.returncode != 0:
            sys.exit(f"the tests of {slug} do not run:\n{done.stdout}{done.stderr}")
    return None


def main() -> int:
    source = WORK / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    shutil.copy(ROOT / "CMakeLists.txt", source)
    # With new times: by the sources' own, older than what a broken-off run left, its last mutant would stay built.
    shutil.copytree(ROOT / "csrc", source / "csrc", copy_function=shutil.copyfile)
    slugs = sys.argv[1:] or sorted(p.parent.name for p in (source / "csrc" / "ops").glob("*/kernel.cuh"))
    survivors = total = 0
    for slug in slugs:
        files = sorted((source / "csrc" / "ops" / slug).glob("*.cuh"))
        files += [source / "csrc" / "common" / name for name in SHARED.get(slug, ())]
        found = [(file, mutant) for file in files for mutant in mutants(file.read_text())]
        total += len(found)
        if not found:
            print(f"mutation: {slug}: nothing synchronises")
            continue
        name = caught_by(slug, source)
        if name is not None:
            sys.exit(f"mutation: the tests of {slug} fail in the {name} build before anything is deleted")
        for file, mutant in found:
            start = time.monotonic()
            original = file.read_text()
            file.write_text(mutant.text)
            name = caught_by(slug, source)
            file.write_text(original)
            survivors += name is None
            verdict = "SURVIVES" if name is None else f"caught by {name}"
            seconds = time.monotonic() - start
            where = f"{slug}/{file.name}:{mutant.line}"
            print(f"mutation: {where}: {mutant.deleted}: {verdict} ({seconds:.0f} s)", flush=True)
    print(f"mutation: {total - survivors} of {total} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Unavailable as reason:
        sys.exit(f"mutation: {reason}")
