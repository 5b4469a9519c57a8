"""Builds and installations as users meet them: what a distribution holds, what is said where something is missing.

setup.py runs in a copy of the sources, with a cmake that compiles nothing: it notes what it was asked for and installs
empty libraries.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import rqkernels
from rqgen.installed import REQUIREMENTS
from rqkernels._shadow import give_way

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(metadata.distribution("setuptools").locate_file(""))
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE")
FAKE_CMAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "cmake version ${FAKE_CMAKE_VERSION:-3.31.0}"; exit; fi
if [ "$1" = --install ]; then
    : > "$4/rqkernels/_C.abi3.so"
    if [ "${RQK_CUDA:-auto}" != 0 ]; then : > "$4/rqkernels/_cuda.abi3.so"; fi
fi
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Sources:
    """A copy of the sources, and a Python with setuptools and torch, as far as their metadata, but without tools."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tools = folder / "clone", folder / "tools"
        self.folder.mkdir()
        for name in SOURCES:
            if (ROOT / name).exists():
                shutil.copyfile(ROOT / name, self.folder / name)
        for name in ("csrc", "rqkernels", "python"):
            shutil.copytree(
                ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
            )
        program(self.tools / "cmake", FAKE_CMAKE)
        program(self.tools / "ninja", "#!/bin/sh\necho 1.11.1\n")
        program(self.tools / "c++", "#!/bin/sh\n")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        for path in SITE.iterdir():
            if re.match(r"(setuptools|_distutils_hack|pkg_resources)\b", path.name):
                (self.site / path.name).symlink_to(path)
        self.pretend_torch("2.13.0")
        (self.site / "torch").mkdir()
        (self.site / "torch" / "__init__.py").touch()

    def pretend_torch(self, version: str | None) -> None:
        for old in self.site.glob("torch-*"):
            shutil.rmtree(old)
        if version is not None:
            info = self.site / f"torch-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RQK_", "PYTHON", "CXX"))}
        return subprocess.run(
            [self.python, "setup.py", *arguments],
            cwd=self.folder,
            env={**clean, "PATH": f"{self.tools}:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
        )

    def wheel(self, **environment: str) -> set[str]:
        """The files of a wheel that is built now, but for its metadata."""
        shutil.rmtree(self.folder / "dist", ignore_errors=True)
        done = self.setup("bdist_wheel", **environment)
        assert done.returncode == 0, done.stderr
        (wheel,) = (self.folder / "dist").glob("*.whl")
        return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path)


# --- what a distribution holds


