"""Tests of the order of imports and includes, and that every operator has all its files.

    cli -> bench -> systems -> {training, sampling, evaluation, report, integrations} -> {inference, losses, convert}
        -> {models, data} -> quantizers -> rqkernels -> the compiled library

Each rule is a function of a folder that returns what breaks it, so that the same function is tried on this
repository (nothing may come back) and on small trees that break it in one way each (exactly that must).
"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPS = (
    "residual_search",
    "residual_decode",
    "code_statistics",
    "stochastic_residual_search",
    "soft_label",
    "sample_logits",
    "depth_attention",
    "depth_decode",
)

# A room may import rooms of a lower floor, never its own floor's or a higher one's.
FLOORS = (
    ("quantizers",),
    ("models", "data"),
    ("inference", "losses", "convert"),
    ("training", "sampling", "evaluation", "report", "integrations"),
    ("systems",),
    ("bench",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Modules below every room: each may import them, they import none, not one another.
BENEATH = ("checks", "config", "files", "installed", "options", "reading")
FACADE = ("__init__", "__main__")  # the package's own doors, above every room

FILES_OF_AN_OP = (
    "csrc/ops/{op}/params.h",
    "csrc/ops/{op}/op.cpp",
    "csrc/ops/{op}/cpu.cpp",
    "csrc/ops/{op}/cpu_simd.cpp",
    "csrc/ops/{op}/kernel_table.h",
    "csrc/ops/{op}/kernel.cuh",
    "csrc/ops/{op}/cuda.cu",
    "csrc/emulation/ops/{op}.cpp",
    "rqkernels/ops/{op}.py",
    "rqkernels/reference/{op}.py",
    "tests/support/op_calls/{op}.py",
    "tests/rqkernels/test_{op}.py",
    "tests/emulation/test_{op}.py",
    "benchmarks/bench_{op}.py",
)


# --- reading sources -------------------------------------------------------------------------------------


class Import(NamedTuple):
    """One imported name, absolute: `from ..models import rqvae` in rqgen.sampling is rqgen.models.rqvae."""

    module: str
    line: int


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports_of(path: Path, package_root: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions, under TYPE_CHECKING and by import_module included."""
    package = list(path.relative_to(package_root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            for alias in node.names:
                yield Import(".".join([*base, alias.name]), node.lineno)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            module = node.args[0].value
            if name in ("import_module", "__import__") and isinstance(module, str):
                absolute = module.lstrip(".")
                level = len(module) - len(absolute)
                base = package[: len(package) - level + 1] if level else []
                yield Import(".".join([*base, absolute]), node.lineno)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def where(path: Path, root: Path, line: int) -> str:
    return f"{path.relative_to(root).as_posix()}:{line}"


# --- the rules -------------------------------------------------------------------------------------------


def room_violations(root: Path) -> list[str]:
    """Rooms of rqgen: no import back or sideways, no folder that is no room, no torch.ops."""
    found = []
    source = root / "python"
    for path in python_files(source / "rqgen"):
        here = path.relative_to(source / "rqgen").with_suffix("").parts[0]
        if here not in (*FLOOR_OF, *BENEATH, *FACADE):
            found.append(f"{path.relative_to(root).as_posix()}: {here} is no room of rqgen")
            continue
        floor = len(FLOORS) if here in FACADE else FLOOR_OF.get(here, -1)
        for imported in imports_of(path, source):
            at = where(path, root, imported.line)
            if is_within(imported.module, "torch.ops"):
                found.append(f"{at}: rqgen touches torch.ops")
            if not is_within(imported.module, "rqgen") or floor == len(FLOORS):
                continue
            there = imported.module.split(".")[1] if "." in imported.module else "__init__"
            if there in (here, "__version__") or (there in BENEATH and here not in BENEATH):
                continue
            if there in BENEATH:
                found.append(f"{at}: {here} imports {there}")
            elif there not in FLOOR_OF:
                # `import rqgen` or a name of its __init__: the facade stands above every room but the cli.
                if here != "cli":
                    found.append(f"{at}: {here} imports {imported.module} from the facade")
            elif FLOOR_OF[there] >= floor:
                found.append(f"{at}: {here} imports {there}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops":
                found.append(f"{where(path, root, node.lineno)}: rqgen touches torch.ops")
    return found


# The systems' own classes. Others ask a model's interface, or a registry by class (functools.singledispatch).
MODEL_CLASSES = {
    *("RQVAE", "RQTransformer", "MultiScaleVQVAE", "VAR"),
    *("RQVAEConfig", "RQTransformerConfig", "MultiScaleVQVAEConfig", "VARConfig"),
}


def type_switch_violations(root: Path) -> list[str]:
    """No `isinstance`, `issubclass` or `type()` looks for the class of one system's models, nor does `match`: a third
    system would have to be added there. Only `convert` may, whose formats have their own models."""
    found = []
    source = root / "python" / "rqgen"
    for path in python_files(source):
        if path.relative_to(source).parts[0] == "convert":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            asked: list[ast.AST] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("isinstance", "issubclass"):
                    asked = node.args[1:]
            elif isinstance(node, ast.Compare) and any(
                isinstance(side, ast.Call) and getattr(side.func, "id", None) == "type"
                for side in (node.left, *node.comparators)
            ):
                asked = [node.left, *node.comparators]
            elif isinstance(node, ast.MatchClass):
                asked = [node.cls]
            for name in sorted(names_in(asked) & MODEL_CLASSES):
                found.append(f"{where(path, root, node.lineno)}: asks for the class {name}")
    return found


def names_in(nodes: list[ast.AST]) -> set[str]:
    """Names and attributes in expressions."""
    inner = [one for node in nodes for one in ast.walk(node)]
    return {getattr(one, "attr", getattr(one, "id", "")) for one in inner}


# Functions of the public interface, and how many named parameters each has at most; the rest are `SamplingParams`.
FEW_PARAMETERS = {"sampling/generate.py": ("generate", 9), "sampling/edit.py": ("edit", 9)}


def parameter_violations(root: Path) -> list[str]:
    """`generate` and `edit` take at most nine named parameters."""
    found = []
    for file, (name, most) in FEW_PARAMETERS.items():
        path = root / "python" / "rqgen" / file
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                count = sum(map(len, (node.args.posonlyargs, node.args.args, node.args.kwonlyargs)))
                if count > most:
                    found.append(f"{where(path, root, node.lineno)}: {name} has {count} parameters, expected {most}")
                break
        else:
            found.append(f"{path.relative_to(root).as_posix()}: no function {name}")
    return found


def kernel_package_violations(root: Path) -> list[str]:
    """rqkernels never imports rqgen; its references import torch, the standard library, one another and the checks of
    arguments (what an operator accepts is decided once), which import torch and the standard library alone."""
    found = []
    for path in python_files(root / "rqkernels"):
        room = path.relative_to(root / "rqkernels").with_suffix("").parts[0]
        within = {"reference": ("rqkernels.reference", "rqkernels._arguments"), "_arguments": ()}.get(room)
        for imported in imports_of(path, root):
            at = where(path, root, imported.line)
            top = imported.module.split(".")[0]
            if top == "rqgen":
                found.append(f"{at}: rqkernels imports rqgen")
            elif (
                within is not None
                and top not in ("torch", *sys.stdlib_module_names)
                and not any(is_within(imported.module, module) for module in within)
            ):
                found.append(f"{at}: {'a reference' if within else room} imports {imported.module}")
    return found


def include_violations(root: Path) -> list[str]:
    """No operator's folder includes another's, shared/ none of them, common/ neither; device code sees no torch."""
    found = []
    csrc = root / "csrc"
    ops = ops_of(root)
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        parts = path.relative_to(csrc).parts
        here = parts[1] if parts[0] == "ops" else parts[0]
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if match is None:
                continue
            target = posixpath.normpath(match.group(1))
            at = where(path, root, number)
            for other in set(target.split("/")[:-1]) & (set(ops) - {here}):
                if here in ops or here in ("common", "shared"):
                    found.append(f"{at}: {here} includes {other}")
            if here == "common" and "shared" in target.split("/")[:-1]:
                found.append(f"{at}: common includes shared")
            if (path.name == "params.h" or path.suffix == ".cuh") and target.split("/")[0] in ("torch", "ATen", "c10"):
                found.append(f"{at}: {path.name} includes {target}")
    return found


def csrc_includes(path: Path, csrc: Path) -> Iterator[Path]:
    """The headers of csrc that a file includes itself."""
    for found in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        for target in (csrc / found, path.parent / found):
            if target.is_file():
                yield target.resolve()


def shared_violations(root: Path) -> list[str]:
    """Every header of csrc/shared serves two operators: what one alone includes belongs in that one's folder."""
    csrc = (root / "csrc").resolve()
    users: dict[Path, set[str]] = {path: set() for path in sorted((csrc / "shared").glob("*"))}
    for op in ops_of(root):
        pending = [p for p in (csrc / "ops" / op).iterdir() if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
        reached: set[Path] = set()
        while pending:
            reached.add(path := pending.pop())
            pending += [p for p in csrc_includes(path, csrc) if p not in reached]
        for path in users.keys() & reached:
            users[path].add(op)
    return [
        f"{path.relative_to(csrc.parent).as_posix()}: included by {', '.join(sorted(ops)) or 'no operator'} alone"
        for path, ops in users.items()
        if len(ops) < 2
    ]


def constant_violations(root: Path) -> list[str]:
    """No constant of an operator has the name of another that its files see: one would hide the other in silence."""
    found = []
    csrc = (root / "csrc").resolve()
    for op in ops_of(root):
        pending = [p for p in (csrc / "ops" / op).iterdir() if p.suffix in (".h", ".cuh")]
        seen: dict[str, Path] = {}
        reached: set[Path] = set()
        while pending:
            reached.add(path := pending.pop())
            pending += [p for p in csrc_includes(path, csrc) if p not in reached]
        for path in sorted(p for p in reached if "emulation" not in p.parts):
            declarations = re.findall(r"^constexpr ([^;]*);", path.read_text(), re.MULTILINE)
            # Several in one file are the branches of an #if.
            for name in set(re.findall(r"\b(k[A-Z]\w*)(?:\[[^=]*\])? ?=(?!=)", "\n".join(declarations))):
                other = seen.setdefault(name, path)
                if other != path:
                    here, there = (p.relative_to(csrc).as_posix() for p in (path, other))
                    found.append(f"{op}: {name} is defined in {there} and {here}")
    return found


def build_violations(root: Path) -> list[str]:
    """CMake builds the folders of csrc/ops as they are: no list of operators is kept."""
    return [
        f"{path.relative_to(root).as_posix()}: names {op}"
        for path in (root / "CMakeLists.txt", root / "csrc" / "emulation" / "CMakeLists.txt")
        for op in ops_of(root)
        if re.search(rf"\b{op}\b", path.read_text())
    ]


def emulation_violations(root: Path) -> list[str]:
    """The emulation is for tests: only common/device.h leads there, and CMake installs nothing of it."""
    found = []
    csrc = root / "csrc"
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        inside = path.relative_to(csrc).parts[0] == "emulation"
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if match is None:
                continue
            at, target = where(path, root, number), posixpath.normpath(match.group(1))
            if "emulation" in target.split("/") and not inside and path != csrc / "common" / "device.h":
                found.append(f"{at}: {target} is reached through common/device.h only")
            if path.suffix == ".cuh" and target.startswith("cuda"):
                found.append(f"{at}: a kernel gets CUDA through common/device.h, not {target}")
    for path in sorted((csrc / "emulation").rglob("CMakeLists.txt")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if re.match(r"\s*install\s*\(", line):
                found.append(f"{where(path, root, number)}: the emulation is installed")
    return found


def ops_of(root: Path) -> list[str]:
    return sorted(p.name for p in (root / "csrc" / "ops").glob("*") if p.is_dir())


def listed_names(path: Path) -> set[str]:
    """The strings of a module's `__all__`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and any(ast.unparse(t) == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return set()


def public_functions(path: Path) -> set[str]:
    body = ast.parse(path.read_text()).body if path.exists() else []
    return {n.name for n in body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}


def cases_of(path: Path) -> list[str]:
    """The cases that an operator's emulation file registers, to be run by name."""
    text = path.read_text() if path.exists() else ""
    return re.findall(r"^RQK_CASE\((\w+)\)", text, re.MULTILINE)


def case_violations(root: Path) -> list[str]:
    """Every operator has a case that the emulation runs by name."""
    return [
        f"{op}: csrc/emulation/ops/{op}.cpp defines no case"
        for op in ops_of(root)
        if not cases_of(root / "csrc" / "emulation" / "ops" / f"{op}.cpp")
    ]


def inventory_violations(root: Path) -> list[str]:
    """Every operator has all its files, a public function, and a reference of the same name."""
    ops = ops_of(root)
    found = [
        f"{op}: {name.format(op=op)} is missing"
        for op in ops
        for name in FILES_OF_AN_OP
        if not (root / name.format(op=op)).is_file()
    ]
    for path in sorted((root / "rqkernels" / "ops").glob("[!_]*.py")):
        if path.stem not in ops:
            found.append(f"{path.stem}: rqkernels/ops/{path.name} has no folder in csrc/ops")
    public = listed_names(root / "rqkernels" / "__init__.py")
    for op in ops:
        names = public & public_functions(root / "rqkernels" / "ops" / f"{op}.py")
        if not names:
            found.append(f"{op}: rqkernels.__all__ names no function of rqkernels/ops/{op}.py")
        for name in sorted(names - public_functions(root / "rqkernels" / "reference" / f"{op}.py")):
            found.append(f"{op}: {name} has no twin in rqkernels/reference/{op}.py")
        for name in sorted(names - listed_names(root / "rqkernels" / "reference" / "__init__.py")):
            found.append(f"{op}: rqkernels.reference.__all__ does not name {name}")
    return found


RULES = (
    room_violations,
    type_switch_violations,
    parameter_violations,
    kernel_package_violations,
    include_violations,
    shared_violations,
    constant_violations,
    build_violations,
    emulation_violations,
    inventory_violations,
    case_violations,
)


# --- this repository -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_repository_keeps_the_rule(rule) -> None:
    assert rule(ROOT) == []


def test_the_rules_saw_the_repository() -> None:
    assert set(OPS) <= set(ops_of(ROOT))
    assert {"quantizers", "models", "inference", "training", "systems", "cli"} <= {
        p.relative_to(ROOT / "python" / "rqgen").parts[0] for p in python_files(ROOT / "python" / "rqgen")
    }


# --- the rules can fail ----------------------------------------------------------------------------------

GOOD_TREE: dict[str, str] = {
    "python/rqgen/__init__.py": "from .models import rqvae\n__version__ = '0'\n",
    "python/rqgen/config.py": "import dataclasses\n",
    "python/rqgen/files.py": "import os\n",
    "python/rqgen/quantizers/residual.py": "import rqkernels\nfrom ..config import load\n",
    "python/rqgen/models/rqvae.py": "from ..quantizers import residual\nfrom .pretrained import X\n",
    "python/rqgen/sampling/generate.py": (
        "from rqgen.models.rqvae import RQVAE\nfrom rqgen.files import claim\n"
        "def generate(prior, vae, *, params=None, **sampling):\n    return isinstance(prior, Prior)\n"
    ),
    "python/rqgen/sampling/edit.py": "from ..inference import make_sampler\ndef edit(prior): ...\n",
    "python/rqgen/convert/foreign.py": "from ..models import rqvae\ndef f(x):\n    return isinstance(x, rqvae.RQVAE)\n",
    "python/rqgen/systems/rq.py": "from rqgen.sampling import generate\n",
    "python/rqgen/cli/app.py": "import rqgen\nfrom rqgen.sampling import generate\n",
    "rqkernels/__init__.py": "__all__ = ['search']\n",
    "rqkernels/ops/search.py": "import torch\ndef search(x): ...\n",
    "rqkernels/reference/__init__.py": "from .search import search\n__all__ = ['search']\n",
    "rqkernels/reference/search.py": "import math\nimport torch.nn.functional\ndef search(x): ...\n",
    "csrc/common/checks.h": "#include <torch/csrc/stable/tensor.h>\n",
    "csrc/common/device.h": '#include <cuda_runtime.h>\n#include "emulation/cuda_language.h"\n',
    "csrc/emulation/cuda_language.h": '#include "emulation/runtime.h"\n',
    "csrc/emulation/CMakeLists.txt": "add_library(x OBJECT x.cpp)  # install()s nothing\n",
    "csrc/emulation/ops/search.cpp": '#include "ops/search/params.h"\nRQK_CASE(search) {\n',
    "CMakeLists.txt": "file(GLOB op_sources CONFIGURE_DEPENDS csrc/ops/*/op.cpp)\n",
    "csrc/ops/search/params.h": "#include <cstdint>\n",
    "csrc/ops/search/op.cpp": '#include "common/checks.h"\n#include "ops/search/params.h"\n',
    "csrc/ops/search/cpu.cpp": '#include "params.h"\n',
    "csrc/ops/search/cpu_simd.cpp": '#include "kernel_table.h"\n',
    "csrc/ops/search/kernel_table.h": '#include "params.h"\n',
    "csrc/ops/search/kernel.cuh": '#include "../../common/philox.h"\n#include "params.h"\n',
    "csrc/ops/search/cuda.cu": '#include "kernel.cuh"\n',
    "tests/support/op_calls/search.py": "",
    "tests/rqkernels/test_search.py": "",
    "tests/emulation/test_search.py": "",
    "benchmarks/bench_search.py": "",
}


def plant(root: Path, files: Mapping[str, str | None]) -> Path:
    """Writes the good tree with these files added or replaced; None leaves one out."""
    for name, text in {**GOOD_TREE, **files}.items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES)
def test_a_good_tree_passes(rule, tmp_path: Path) -> None:
    assert rule(plant(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("quantizers/a.py", "from ..models import rqvae\n", "quantizers/a.py:1: quantizers imports models"),
        ("models/a.py", "from rqgen.sampling.generate import g\n", "models/a.py:1: models imports sampling"),
        ("models/a.py", "import rqgen.data.folder\n", "models/a.py:1: models imports data"),
        ("training/a.py", "def f():\n    from ..report import grid\n", "a.py:2: training imports report"),
        ("report/a.py", "from rqgen import cli\n", "report/a.py:1: report imports cli"),
        ("data/deep/a.py", "from ...cli import app\n", "data/deep/a.py:1: data imports cli"),
        (
            "models/a.py",
            "import importlib\nimportlib.import_module('rqgen.cli')\n",
            "a.py:2: models imports cli",
        ),
        ("models/a.py", "importlib.import_module('..cli', __package__)\n", "a.py:1: models imports cli"),
        ("models/a.py", "import rqgen\n", "models/a.py:1: models imports rqgen from the facade"),
        ("sampling/a.py", "from rqgen import RQVAE\n", "sampling imports rqgen.RQVAE from the facade"),
        ("config.py", "from .models import rqvae\n", "config.py:1: config imports models"),
        ("config.py", "from .files import write_text\n", "config.py:1: config imports files"),
        ("files.py", "from rqgen.data import grid\n", "files.py:1: files imports data"),
        ("models/a.py", "from ..inference import params\n", "models/a.py:1: models imports inference"),
        ("inference/a.py", "from ..convert import var\n", "inference/a.py:1: inference imports convert"),
        ("convert/a.py", "from ..sampling import generate\n", "convert/a.py:1: convert imports sampling"),
        ("sampling/a.py", "from ..systems import rq\n", "sampling/a.py:1: sampling imports systems"),
        ("systems/a.py", "from ..cli import app\n", "systems/a.py:1: systems imports cli"),
        ("checks.py", "from .config import load\n", "checks.py:1: checks imports config"),
        ("helpers/a.py", "", "python/rqgen/helpers/a.py: helpers is no room of rqgen"),
        ("models/a.py", "import torch\ntorch.ops.rqkernels.f()\n", "a.py:2: rqgen touches torch.ops"),
        ("models/a.py", "from torch import ops\n", "a.py:1: rqgen touches torch.ops"),
    ],
)
def test_a_broken_room_is_found(tmp_path: Path, file: str, text: str, message: str) -> None:
    (violation,) = room_violations(plant(tmp_path, {f"python/rqgen/{file}": text}))
    assert message in violation


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("sampling/a.py", "if isinstance(prior, VAR): ..."),
        ("sampling/a.py", "if isinstance(prior, (int, models.RQTransformer)): ..."),
        ("cli/a.py", "x = issubclass(cls, RQVAE)"),
        ("bench/a.py", "x = type(config) is VARConfig"),
        ("bench/a.py", "x = RQVAE == type(config)"),
        ("models/a.py", "x = type(prior) in (VAR, int)"),
        ("systems/a.py", "match prior:\n    case MultiScaleVQVAE(): ..."),
    ],
)
def test_a_switch_on_model_classes_is_found(tmp_path: Path, file: str, line: str) -> None:
    (violation,) = type_switch_violations(plant(tmp_path, {f"python/rqgen/{file}": line + "\n"}))
    assert f"python/rqgen/{file}:" in violation and "asks for the class" in violation


def test_a_tenth_parameter_is_found(tmp_path: Path) -> None:
    nine = ", ".join("abcdefghi")
    for text, message in (
        (f"def edit({nine}, **more): ...\n", None),
        (f"def edit({nine}, *, j): ...\n", "python/rqgen/sampling/edit.py:1: edit has 10 parameters, expected 9"),
        ("def other(): ...\n", "python/rqgen/sampling/edit.py: no function edit"),
    ):
        found = parameter_violations(plant(tmp_path, {"python/rqgen/sampling/edit.py": text}))
        assert found == ([] if message is None else [message])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ops/search.py", "import rqgen.models\n", "rqkernels/ops/search.py:1: rqkernels imports rqgen"),
        ("reference/search.py", "import numpy\n", "a reference imports numpy"),
        ("reference/search.py", "from ..ops import search\n", "a reference imports rqkernels.ops.search"),
        ("reference/search.py", "import rqkernels\n", "a reference imports rqkernels"),
        ("_arguments.py", "from .reference import search\n", "_arguments imports rqkernels.reference.search"),
        ("_arguments.py", "import numpy\n", "_arguments imports numpy"),
    ],
)
def test_a_broken_kernel_package_is_found(tmp_path: Path, file: str, text: str, message: str) -> None:
    (violation,) = kernel_package_violations(plant(tmp_path, {f"rqkernels/{file}": text}))
    assert message in violation


