"""Refuse to train models that do not fit into memory, before any is allocated."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

# Weights, gradients and AdamW's two averages.
_COPIES = 4
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(name: str, build: Callable[[], nn.Module]) -> None:
    """Raise ValueError, which names the setting ``name``, if training the model that ``build`` makes takes more
    memory than available: four numbers per parameter (weights, gradients and AdamW's two averages), and the buffers.
    The model is built without memory, on the device "meta"."""
    with torch.device("meta"):
        model = build()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    needed, where, there = _COPIES * weights + buffers, "this machine", memory_limit()
    if torch.cuda.is_available():
        where, there = "the GPU", torch.cuda.get_device_properties(0).total_memory
    if needed > there:
        count = sum(parameter.numel() for parameter in model.parameters())
        raise ValueError(
            f"{name}: training {count:,} parameters takes at least {needed / 2**30:,.1f} GiB (weights, gradients, "
            f"AdamW's averages and codebooks), and {where} has {there / 2**30:,.1f} GiB"
        )


def memory_limit() -> int:
    """Return the bytes of memory available to this process: the machine's, or the limit of its control group."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # another version of control groups, or "max"
            continue
    return min(limits)
