"""The state of a quantizer under casts of the model and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def keeping_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return `move` without its changes of dtype, for `nn.Module._apply`: only changes of device are left.

    So `.half()`, `.bfloat16()`, `.double()` and `.to(dtype)` move a quantizer and leave it float32: averages with a
    decay of 0.99 stand still in bfloat16, and a codebook that is rounded gives other codes.
    """

    def moved(tensor: Tensor) -> Tensor:
        result = move(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast on `device`; torch has no autocast for the meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def is_recomputed() -> bool:
    """Return True if a forward runs inside a backward pass, as `torch.utils.checkpoint` runs it for the second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