@pytest.mark.parametrize(
    ("file", "include", "message"),
    [
        ("ops/search/cpu.cpp", '"../decode/params.h"', "csrc/ops/search/cpu.cpp:1: search includes decode"),
        ("ops/search/cpu.cpp", "<ops/decode/params.h>", "search includes decode"),
        ("ops/decode/kernel.cuh", '"search/kernel.cuh"', "decode includes search"),
        ("common/checks.h", '"ops/search/params.h"', "csrc/common/checks.h:1: common includes search"),
        ("common/checks.h", '"shared/rows.h"', "csrc/common/checks.h:1: common includes shared"),
        ("common/checks.h", '"../shared/rows.h"', "common includes shared"),
        ("shared/rows.h", '"ops/search/params.h"', "csrc/shared/rows.h:1: shared includes search"),
        ("ops/search/kernel.cuh", "<torch/csrc/stable/tensor.h>", "kernel.cuh includes torch/csrc"),
        ("ops/search/scan.cuh", "<torch/csrc/stable/tensor.h>", "scan.cuh includes torch/csrc"),
        ("ops/search/params.h", "<torch/csrc/stable/tensor.h>", "params.h includes torch/csrc"),
    ],
)
def test_a_broken_include_is_found(tmp_path: Path, file: str, include: str, message: str) -> None:
    files = {"csrc/ops/decode/params.h": "", f"csrc/{file}": f"  #  include {include}\n"}
    (violation,) = include_violations(plant(tmp_path, files))
    assert message in violation


