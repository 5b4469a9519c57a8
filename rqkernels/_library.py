"""Loading of the compiled libraries: which ones loaded, and why one did not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import _arguments
from ._shadow import CPU_LIBRARY

CUDA_LIBRARY = "_cuda.abi3.so"
_FOLDER = Path(__file__).parent
_OLDEST_TORCH = (2, 11)


def _load_cpu() -> str:
    """Load `_C` and return the instruction set of its kernels; the ImportError says what to do."""
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
    # Decides the level once; raises ValueError if RQK_CPU_CAPABILITY asks for an unavailable one.
    return torch.ops.rqkernels.cpu_capability()


def _serves(capability: tuple[int, int], architectures: list[int]) -> bool:
    """True if code compiled for these architectures (the newest also as PTX) runs on a GPU of this capability.

    Machine code runs on its own major version from its minor version on, PTX on everything newer.
    """
    device = 10 * capability[0] + capability[1]
    return device >= max(architectures) or any(
        built // 10 == capability[0] and built <= device for built in architectures
    )


def _load_cuda() -> str | None:
    """Load `_cuda` if this machine can use it. Return the reason why not, or None if it loaded."""
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

_OUT_OF_GPU_MEMORY = "CUDA out of memory"
_OUT_OF_CPU_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed")


def check_tensor(op: str, name: str, tensor: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check as `_arguments.check_tensor` does, and that a library for the tensor's device is loaded."""
    _arguments.check_tensor(op, name, tensor, dtypes)
    device = tensor.device.type
    if device == "cuda" and CUDA_UNAVAILABLE is not None:
        raise RuntimeError(
            f"{op}: {name} is on {tensor.device}, but the CUDA library is not loaded: {CUDA_UNAVAILABLE}"
        )
    if device not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{op}: {name} must be on cpu or cuda, got {tensor.device}")


def call(op: str, operator: Callable[..., Any], *arguments: object, names: Sequence[str] | None = None) -> Any:
    """Call an operator of the library; its errors are raised in the name of `op`.

    `names` are those of the arguments, if the operator is a function without a schema.

    Running out of memory raises torch's own class with torch's text: torch.OutOfMemoryError on a GPU (which a library
    with a stable ABI cannot raise itself), RuntimeError on a CPU.
    """
    try:
        return operator(*arguments)
    except RuntimeError as error:
        text = str(error)
        if _OUT_OF_GPU_MEMORY in text:
            raise torch.OutOfMemoryError(f"{op}: {text}") from None
        if any(words in text for words in _OUT_OF_CPU_MEMORY):
            raise RuntimeError(f"{op}: {text}") from None
        # "Inference tensors cannot be saved for backward", "Inplace update to inference tensor": torch names no tensor.
        if "nference tensor" in text:
            raise ValueError(
                f"{op}: {_made_in_inference_mode(names or _names(operator), arguments)} must not be made in inference "
                f"mode to take part in a gradient; clone it first"
            ) from None
        raise


def _names(operator: Any) -> list[str]:
    schema = getattr(operator, "_opoverload", None) or operator.default
    return [argument.name for argument in schema._schema.arguments]


def _made_in_inference_mode(names: Sequence[str], arguments: tuple[object, ...]) -> str:
    tensors = zip(names, arguments, strict=False)
    return " and ".join(name for name, t in tensors if isinstance(t, torch.Tensor) and t.is_inference()) or "a tensor"
