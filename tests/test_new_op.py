"""`make new-op` writes an operator that has all that one must have. (.ci/run also builds one and runs its tests.)"""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "new_op.py"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


new_op, layering = load(SCRIPT), load(ROOT / "tests" / "test_layering.py")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources that say what an operator is, in a copy."""
    for name in ("csrc", "rqkernels", "tests", "benchmarks", "python"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    return tmp_path


def contents(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


@pytest.mark.parametrize("name", ["aa", "row_norms2", "zz_top", "x" * new_op.MOST_CHARACTERS])
def test_a_new_operator_has_all_that_one_must_have(tree: Path, name: str) -> None:
    before = contents(tree)
    new, changed = new_op.write(name, tree)
    after = contents(tree)
    assert {path for path, text in after.items() if text is not None and path not in before} == set(new)
    assert {path for path in before if after[path] != before[path]} == set(changed)
    assert {path.format(op=name) for path in layering.FILES_OF_AN_OP} <= set(new)
    for rule in layering.RULES:
        assert rule(tree) == []
    for path in new:
        text = (tree / path).read_text()
        assert "my_op" not in text and "MyOp" not in text
        assert name in text
        if path.endswith(".py"):
            compile(text, path, "exec")
    assert any(f"TODO({name})" in (tree / path).read_text() for path in new)


@pytest.mark.parametrize("name", ["aa", "row_norms2", "zz_top"])
def test_names_stay_in_order(tree: Path, name: str) -> None:
    new_op.write(name, tree)
    for file, prefix in (("rqkernels/__init__.py", "ops."), ("rqkernels/reference/__init__.py", "")):
        module = ast.parse((tree / file).read_text())
        imports = [n.module for n in ast.walk(module) if isinstance(n, ast.ImportFrom) and n.level == 1]
        ours = [module for module in imports if module and module.rpartition(".")[0] == prefix.rstrip(".")]
        ours = ours if prefix else [module for module in ours if not module.startswith("_")]
        assert ours == sorted(ours) and f"{prefix}{name}" in ours
        (text,) = [n.value for n in module.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        functions = [n for n in ast.literal_eval(text) if n.islower()]
        assert functions == sorted(functions) and name in functions


def test_two_operators_one_after_the_other(tree: Path) -> None:
    new_op.write("second_op", tree)
    new_op.write("first_op", tree)
    assert [rule(tree) for rule in layering.RULES] == [[]] * len(layering.RULES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "NAME: expected small letters, digits and single underscores, like my_op; got ''"),
        ("Row_norms", "NAME: expected small letters"),
        ("row-norms", "NAME: expected small letters"),
        ("row__norms", "NAME: expected small letters"),
        ("_norms", "NAME: expected small letters"),
        ("norms_", "NAME: expected small letters"),
        ("2norms", "NAME: expected small letters"),
        ("../norms", "NAME: expected small letters"),
        ("norms\n", "NAME: expected small letters"),
        ("x" * (new_op.MOST_CHARACTERS + 1), "NAME: expected at most 32 characters, got 33"),
        ("my_op", "NAME: expected the name of your operator, got the example my_op"),
        ("lambda", "NAME: expected no keyword of Python or C++, got lambda"),
        ("match", "NAME: expected no keyword of Python or C++, got match"),
        ("double", "NAME: expected no keyword of Python or C++, got double"),
        ("residual_search", "NAME: expected a new name, got residual_search, which rqkernels/__init__.py has"),
        ("transformer_step", "NAME: expected a new name, got transformer_step, which rqkernels/__init__.py has"),
        ("philox_uniform", "got philox_uniform, which rqkernels/reference/__init__.py has"),
        ("soft_label", "benchmarks/bench_soft_label.py is there already"),
        ("launch", "NAME: expected a name that is free in C++, got launch, which launch.cuh uses"),
        ("factor", "NAME: expected a name that is free in C++, got factor, which"),
    ],
)
def test_what_cannot_be_an_operator_is_refused(tree: Path, name: str, message: str) -> None:
    before = contents(tree)
    run = subprocess.run([sys.executable, SCRIPT, name, "--root", tree], capture_output=True, text=True)
    assert run.returncode == 1 and not run.stdout
    assert run.stderr.startswith("new-op: ") and message in run.stderr and "Traceback" not in run.stderr
    assert contents(tree) == before


def test_a_file_that_is_there_is_not_overwritten(tree: Path) -> None:
    (tree / "benchmarks" / "bench_row_norms.py").write_text("mine")
    before = contents(tree)
    with pytest.raises(new_op.Refusal, match=r"^benchmarks/bench_row_norms\.py is there already$"):
        new_op.write("row_norms", tree)
    assert contents(tree) == before


def test_what_cannot_be_written_whole_is_not_begun(tree: Path) -> None:
    shutil.rmtree(tree / "tests" / "emulation")
    (tree / "tests" / "emulation").write_text("a file where a folder must be")
    before = contents(tree)
    with pytest.raises(OSError):
        new_op.write("row_norms", tree)
    assert contents(tree) == before


def test_the_command_says_what_it_wrote_and_what_comes_next(tree: Path) -> None:
    run = subprocess.run([sys.executable, SCRIPT, "row_norms", "--root", tree], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for path in new_op.new_files("row_norms"):
        assert f"  new      {path}\n" in run.stdout
    assert "  changed  rqkernels/__init__.py\n" in run.stdout
    assert 'make test ARGS="-k row_norms"' in run.stdout and "TODO(row_norms)" in run.stdout
