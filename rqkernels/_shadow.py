"""Protection against a source folder without a compiled library that hides the installed package.

Python looks in the current folder first, so in a clone `import rqkernels` and `python -m rqkernels` find the clone's
source even if `pip install .` has put package and library elsewhere. The whole package is exchanged: Python files of
one copy never run with the library of the other.
"""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path

CPU_LIBRARY = "_C.abi3.so"


def give_way(name: str, file: str) -> bool:
    """Replace the package `name`, whose `__init__.py` is `file`, by the installed one if only that has a library.

    Warns when it does. Returns True if it did: the caller then defines nothing.
    """
    folder = Path(file).resolve().parent
    if (folder / CPU_LIBRARY).exists():
        return False
    spec = _find_installed(name, folder)
    if spec is None or spec.origin is None or spec.loader is None:
        return False
    installed = Path(spec.origin).parent
    differs = "" if _sources(folder) == _sources(installed) else ", whose Python files differ from the folder's"
    # Line 0: Python then prints no source line below the warning.
    warnings.warn_explicit(
        f"{name}: {folder} is a source folder without the compiled library; imported the installed package "
        f"{installed} instead{differs}",
        UserWarning,
        file,
        0,
    )
    for loaded in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
        del sys.modules[loaded]
    package = module_from_spec(spec)
    sys.modules[name] = package  # the import system returns this entry once the importing module has run
    spec.loader.exec_module(package)
    return True


def _find_installed(name: str, folder: Path) -> ModuleSpec | None:
    """Find the first package of this name on `sys.path`, outside `folder`, that has a library."""
    for entry in sys.path:
        spec = PathFinder.find_spec(name, [entry])
        if spec is not None and spec.origin is not None:
            found = Path(spec.origin).resolve().parent
            if found != folder and (found / CPU_LIBRARY).exists():
                return spec
    return None


def _sources(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}
