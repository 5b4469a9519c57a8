"""Citations of error bounds: the numbers in csrc and the sections of docs/bounds.md name one another."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".h", ".cpp", ".cu", ".cuh")


def sections(text: str) -> list[str]:
    """The numbers of the sections, in order: "B1", "B2", ..."""
    return re.findall(r"^## (B\d+)\. ", text, re.MULTILINE)


def users(text: str) -> dict[str, list[str]]:
    """Files of each row of the table; a bare name lies next to the file before it."""
    table = {}
    for number, cell in re.findall(r"^\| (B\d+) \| .* \| (.*) \|$", text, re.MULTILINE):
        files: list[str] = []
        for name in re.findall(r"`([^`]+)`", cell):
            files.append(name if "/" in name else f"{files[-1].rsplit('/', 1)[0]}/{name}")
        table[number] = files
    return table


def cited(text: str) -> set[str]:
    """The bounds that comments of a source file cite."""
    comments = "\n".join(re.findall(r"//(.*)", text))
    return set(re.findall(r"\bB\d{1,2}\b", comments))


def broken(root: Path) -> list[str]:
    text = (root / "docs" / "bounds.md").read_text()
    numbers, table, csrc = sections(text), users(text), root / "csrc"
    found = [] if numbers == [f"B{i + 1}" for i in range(len(numbers))] else [f"sections are not in order: {numbers}"]
    found += [f"the table and the sections differ: {n}" for n in sorted(set(numbers) ^ table.keys())]
    for number, files in table.items():
        for name in files:
            if not (csrc / name).is_file():
                found.append(f"{number}: csrc/{name} does not exist")
            elif number not in cited((csrc / name).read_text()):
                found.append(f"{number}: csrc/{name} does not cite it")
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in SUFFIXES):
        for number in sorted(cited(path.read_text()) - set(numbers)):
            found.append(f"{path.relative_to(root).as_posix()} cites {number}, which docs/bounds.md does not have")
    return found


def test_citations_and_sections_agree() -> None:
    assert broken(ROOT) == []


def test_broken_citations_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "docs" / "bounds.md").write_text(
        "| B1 | sums | `ops/a.h` |\n| B2 | scan | `ops/b.h`, `c.h` |\n\n## B1. Sums\n\n## B3. Other\n"
    )
    (tmp_path / "csrc" / "ops").mkdir()
    (tmp_path / "csrc" / "ops" / "a.h").write_text("// Bound B1.\n")
    (tmp_path / "csrc" / "ops" / "c.h").write_text("int B2;  // Bound B9\n")
    assert broken(tmp_path) == [
        "sections are not in order: ['B1', 'B3']",
        "the table and the sections differ: B2",
        "the table and the sections differ: B3",
        "B2: csrc/ops/b.h does not exist",
        "B2: csrc/ops/c.h does not cite it",
        "csrc/ops/c.h cites B9, which docs/bounds.md does not have",
    ]