def test_a_source_distribution_holds_all_that_builds_it(sources: Sources) -> None:
    # A build in this folder leaves libraries and objects, which are no sources.
    (sources.folder / "rqkernels" / "_C.abi3.so").touch()
    (sources.folder / "build").mkdir()
    (sources.folder / "build" / "junk.o").touch()
    done = sources.setup("sdist", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    (archive,) = (sources.folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    for folder in ("csrc", "rqkernels", "python/rqgen"):
        expected = {
            path.relative_to(sources.folder).as_posix()
            for path in (sources.folder / folder).rglob("*")
            if path.is_file() and path.suffix not in (".so", ".pyc")
        }
        assert expected and expected <= held, sorted(expected - held)
    assert set(SOURCES) - {"MANIFEST.in"} <= held
    assert not [name for name in held if name.endswith((".so", ".o"))]


def test_a_wheel_holds_this_builds_files_only(sources: Sources) -> None:
    (sources.folder / "rqkernels" / "old.py").touch()
    (sources.folder / "python" / "rqgen" / "data" / "old.py").touch()
    first = sources.wheel()
    assert {"rqkernels/old.py", "rqgen/data/old.py", "rqkernels/_C.abi3.so", "rqkernels/_cuda.abi3.so"} <= first
    (sources.folder / "rqkernels" / "old.py").unlink()
    (sources.folder / "python" / "rqgen" / "data" / "old.py").unlink()
    second = sources.wheel(RQK_CUDA="0")
    assert first - second == {"rqkernels/old.py", "rqgen/data/old.py", "rqkernels/_cuda.abi3.so"}
    assert second < first


def test_a_build_in_place_leaves_no_library_of_an_earlier_one(sources: Sources) -> None:
    package = sources.folder / "rqkernels"
    assert sources.setup("build_ext", "--inplace").returncode == 0
    assert {path.name for path in package.glob("*.so")} == {"_C.abi3.so", "_cuda.abi3.so"}
    assert sources.setup("build_ext", "--inplace", RQK_CUDA="0").returncode == 0
    assert {path.name for path in package.glob("*.so")} == {"_C.abi3.so"}


def test_one_version(sources: Sources) -> None:
    assert sources.setup("--version", PATH="/nowhere").stdout.strip() == rqkernels.__version__
    assert rqkernels.info()["version"] == rqkernels.__version__
    import rqgen

    assert rqgen.__version__ == rqkernels.__version__


# --- what CMake remembers


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    import torch

    root = Path(torch.__file__).parent
    beside = str(Path(sys.executable).parent)
    return subprocess.run(
        ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DRQK_TORCH_ROOT={root}", *options],
        env={**os.environ, "PATH": f"{beside}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )


def test_without_cuda_an_nvcc_of_an_earlier_build_is_not_used(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DRQK_CUDA=0", "-DCMAKE_CUDA_COMPILER=/bin/sh")
    assert done.returncode == 0, done.stderr
    assert "no CUDA library" in done.stdout
    assert "_cuda.abi3.so" not in (tmp_path / "build.ninja").read_text()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to find")
def test_an_nvcc_that_an_earlier_build_missed_is_found(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DRQK_CUDA=1", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert done.returncode == 0, done.stderr
    assert "_cuda.abi3.so" in (tmp_path / "build.ninja").read_text()


# --- what is missing


# dist_info is what pip runs first, before it fetches any dependency.
@pytest.mark.parametrize("command", ["dist_info", "bdist_wheel"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("torch", "torch >= 2.11 is needed to build, none is installed in .*: install torch first"),
        ("old torch", r"torch >= 2.11 is needed to build, found 2\.10\.0 in "),
        ("cmake", r"cmake >= 3\.25 is needed to build, none is installed: pip install 'cmake>=3.25'"),
        ("old cmake", r"cmake >= 3\.25 is needed to build, .*/cmake has version 3\.22: pip install 'cmake>=3.25'"),
        ("ninja", r"ninja >= 1\.10 is needed to build, none is installed: pip install 'ninja>=1.10'"),
        ("c++", r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)"),
        ("CXX", r"no C\+\+ compiler \(no-such-c\+\+\)"),
        ("setuptools", "setuptools >= 77 is needed to build, found 68.2.2: pip install"),
    ],
)
def test_what_is_missing_is_said_in_one_line(sources: Sources, command: str, spoil: str, message: str) -> None:
    environment = {"PATH": f"{sources.tools}"}
    if spoil.endswith("torch"):
        sources.pretend_torch("2.10.0" if spoil.startswith("old") else None)
    elif spoil == "old cmake":
        environment["FAKE_CMAKE_VERSION"] = "3.22.1"
    elif spoil == "CXX":
        environment["CXX"] = "no-such-c++ -O2"
    elif spoil == "setuptools":
        for path in sources.site.glob("setuptools*"):
            path.unlink()
        (sources.site / "setuptools").mkdir()
        (sources.site / "setuptools" / "__init__.py").write_text("__version__ = '68.2.2'\n")
    else:
        (sources.tools / spoil).unlink()
    done = sources.setup(command, **environment)
    assert done.returncode != 0
    assert re.fullmatch(rf"rqkernels: {message}.*\n", done.stderr), done.stderr
    assert not (sources.folder / "build").exists()


def test_tools_beside_python_are_found(sources: Sources) -> None:
    """In an environment that is not active, and behind an older cmake of the system."""
    for name in ("cmake", "ninja"):
        program(sources.python.parent / name, (sources.tools / name).read_text())
    program(sources.tools / "cmake", "#!/bin/sh\necho cmake version 3.22.1\n")
    (sources.tools / "ninja").unlink()
    done = sources.setup("bdist_wheel", PATH=str(sources.tools))
    assert done.returncode == 0, done.stderr


# --- a clone next to an installed package


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone without a library; the folder `site` next to it holds the installed package."""
    shutil.copytree(ROOT / "rqkernels", tmp_path / "clone" / "rqkernels", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "rqkernels").symlink_to(rqkernels._library._FOLDER)
    return tmp_path / "clone"


def in_clone(clone: Path, *arguments: str, site: str = "site") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(clone.parent / site), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_the_clone_gives_way_to_the_installed_package(clone: Path) -> None:
    installed = clone.parent / "site" / "rqkernels"
    done = in_clone(clone, "-m", "rqkernels")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"package +{installed}\n", done.stdout)
    assert done.stderr.count("\n") == 1
    assert f"{clone / 'rqkernels'} is a source folder without the compiled library" in done.stderr
    assert f"imported the installed package {installed} instead\n" in done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "from rqkernels import residual_search",
        "from rqkernels.ops.sample_logits import sample_logits",
        "import rqgen; rqgen.RQVAE",
    ],
)
def test_no_module_of_the_clone_stays(clone: Path, statement: str) -> None:
    report = (
        "import sys; print({m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'rqkernels'});"
        "import rqkernels; assert sys.modules['rqkernels'] is rqkernels;"
        "assert rqkernels.residual_search.__module__ == 'rqkernels.ops.residual_search'"
    )
    done = in_clone(clone, "-c", f"{statement}; {report}")
    assert done.returncode == 0, done.stderr
    assert str(clone.parent / "site") in done.stdout and str(clone) not in done.stdout


def test_other_content_is_told(clone: Path) -> None:
    with (clone / "rqkernels" / "ops" / "sample_logits.py").open("a") as file:
        file.write("# changed\n")
    done = in_clone(clone, "-c", "import rqkernels")
    assert "instead, whose Python files differ from the folder's" in done.stderr


def test_pytest_in_the_clone(clone: Path) -> None:
    (clone / "test_it.py").write_text(
        f"import rqkernels\ndef test_it():\n    assert rqkernels.__file__.startswith({str(clone.parent / 'site')!r})\n"
    )
    done = in_clone(clone, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py")
    assert done.returncode == 0, done.stdout
    assert "is a source folder without the compiled library" in done.stdout


def test_a_clone_alone_gives_no_way(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an installed package, or with one that has no library either, it says itself how to build one."""
    shutil.copytree(clone / "rqkernels", clone.parent / "broken" / "rqkernels")
    monkeypatch.setattr(sys, "path", [str(clone), str(clone.parent / "nowhere"), str(clone.parent / "broken")])
    assert not give_way("rqkernels", str(clone / "rqkernels" / "__init__.py"))
    assert sys.modules["rqkernels"] is rqkernels


# --- without the extra


def without(modules: str, *, script: str) -> subprocess.CompletedProcess[str]:
    hide = f"import sys; sys.modules.update(dict.fromkeys({modules.split()!r}))"
    return subprocess.run([sys.executable, "-c", f"{hide}\n{script}"], capture_output=True, text=True)


ALL_MODULES = " ".join(REQUIREMENTS.values())
# As the script that pip writes starts it, and as runpy does for python -m.
AS_SCRIPT = "sys.argv = ['/bin/rqgen', {!r}]\nfrom rqgen.cli.app import main\nmain()"
AS_MODULE = "import runpy; sys.argv = ['-m', {!r}]\nrunpy.run_module('rqgen', run_name='__main__', alter_sys=True)"


@pytest.mark.parametrize("start", [AS_SCRIPT, AS_MODULE], ids=["script", "module"])
@pytest.mark.parametrize("command", ["--help", "check", "--version"])
def test_the_command_without_the_extra_says_what_to_install(start: str, command: str) -> None:
    done = without(ALL_MODULES, script=start.format(command))
    assert done.returncode == 1
    names = ", ".join(REQUIREMENTS)
    assert done.stderr == f'error: rqgen needs {names}, not installed here: pip install "rqkernels[gen]"\n'


def test_one_missing_package_is_named() -> None:
    done = without("sklearn", script=AS_SCRIPT.format("check"))
    assert done.stderr == 'error: rqgen needs scikit-learn, not installed here: pip install "rqkernels[gen]"\n'


@pytest.mark.parametrize("statement", ["import rqgen", "from rqgen import RQVAE", "import rqgen.data"])
def test_import_without_the_extra(statement: str) -> None:
    done = without("PIL yaml", script=statement)
    last = done.stderr.splitlines()[-1]
    assert last == 'ImportError: rqgen needs pillow, pyyaml, not installed here: pip install "rqkernels[gen]"'


def test_the_requirements_are_those_of_the_extra() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^gen = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert re.findall(r'"([\w-]+)>=', extra) == list(REQUIREMENTS)


# --- what the command line imports


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "prior", "--help"], 0),
        (["sample", "--num", "0"], 2),
        (["paint"], 2),
        (["encode"], 2),
    ],
)
def test_help_and_wrong_usage_do_not_wait_for_torch(arguments: list[str], code: int) -> None:
    script = (
        f"import sys; sys.argv = ['rqgen', *{arguments!r}]\n"
        "from rqgen.cli.app import main\n"
        "try:\n    main()\n"
        "except SystemExit as left:\n"
        "    print(left.code or 0, sorted({'torch', 'numpy', 'rqkernels'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{code} []"
    if arguments == ["--version"]:
        assert done.stdout.splitlines()[0] == f"rqgen {rqkernels.__version__}"


def test_all_names_of_rqgen_are_there() -> None:
    script = (
        "import rqgen, sys\nassert 'torch' not in sys.modules\n"
        "assert set(rqgen.__all__) <= set(dir(rqgen))\n"
        "from rqgen import *\n"
        "assert RQVAE is rqgen.models.RQVAE and generate is rqgen.sampling.generate\n"
        "assert callable(rqgen.convert.load_var) and callable(rqgen.data.read_codes)\n"
        "assert hasattr(rqgen, 'training') and not hasattr(rqgen, 'nothing')\n"
        "for name in dir(rqgen): getattr(rqgen, name)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    import rqgen

    rooms = {path.parent.name for path in Path(rqgen.__file__).parent.glob("*/__init__.py")} - {"cli"}
    assert rooms <= set(dir(rqgen))
