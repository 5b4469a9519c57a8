"""Loads the compiled libraries and remembers which came up, and why one did not."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ._shadow import CPU_LIBRARY

CUDA_LIBRARY = "_cuda.abi3.so"
_FOLDER = Path(__file__).parent
_OLDEST_TORCH = (2, 11)


def _load_cpu() -> str:
    """Loads `_C` and returns the instruction set its kernels use; ImportError says what to do."""
    path = _FOLDER / CPU_LIBRARY
    torch_version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if torch_version < _OLDEST_TORCH:
        raise ImportError(f"rqkernels needs torch >= 2.11, found {torch.__version__}")
    if not path.exists():
        raise ImportError(
            f"rqkernels: the compiled library {path.name} is not in {_FOLDER}. Build it with "
            "'pip install --no-build-isolation .' in the source folder, or with 'make build'."
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"rqkernels: {path.name} could not be loaded into torch {torch.__version__}: {error}"
        ) from error
    # Decides the level once; raises ValueError where RQK_CPU_CAPABILITY asks for what is not there.
    return torch.ops.rqkernels.cpu_capability()


def _serves(capability: tuple[int, int], architectures: list[int]) -> bool:
    """Whether code compiled for these architectures (the newest also as PTX) runs on a GPU of this capability.

    Machine code serves its own major version from its minor version on; PTX serves everything newer.
    """
    device = 10 * capability[0] + capability[1]
    return device >= max(architectures) or any(
        built // 10 == capability[0] and built <= device for built in architectures
    )


def _load_cuda() -> str | None:
    """Loads `_cuda` where it can serve. Returns why it was not loaded, or None where it was."""
    path = _FOLDER / CUDA_LIBRARY
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    if not path.exists():
        return f"{path.name} was not built (nvcc was not found, or RQK_CUDA=0)"
    capability = torch.cuda.get_device_capability()
    if not _serves(capability, [int(built) for built in CUDA_ARCHITECTURES]):
        return (
            f"{path.name} was compiled for compute capabilities {', '.join(CUDA_ARCHITECTURES)}, the device has "
            f"{capability[0]}{capability[1]}: build with RQK_CUDA_ARCHITECTURES={capability[0]}{capability[1]}"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} could not be loaded into torch {torch.__version__}: {error}"
    return None


CPU_CAPABILITY = _load_cpu()
CUDA_ARCHITECTURES: list[str] = torch.ops.rqkernels.cuda_architectures().split()
CUDA_UNAVAILABLE = _load_cuda()

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(op: str, name: str, tensor: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """TypeError unless `tensor` is a tensor of one of `dtypes`; an error too where no library serves its device.

    Shapes and values are checked in op.cpp; dtypes here, because only Python can raise a TypeError.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
    device = tensor.device.type
    if device == "cuda" and CUDA_UNAVAILABLE is not None:
        raise RuntimeError(
            f"{op}: {name} is on {tensor.device}, but the CUDA library is not loaded: {CUDA_UNAVAILABLE}"
        )
    if device not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{op}: {name} must be on cpu or cuda, got {tensor.device}")


def check_depth(op: str, depth: object) -> None:
    """TypeError unless `depth` is None or an integer."""
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, (int, torch.SymInt))):
        raise TypeError(f"{op}: depth must be an integer or None, got {type(depth).__name__}")


def check_number(op: str, name: str, value: object) -> None:
    """TypeError unless `value` is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_counter(op: str, name: str, value: object, bits: int) -> None:
    """TypeError or ValueError unless `value` is an integer of so many bits, without a sign."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{op}: {name} must be in [0, 2^{bits}), got {value}")


def signed_seed(seed: int) -> int:
    """The same 64 bits as operators take them: as a signed integer."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
