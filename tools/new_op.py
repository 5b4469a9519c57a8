"""Writes the files of a new operator: `make new-op NAME=my_op`.

They are those of tools/op_template, a small operator that works (`y = factor * x`), with the new name put in: kernels
and checks, reference, public function with its gradient, emulation case, tests, calls, benchmark. What comes out
builds and passes its tests; the places to fill in are marked TODO(name).
"""

from __future__ import annotations

import argparse
import ast
import keyword
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).resolve().parent / "op_template"
TOY = "my_op"
MOST_CHARACTERS = 32
# Python's own words are asked of `keyword`.
CPP_KEYWORDS = set(
    re.findall(
        r"\w+",
        """alignas alignof and_eq asm auto bitand bitor bool case catch char class compl concept const consteval
        constexpr constinit decltype default delete do double enum explicit export extern false float friend goto inline
        int long mutable namespace new noexcept not_eq nullptr operator or_eq private protected public register requires
        short signed sizeof static struct switch template this throw true typedef typeid typename union unsigned using
        virtual void volatile xor xor_eq""",
    )
)


class Refusal(Exception):
    """No operator can be written by this name; the message says why."""


# --- the name --------------------------------------------------------------------------------------------


def words_of_code(path: Path) -> set[str]:
    """Identifiers of a source file, without its comments and strings."""
    text = re.sub(r'//[^\n]*|#[^\n]*|"[^"\n]*"', " ", path.read_text())
    return set(re.findall(r"[A-Za-z_]\w*", text))


def check_name(name: str, root: Path = ROOT) -> None:
    """Refusal unless this can be the name of an operator that is not there yet, in Python and C++."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise Refusal(f"NAME: expected small letters, digits and single underscores, like my_op; got {name!r}")
    if len(name) > MOST_CHARACTERS:
        raise Refusal(f"NAME: expected at most {MOST_CHARACTERS} characters, got {len(name)}: {name}")
    if name == TOY:
        raise Refusal(f"NAME: expected the name of your operator, got the example {name}")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name in CPP_KEYWORDS:
        raise Refusal(f"NAME: expected no keyword of Python or C++, got {name}")
    for file in ("rqkernels/__init__.py", "rqkernels/reference/__init__.py"):
        if name in names_in(root / file):
            raise Refusal(f"NAME: expected a new name, got {name}, which {file} has")
    taken = [*sorted((root / "csrc" / "common").iterdir()), *sorted(TEMPLATE.rglob("*.[ch]*"))]
    for path in taken:
        if name in words_of_code(path):
            raise Refusal(f"NAME: expected a name that is free in C++, got {name}, which {path.name} uses")


def camel(name: str) -> str:
    """my_op as MyOp."""
    return "".join(part.capitalize() for part in name.split("_"))


# --- files -----------------------------------------------------------------------------------------------


def put_in(name: str, text: str) -> str:
    """A text or path of the template, for this name."""
    return text.replace(TOY, name).replace(camel(TOY), camel(name))


def new_files(name: str) -> dict[str, str]:
    """Text of each new file, by its path in the repository."""
    files = sorted(path for path in TEMPLATE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {put_in(name, path.relative_to(TEMPLATE).as_posix()): put_in(name, path.read_text()) for path in files}


# --- lines in the packages' __init__.py ------------------------------------------------------------------


def names_in(path: Path) -> set[str]:
    """Names that a package's __init__.py imports or lists."""
    tree = ast.parse(path.read_text())
    imported = {
        alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names
    }
    return imported | {element.value for element in _listed(tree)}


def _listed(tree: ast.Module) -> list[ast.Constant]:
    """The strings of __all__."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [e for e in node.value.elts if isinstance(e, ast.Constant)]  # type: ignore[attr-defined]
    raise Refusal("an __init__.py has no __all__")


def with_name(text: str, module: str, name: str) -> str:
    """The text of an __init__.py that also imports `name` from .`module`, and lists it in __all__; in order."""
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    prefix = module.rpartition(".")[0]
    found = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module]
    imports = sorted((n for n in found if n.module.rpartition(".")[0] == prefix), key=lambda n: n.lineno)
    listed = [element for element in _listed(tree) if element.value.islower()]  # behind constants and classes
    if not imports or not listed:
        raise Refusal(f"an __init__.py imports nothing from .{prefix}, or lists no function")
    # From the end, so that line numbers stay right.
    at = next((e.lineno - 1 for e in listed if e.value > name), listed[-1].end_lineno)
    lines.insert(at, f'{" " * listed[0].col_offset}"{name}",\n')
    at = next((n.lineno - 1 for n in imports if n.module > module), imports[-1].end_lineno)
    lines.insert(at, f"{' ' * imports[0].col_offset}from .{module} import {name}\n")
    return "".join(lines)


# --- the whole -------------------------------------------------------------------------------------------


def write(name: str, root: Path = ROOT) -> tuple[list[str], list[str]]:
    """Writes the operator `name` into the repository at `root`. Returns the files that are new, and those changed.

    Raises:
        Refusal: the name cannot be one, or a file is there already; nothing is written.
    """
    check_name(name, root)
    files = new_files(name)
    for path in files:
        if (root / path).exists():
            raise Refusal(f"{path} is there already")
    changed = {
        path: with_name((root / path).read_text(), module, name)
        for path, module in (
            ("rqkernels/__init__.py", f"ops.{name}"),
            ("rqkernels/reference/__init__.py", name),
        )
    }
    partial = {f"{path}.partial": text for path, text in changed.items()}
    begun: list[Path] = []
    try:
        for path, text in {**files, **partial}.items():
            file = root / path
            if not file.parent.exists():
                file.parent.mkdir()
                begun.append(file.parent)
            begun.append(file)
            file.write_text(text)
    except OSError:
        for path_begun in reversed(begun):
            if path_begun.is_dir():
                path_begun.rmdir()
            elif path_begun.exists():
                path_begun.unlink()
        raise
    for path in changed:
        os.replace(root / f"{path}.partial", root / path)
    return list(files), list(changed)


def format_files(files: list[Path]) -> str | None:
    """Lets ruff and clang-format lay out the files: a long name breaks lines that a short one does not. Returns which
    of the tools is missing."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = []
    for tool, arguments, suffixes in (
        ("ruff", ["format", "--quiet"], {".py"}),
        ("clang-format", ["-i"], {".h", ".cpp", ".cu", ".cuh"}),
    ):
        found = shutil.which(tool, path=path)
        if found is None:
            missing.append(tool)
        else:
            subprocess.run([found, *arguments, *(file for file in files if file.suffix in suffixes)], check=True)
    return " and ".join(missing) or None


NEXT = """
Next:
  make test ARGS="-k {name}"        builds it; its tests pass as they are, for y = factor * x
  grep -rn "TODO({name})" csrc rqkernels tests benchmarks
                                    the places to fill in; the reference first: it defines what is right
  CHANGELOG.md                      a line
CONTRIBUTING.md, "Adding an operator", says what belongs where."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the files of a new operator.")
    parser.add_argument("name", help="such as my_op: small letters, digits and underscores")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        new, changed = write(args.name, args.root)
    except (Refusal, OSError) as error:
        print(f"new-op: {error}", file=sys.stderr)
        return 1
    missing = format_files([args.root / path for path in new])
    print(f"new-op: {args.name}")
    for path in new:
        print(f"  new      {path}")
    for path in changed:
        print(f"  changed  {path}")
    if missing is not None:
        print(f"Not laid out, for want of {missing}: run `make format`.")
    print(NEXT.format(name=args.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
