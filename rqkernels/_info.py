"""Facts about the installation, for bug reports."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _library
from ._shadow import CPU_LIBRARY
from ._version import __version__


def info(*, paths: bool = True) -> dict[str, Any]:
    """Return versions, the instruction set, and which libraries loaded or why not. `python -m rqkernels` prints it.

    Args:
        paths: include paths on this machine; False for facts to publish with a result.

    Returns:
        A dict of plain values: `version`, `python`, `torch`, `cuda_runtime_of_torch`, `device` (the GPU's name and
        compute capability, or None), `cuda_architectures` (those the CUDA library was compiled for), `cpu_capability`,
        `threads`, `cpu_library` and `cuda_library` ("loaded", or the reason why not); with paths also `package` (the
        imported folder), `cpu_library_file` and `cuda_library_file` (None if there is no such file).
    """
    cuda_file = _library._FOLDER / _library.CUDA_LIBRARY
    cuda = torch.cuda.is_available()
    major_minor = ".".join(map(str, torch.cuda.get_device_capability())) if cuda else ""
    files = {
        "package": str(_library._FOLDER),
        "cpu_library_file": str(_library._FOLDER / CPU_LIBRARY),
        "cuda_library_file": str(cuda_file) if cuda_file.exists() else None,
    }
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_runtime_of_torch": torch.version.cuda,
        "device": f"{torch.cuda.get_device_name()} (compute capability {major_minor})" if cuda else None,
        "cuda_architectures": _library.CUDA_ARCHITECTURES,
        "cpu_capability": _library.CPU_CAPABILITY,
        "threads": torch.get_num_threads(),
        "cpu_library": "loaded",
        "cuda_library": "loaded" if _library.CUDA_UNAVAILABLE is None else f"not loaded: {_library.CUDA_UNAVAILABLE}",
        **(files if paths else {}),
    }
