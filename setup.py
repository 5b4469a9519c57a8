"""Thin driver of CMakeLists.txt; all that describes the package stands in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Environment variables that choose what is built; each is the CMake option of the same name.
OPTIONS = ("RQK_CUDA", "RQK_CUDA_ARCHITECTURES")


class CMakeBuild(build_ext):
    """Configures, builds and installs both libraries into the folder that holds the `rqkernels` package."""

    def run(self) -> None:
        build = ROOT / "build" / "cmake"
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        # -U where a variable is not set: CMake must not remember the value of an earlier build.
        options = [f"-D{name}={os.environ[name]}" if name in os.environ else f"-U{name}" for name in OPTIONS]
        torch_root = self._torch_root()
        subprocess.check_call(
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DRQK_TORCH_ROOT={torch_root}", *options]
        )
        subprocess.check_call(["cmake", "--build", build])
        subprocess.check_call(["cmake", "--install", build, "--prefix", target])

    @staticmethod
    def _torch_root() -> Path:
        try:
            import torch
        except ImportError:
            sys.exit(
                "rqkernels: torch >= 2.11 must be installed first, and pip called with --no-build-isolation: "
                "the libraries are built against the torch of this environment."
            )
        return Path(torch.__file__).parent


setup(
    ext_modules=[Extension("rqkernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