@pytest.mark.parametrize(
    ("includes", "message"),
    [
        ({}, "csrc/shared/rows.h: included by no operator alone"),
        ({"search/cpu.cpp": '"shared/rows.h"'}, "csrc/shared/rows.h: included by search alone"),
        ({"search/cpu.cpp": '"tile.h"', "search/tile.h": '"../../shared/rows.h"'}, "included by search alone"),
    ],
)
def test_a_shared_header_of_one_operator_is_found(tmp_path: Path, includes: dict[str, str], message: str) -> None:
    files = {f"csrc/ops/{name}": f"#include {header}\n" for name, header in includes.items()}
    (violation,) = shared_violations(plant(tmp_path, {"csrc/shared/rows.h": "", **files}))
    assert message in violation


def test_a_shared_header_may_be_reached_through_another(tmp_path: Path) -> None:
    files = {
        "csrc/shared/rows.h": "",
        "csrc/shared/tile.h": '#include "shared/rows.h"\n',
        "csrc/ops/search/cpu.cpp": '#include "shared/tile.h"\n',
        "csrc/ops/decode/cpu.cpp": '#include "shared/tile.h"\n',
    }
    assert shared_violations(plant(tmp_path, files)) == []


def test_a_constant_that_hides_another_is_found(tmp_path: Path) -> None:
    files = {
        "csrc/ops/search/scan.cuh": "namespace scan {\nconstexpr int kChunk = 32, kOther = 1;\n",
        "csrc/ops/search/kernel.cuh": '#include "../../common/tile.h"\nconstexpr double kSeldom = 1;\n',
        "csrc/common/tile.h": "#if X\nconstexpr int kA = 1, kChunk = 16;\n#else\nconstexpr int kChunk = 8;\n#endif\n",
    }
    found = constant_violations(plant(tmp_path, files))
    assert found == ["search: kChunk is defined in common/tile.h and ops/search/scan.cuh"]


