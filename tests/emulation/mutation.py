"""Deletes each barrier of each kernel (*.cuh) in turn, and expects the emulation's tests of that operator to fail.

A mutant that survives is either a barrier that no test needs (add a shape that does) or one that nothing needs
(take it out of the kernel). Run by .ci/run; by hand, for one operator:

    python tests/emulation/mutation.py [residual_search ...]
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
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


class Workshop:
    """A copy of the sources with builds of its own, in which one mutant at a time is tried."""

    def __init__(self, folder: Path) -> None:
        self.source, self.builds = folder / "source", folder / "build"
        shutil.rmtree(self.source, ignore_errors=True)
        self.source.mkdir(parents=True)
        shutil.copy(ROOT / "CMakeLists.txt", self.source)
        # With new times: by the originals', older than what a broken-off run left, its last mutant would stay built.
        shutil.copytree(ROOT / "csrc", self.source / "csrc", copy_function=shutil.copyfile)

    def caught_by(self, slug: str, file: Path | None = None, mutant: Mutant | None = None) -> str | None:
        """The build whose tests of `slug` fail with the mutant in place of `file` (from csrc on), the likeliest build
        first; None where all pass."""
        if file is None or mutant is None:
            return self._failing(slug)
        path = self.source / "csrc" / file
        original = path.read_text()
        path.write_text(mutant.text)
        try:
            return self._failing(slug)
        finally:
            path.write_text(original)

    def _failing(self, slug: str) -> str | None:
        for name, target in TARGETS.items():
            folder = build(self.source, self.builds, target=target, quiet=True)
            command = [sys.executable, "-m", "pytest", ROOT / "tests" / "emulation" / f"test_{slug}.py", "-x", "-q"]
            environment = os.environ | {"RQK_EMULATION_FOLDER": str(folder)}
            done = subprocess.run(
                [*command, "-k", name, "-p", "no:cacheprovider"],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode == 1:
                return name
            if done.returncode != 0:
                raise RuntimeError(f"the tests of {slug} do not run:\n{done.stdout}{done.stderr}")
        return None


def main() -> int:
    csrc = ROOT / "csrc"
    slugs = sys.argv[1:] or sorted(p.parent.name for p in (csrc / "ops").glob("*/kernel.cuh"))
    found: list[tuple[str, Path, Mutant]] = []
    for slug in slugs:
        files = sorted((csrc / "ops" / slug).glob("*.cuh")) + [csrc / "common" / name for name in SHARED.get(slug, ())]
        found += [(slug, file.relative_to(csrc), mutant) for file in files for mutant in mutants(file.read_text())]
    # One core each: compilers and tests are what takes the time.
    workers = os.cpu_count() or 1
    shops: queue.Queue[Workshop] = queue.Queue()
    for number in range(workers):
        shops.put(Workshop(WORK / str(number)))

    def attempt(slug: str, file: Path | None = None, mutant: Mutant | None = None) -> tuple[str | None, float]:
        shop, start = shops.get(), time.monotonic()
        try:
            return shop.caught_by(slug, file, mutant), time.monotonic() - start
        finally:
            shops.put(shop)

    with ThreadPoolExecutor(workers) as pool:
        wanted = sorted({slug for slug, _, _ in found})
        for slug, (name, _) in zip(wanted, pool.map(attempt, wanted), strict=True):
            if name is not None:
                sys.exit(f"mutation: the tests of {slug} fail in the {name} build before anything is deleted")
        survivors = 0
        for (slug, file, mutant), (name, seconds) in zip(
            found, pool.map(lambda one: attempt(*one), found), strict=True
        ):
            survivors += name is None
            verdict = "SURVIVES" if name is None else f"caught by {name}"
            where = f"{slug}: {file}:{mutant.line}"
            print(f"mutation: {where}: {mutant.deleted}: {verdict} ({seconds:.0f} s)", flush=True)
    print(f"mutation: {len(found) - survivors} of {len(found)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Unavailable, RuntimeError) as reason:
        sys.exit(f"mutation: {reason}")
