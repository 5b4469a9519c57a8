"""Checks of arguments that several rooms share: numbers, flags, tensors of integers, names."""

from __future__ import annotations

import math
import numbers
import operator
import unicodedata
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

# All but bool, which is rather a mask than a class.
_INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,  # values that int64 has not become negative, and are out of range
)
# Codes and labels of a file: without uint64.
_STORED_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)

_FLOAT32_MAX = torch.finfo(torch.float32).max

# Names of the digits. Where all classes are named so, the numerals name them too.
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMERALS = tuple("0123456789")


# --- numbers -----------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Numbers of arrays and tensors as Python's, in lists unless it is one; everything else as it is."""
    return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value


def check_integer(value: Any, name: str, lowest: int, highest: int | None = None) -> int:
    """An integer of Python or NumPy, or in a tensor without dimensions, as Python's.

    Raises:
        TypeError, ValueError: anything else, or an integer out of range.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, SupportsIndex):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    value = operator.index(number)
    if value < lowest or (highest is not None and value > highest):
        bound = f">= {lowest}" if highest is None else f"in [{lowest}, {highest}]"
        raise ValueError(f"{name}: expected an integer {bound}, got {value}")
    return value


def check_flag(value: Any, name: str) -> bool:
    """True or False, of Python or NumPy. Raise TypeError for anything else."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return flag


def check_number(value: Any, name: str, expected: str = "a number") -> float:
    """A real number as a float, infinite where it is too large for one. Raise TypeError, which says what was
    `expected`, for anything else."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    try:
        return float(number)
    except OverflowError:
        return math.inf


def check_nonnegative(value: Any, name: str, expected: str = "a number") -> float:
    """A finite number >= 0 that float32 holds. Raise TypeError or ValueError for anything else."""
    number = check_number(value, name, expected)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {number}")
    if number > _FLOAT32_MAX:
        raise ValueError(f"{name}: expected a number of at most {_FLOAT32_MAX:.3g} (float32), got {number}")
    return number


def check_instance(value: Any, name: str, expected: type) -> None:
    """Raise TypeError unless `value` is an `expected`."""
    if not isinstance(value, expected):
        raise TypeError(f"{name}: expected {expected.__name__}, got {type(value).__name__}")


def check_device(value: Any, name: str) -> torch.device:
    """Return a device that this machine has. Raise ValueError, or TypeError for anything but a device or its name."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{name}: expected a device or its name, such as cpu or cuda, got {value!r}")
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name}: expected a device, such as cpu, cuda or cuda:1, got {value!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (device.index or 0):
            there = f"{count or 'no'} CUDA device{'' if count == 1 else 's'}"
            raise ValueError(f"{name}: torch sees {there}, got '{device}'")
    return device


# --- tensors -----------------------------------------------------------------------------------------------


def check_tensor(value: Any, name: str, device: torch.device | None = None, owner: str = "model") -> None:
    """Raise unless `value` is a dense tensor, and on `device`, that of its `owner`, where one is given.

    Raises:
        TypeError: not a tensor, or a sparse, nested or otherwise packed one.
        ValueError: on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:  # nested tensors may call themselves strided
        layout = "nested" if value.layout == torch.strided else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got {layout}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected on {device}, where the {owner} is, got {value.device}")


# --- tensors of integers -----------------------------------------------------------------------------------


def integers(ids: Tensor, name: str) -> Tensor:
    """Ids of any integer dtype as int64. Raise TypeError for others."""
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected int64, got {ids.dtype}")
    return ids.to(torch.int64)


def check_range(ids: Tensor, size: int, name: str) -> None:
    """Raise IndexError unless all ids are in [0, size); read them back from the device."""
    if ids.numel() == 0:
        return
    lowest, highest = (int(value) for value in ids.aminmax())
    if lowest < 0 or highest >= size:
        raise IndexError(f"{name}: expected values in [0, {size}), got {lowest if lowest < 0 else highest}")


def check_range_without_waiting(ids: Tensor, size: int, name: str) -> None:
    """`check_range` on a CPU. On a GPU reading back would stall every training step, in a compiled graph it would
    break the graph."""
    if not (ids.is_cuda or ids.is_meta or torch.compiler.is_compiling()):
        check_range(ids, size, name)


def check_targets(ids: Tensor, size: int, name: str) -> None:
    """Raise TypeError or IndexError for ids that cannot be the targets of a cross-entropy over `size` of them."""
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {ids.dtype}")
    check_range_without_waiting(ids, size, name)


def checked_integers(values: Any, name: str, ndim: int, *, expected: str) -> Tensor:
    """Integers of any width as int64, of `ndim` dimensions. Raise ValueError, which says what was `expected`, for
    anything else: floating point is not cut, and truth values are no numbers."""
    if not isinstance(values, Tensor):
        raise ValueError(f"{name}: expected {expected}, got {type(values).__name__}")
    if values.dtype not in _STORED_INTEGERS or values.ndim != ndim:
        raise ValueError(f"{name}: expected {expected}, got {values.dtype} {tuple(values.shape)}")
    return values.long()


def check_within(values: Tensor, name: str, one: str, lowest: int, end: int | None) -> None:
    """Raise ValueError unless all values are in [lowest, end); without `end`, at least `lowest`."""
    if values.numel() == 0:
        return
    low, high = (int(value) for value in values.aminmax())
    if low < lowest or (end is not None and high >= end):
        bound = f"{lowest} <= {one}" + ("" if end is None else f" < {end}")
        raise ValueError(f"{name}: expected {bound}, got {low}..{high}")


# --- names -------------------------------------------------------------------------------------------------


def find_name(given: str, names: Sequence[str]) -> int | None:
    """Position of a name; None where there is no such name.

    One letter may be several code points: files and keyboards differ in that, so the NFC forms are compared too. Where
    all are `DIGIT_NAMES`, the numerals 0..9 name them as well.
    """
    normalized = unicodedata.normalize("NFC", given)
    candidates = [given, normalized]
    if given in _NUMERALS and set(names) <= set(DIGIT_NAMES):
        candidates.append(DIGIT_NAMES[int(given)])
    for wanted in candidates:
        if wanted in names:
            return list(names).index(wanted)
    known = [unicodedata.normalize("NFC", name) for name in names]
    return known.index(normalized) if normalized in known else None


def same_names(given: Sequence[str], names: Sequence[str]) -> bool:
    """Return True if these are the same names in the same order, as `find_name` finds them."""
    return len(given) == len(names) and all(find_name(name, names) == label for label, name in enumerate(given))


def check_choices(values: Sequence[object], name: str) -> None:
    """Raise ValueError unless there is at least one value, and each stands there once."""
    if not values:
        raise ValueError(f"{name}: expected at least one, got none")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{name}: expected each once, got {value!r} twice")
