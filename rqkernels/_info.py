"""What is installed, for a bug report or a tired person."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from . import _library


def _version() -> str:
    try:
        return metadata.version("rqkernels")
    except metadata.PackageNotFoundError:
        return "not installed: imported from its source folder"


def info() -> dict[str, Any]:
    """Versions, instruction set, and which libraries loaded, or why not. `python -m rqkernels` prints it.

    Returns:
        A dict of plain values: `version`, `python`, `torch`, `cuda_runtime_of_torch`, `device` (the GPU's name and
        compute capability, or None), `cuda_architectures` (what the CUDA library was compiled for), `cpu_capability`,
        `threads`, `cpu_library` and `cuda_library` ("loaded", or the
        reason why not).
    """
    cuda = torch.cuda.is_available()
    major_minor = ".".join(map(str, torch.cuda.get_device_capability())) if cuda else ""
    return {
        "version": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_runtime_of_torch": torch.version.cuda,
        "device": f"{torch.cuda.get_device_name()} (compute capability {major_minor})" if cuda else None,
        "cuda_architectures": _library.CUDA_ARCHITECTURES,
        "cpu_capability": _library.CPU_CAPABILITY,
        "threads": torch.get_num_threads(),
        "cpu_library": "loaded",
        "cuda_library": "loaded" if _library.CUDA_UNAVAILABLE is None else f"not loaded: {_library.CUDA_UNAVAILABLE}",
    }
