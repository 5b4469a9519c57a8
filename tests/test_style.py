"""Tests of docs/style.md: first words of docstrings and of the comments that head C++ files and functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REFUSED = ("What", "How", "Which", "Whether", "Where", "Of")
# Folders and files that keep the rule. The goal is all of them ("csrc", "python", "tests"): add one when it is clean.
CHECKED = (
    *("rqkernels", "benchmarks", "docs", "examples", "tests/test_docs.py", "tests/test_readme.py"),
    *(f"python/rqgen/{name}" for name in ("cli", "systems")),
)


SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")


def files_of(names: tuple[str, ...]) -> list[Path]:
    found = []
    for path in (ROOT / name for name in names):
        found += sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else [path]
    return found


def is_refused(text: str) -> bool:
    return (re.match(r"[\s`*]*(\w+)", text) or ["", ""])[1] in REFUSED


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring, those below assignments included."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for before, statement in zip([None, *body], body, strict=False):
            value = statement.value if isinstance(statement, ast.Expr) else None
            if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
                continue
            is_head = before is None and isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            )
            if is_head or isinstance(before, (ast.Assign, ast.AnnAssign)):
                yield statement.lineno, value.value


def heads(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every C++ comment that stands alone at the top of a file, or before a declaration.

    A declaration is an unindented line; a run of // lines or a block comment right before it is its head.
    """
    lines = source.splitlines()
    start = None
    for number, line in enumerate([*lines, ""], 1):
        is_comment = line.startswith(("//", "/*", " *"))
        if is_comment and start is None:
            start = number
        elif not is_comment and start is not None:
            marks = re.compile(r"^\s*(//+|/\*+|\*+/?)\s*", re.MULTILINE)
            yield start, marks.sub("", "\n".join(lines[start - 1 : number - 1])).strip()
            start = None


def violations(paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        source = path.read_text()
        parsed = docstrings(source) if path.suffix == ".py" else heads(source)
        found += [
            f"{path}:{line}: {text.strip().splitlines()[0]}"
            for line, text in parsed
            if text.strip() and is_refused(text)
        ]
    return found


def test_docstrings_and_heads_open_with_a_verb_or_a_noun() -> None:
    paths = files_of(CHECKED)
    assert len(paths) > 40
    assert violations(paths) == []


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""What it is."""\n', 1),
        ('def f():\n    """Whether it holds."""\n', 2),
        ('class A:\n    """A class."""\n\n    x: int\n    """Of each level."""\n', 5),
        ('async def f():\n    """\n    How it works.\n    """\n', 2),
        ('def f():\n    """`Which` one."""\n', 2),
    ],
)
def test_a_refused_docstring_is_found(tmp_path: Path, source: str, line: int) -> None:
    path = tmp_path / "a.py"
    path.write_text(source)
    (violation,) = violations([path])
    assert violation.startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    "source",
    ['"""Whatever fits."""\n', 'x = 1\n"""Often used."""\n', 'def f():\n    x()\n    "What is no docstring"\n', ""],
)
def test_other_strings_pass(tmp_path: Path, source: str) -> None:
    path = tmp_path / "a.py"
    path.write_text(source)
    assert violations([path]) == []


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("// What a kernel needs.\n// More.\n#pragma once\n", 1),
        ("int x;\n\n/* How it is done. */\nvoid f();\n", 3),
        ("/**\n * Of two numbers.\n */\nint g();\n", 1),
        ("void f() {\n  // What is inside passes.\n}\n", None),
        ("int f();  // Whether it is behind passes.\n", None),
    ],
)
def test_a_refused_head_is_found(tmp_path: Path, source: str, line: int | None) -> None:
    path = tmp_path / "a.h"
    path.write_text(source)
    assert [v.startswith(f"{path}:{line}: ") for v in violations([path])] == ([True] if line else [])