@pytest.mark.parametrize("file", ["CMakeLists.txt", "csrc/emulation/CMakeLists.txt"])
def test_a_list_of_operators_in_cmake_is_found(tmp_path: Path, file: str) -> None:
    assert build_violations(plant(tmp_path, {file: "set(OPS search)\n"})) == [f"{file}: names search"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "ops/search/kernel.cuh",
            '#include "emulation/cuda_language.h"\n',
            "kernel.cuh:1: emulation/cuda_language.h is reached",
        ),
        ("ops/search/cpu.cpp", '#include "../../emulation/cases.h"\n', "cpu.cpp:1: ../../emulation/cases.h is reached"),
        ("ops/search/kernel.cuh", "#include <cuda_fp16.h>\n", "gets CUDA through common/device.h, not cuda_fp16.h"),
        ("ops/search/scan.cuh", "#include <cuda_fp16.h>\n", "gets CUDA through common/device.h, not cuda_fp16.h"),
        ("emulation/CMakeLists.txt", "x()\ninstall(TARGETS x)\n", "CMakeLists.txt:2: the emulation is installed"),
    ],
)
def test_a_way_into_the_emulation_is_found(tmp_path: Path, file: str, text: str, message: str) -> None:
    (violation,) = emulation_violations(plant(tmp_path, {f"csrc/{file}": text}))
    assert message in violation


@pytest.mark.parametrize("name", [name.format(op="search") for name in FILES_OF_AN_OP])
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    assert f"search: {name} is missing" in inventory_violations(plant(tmp_path, {name: None}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"rqkernels/ops/extra.py": ""}, "extra: rqkernels/ops/extra.py has no folder in csrc/ops"),
        ({"rqkernels/__init__.py": "__all__ = []\n"}, "search: rqkernels.__all__ names no function of"),
        ({"rqkernels/reference/search.py": "def other(): ...\n"}, "search: search has no twin in"),
        ({"rqkernels/reference/__init__.py": "__all__ = []\n"}, "rqkernels.reference.__all__ does not name"),
    ],
)
def test_a_broken_inventory_is_found(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (violation,) = inventory_violations(plant(tmp_path, files))
    assert message in violation


def test_an_operator_without_a_case_is_found(tmp_path: Path) -> None:
    file = "csrc/emulation/ops/search.cpp"
    assert case_violations(plant(tmp_path, {file: "// RQK_CASE(search)\n"})) == [f"search: {file} defines no case"]
