"""Thin driver of CMakeLists.txt; all that describes the package stands in pyproject.toml."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# Environment variables that choose what is built; each is the CMake option of the same name.
OPTIONS = ("RQK_CUDA", "RQK_CUDA_ARCHITECTURES")
# Commands of setuptools that compile nothing: they need no torch and no tools.
WITHOUT_BUILD = {"sdist", "egg_info", "clean", "--version", "--name", "--help", "--help-commands"}


def refuse(message):
    sys.exit(f"rqkernels: {message}")


def version_of(text):
    """(major, minor) of the first version number in the text."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def find_tool(name, oldest):
    """Path of a program: on PATH, or beside this Python, where pip puts it (an environment need not be active)."""
    found = []
    for folder in (None, sysconfig.get_path("scripts")):
        path = shutil.which(name, path=folder)
        if path is None:
            continue
        asked = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        if version_of(asked) >= oldest:
            return path
        found.append(f"{path} has version {'.'.join(map(str, version_of(asked)))}")
    number = ".".join(map(str, oldest))
    trouble = "; ".join(found) or "none is installed"
    refuse(f"{name} >= {number} is needed to build, {trouble}: pip install '{name}>={number}'")


def check_build_environment():
    """Says in one line what is missing, before pip fetches dependencies and before anything is compiled."""
    torch_first = "install torch first, then call pip with --no-build-isolation"
    try:
        torch_version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        refuse(f"torch >= 2.11 is needed to build, none is installed in {sys.prefix}: {torch_first}")
    if version_of(torch_version) < (2, 11):
        refuse(f"torch >= 2.11 is needed to build, found {torch_version} in {sys.prefix}: {torch_first}")
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        refuse(f"no C++ compiler ({', '.join(compilers)}): on Debian and Ubuntu, apt install g++; or name one in CXX")
    find_tool("cmake", (3, 25))
    find_tool("ninja", (1, 10))


if sys.version_info < (3, 10):  # noqa: UP036 (pip reads requires-python later)
    refuse("Python >= 3.10 is needed, this is " + sys.version.split()[0])
try:
    import setuptools
except ImportError:
    refuse("setuptools >= 77 is needed to build, none is installed: pip install 'setuptools>=77'")
if version_of(setuptools.__version__) < (77, 0):
    refuse(f"setuptools >= 77 is needed to build, found {setuptools.__version__}: pip install 'setuptools>=77'")
if not WITHOUT_BUILD.intersection(sys.argv):
    check_build_environment()

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402


class FreshBuildPy(build_py):
    """Copies the packages into a folder without those of an earlier build: deleted modules and libraries stay away."""

    def run(self):
        if not self.editable_mode:
            for package in {name.split(".")[0] for name in self.packages}:
                shutil.rmtree(Path(self.build_lib) / package, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures, builds and installs both libraries into the folder that holds the `rqkernels` package."""

    def run(self):
        cmake, build = find_tool("cmake", (3, 25)), ROOT / "build" / "cmake"
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        ninja = find_tool("ninja", (1, 10))
        torch_root = find_spec("torch").submodule_search_locations[0]
        # -U where a variable is not set: CMake must not remember the value of an earlier build.
        options = [f"-D{name}={os.environ[name]}" if name in os.environ else f"-U{name}" for name in OPTIONS]
        options += [f"-DRQK_TORCH_ROOT={torch_root}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.check_call([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *options])
        subprocess.check_call([cmake, "--build", build])
        for stale in (target / "rqkernels").glob("*.abi3.so"):
            stale.unlink()
        subprocess.check_call([cmake, "--install", build, "--prefix", target])


setup(
    ext_modules=[Extension("rqkernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
