"""Builds the emulation (csrc/emulation) into build/emulation. `make emulation` and the tests call this; by hand:

python tests/emulation/build.py
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulation"


class Unavailable(RuntimeError):
    """This machine cannot build the emulation; the message says why."""


def _tool(name: str) -> str:
    # The tools of an environment need not be on the PATH of who calls its python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise Unavailable(f"{name} was not found: pip install {name}")
    return found


def build(source: Path = ROOT, folder: Path = FOLDER, *, target: str = "emulation", quiet: bool = False) -> Path:
    """Brings the builds of `source` up to date, all three or the one `target`.

    Where nothing changed, that takes a tenth of a second.

    Returns the folder that holds the Python module `rqk_emulation` and the sanitized executables.

    Raises:
        Unavailable: no x86-64 Linux, or a tool is missing.
        subprocess.CalledProcessError: it does not compile.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable(f"the emulation runs on x86-64 Linux, this is {platform.machine()} {platform.system()}")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Unavailable("g++ was not found: on Debian and Ubuntu, apt install g++")
    cmake, ninja = _tool("cmake"), _tool("ninja")
    output = subprocess.DEVNULL if quiet else None
    if not (folder / "build.ninja").exists():
        subprocess.run(
            [
                *(cmake, "-S", source, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
                *("-DRQK_EMULATION=ON", "-DRQK_CUDA=0", f"-DPython3_EXECUTABLE={sys.executable}"),
                f"-DCMAKE_CXX_COMPILER={os.environ.get('CXX', 'g++')}",
            ],
            check=True,
            stdout=output,
        )
    subprocess.run([cmake, "--build", folder, "--target", target], check=True, stdout=output)
    return folder / "csrc" / "emulation"


if __name__ == "__main__":
    try:
        build()
    except Unavailable as reason:
        sys.exit(f"emulation: {reason}")
