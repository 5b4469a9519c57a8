"""Checks of codes and labels that come from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)


def checked_integers(values: Any, name: str, ndim: int, *, expected: str) -> Tensor:
    """Integers of any width as int64, of `ndim` dimensions. Raises ValueError, which says what was `expected`, for
    anything else: floating point is not cut, and truth values are no numbers."""
    if not isinstance(values, Tensor):
        raise ValueError(f"{name}: expected {expected}, got {type(values).__name__}")
    if values.dtype not in _INTEGERS or values.ndim != ndim:
        raise ValueError(f"{name}: expected {expected}, got {values.dtype} {tuple(values.shape)}")
    return values.long()


def check_within(values: Tensor, name: str, one: str, lowest: int, end: int | None) -> None:
    """Raises ValueError unless all values are in [lowest, end); without `end`, at least `lowest`."""
    if values.numel() == 0:
        return
    low, high = (int(value) for value in values.aminmax())
    if low < lowest or (end is not None and high >= end):
        bound = f"{lowest} <= {one}" + ("" if end is None else f" < {end}")
        raise ValueError(f"{name}: expected {bound}, got {low}..{high}")
