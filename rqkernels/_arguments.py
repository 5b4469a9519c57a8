"""Argument checks, shared by operators, references and fake kernels. Imports torch alone, as references do.

Rules for every operator and packed object:

- An integer is a Python or numpy integer (`numbers.Integral`). A bool is not an integer, nor is a float without a
  fraction, nor a tensor: reading one would synchronise the host with the device. Operators that take a tensor say so.
- A number is an integer or a real number of Python or numpy. NaN is refused everywhere, infinity where it has no
  meaning.
- A flag is a Python or numpy bool.
- A tensor is dense and strided; subclasses of torch.Tensor are accepted if they are.
- A list is a list or a tuple.

Every message reads `operator: argument must be ..., got ...`. A wrong type is a TypeError, a wrong value a ValueError.
Shapes are checked in op.cpp where tensors have memory, and by the references' own functions elsewhere (fake kernels).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined] # is_lazy cannot be traced

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# References also take float64 and compute in it: they are the truth that kernels are compared with.
REFERENCE_DTYPES = (*FLOAT_DTYPES, torch.float64)

MOST_ELEMENTS = 1 << 40  # kMostElements of csrc/common/tensors.h
_MOST_FLOAT32 = 3.4028235677973366e38  # the smallest number that rounds to infinity

# --- numbers ---------------------------------------------------------------------------------------------


def _is_integer(value: object) -> bool:
    if type(value) is int:  # the usual case; the test below takes a microsecond
        return True
    return isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if type(value) is float or type(value) is int:
        return True
    return isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or (type(value).__module__, type(value).__name__) in (
        ("numpy", "bool"),
        ("numpy", "bool_"),
    )


def _plain(value: Any) -> Any:
    """Convert an integer of another library to Python's int, which is all that torch takes."""
    return value if type(value) in (int, float) or isinstance(value, (torch.SymInt, torch.SymFloat)) else int(value)


def check_integer(
    op: str, name: str, value: object, low: int | None = 0, bits: int | None = None, *, or_none: bool = False
) -> int:
    """Return the integer if it is at least `low` and below 2^bits; raise TypeError or ValueError."""
    if not _is_integer(value):
        raise TypeError(f"{op}: {name} must be an integer{' or None' if or_none else ''}, got {type(value).__name__}")
    integer: int = _plain(value)
    if low is not None and integer < low:
        raise ValueError(f"{op}: {name} must be >= {low}, got {integer}")
    if bits is not None and integer >= 1 << bits:
        raise ValueError(f"{op}: {name} must be < 2^{bits}, got {integer}")
    return integer


def check_counter(op: str, name: str, value: object, bits: int) -> int:
    """Return the integer if it is an unsigned `bits`-bit one; raise TypeError or ValueError."""
    if not _is_integer(value):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    integer: int = _plain(value)
    if not 0 <= integer < 1 << bits:
        raise ValueError(f"{op}: {name} must be in [0, 2^{bits}), got {integer}")
    return integer


def check_depth(op: str, depth: object) -> int | None:
    """Return the depth, 1 <= depth < 2^31, or None."""
    return None if depth is None else check_integer(op, "depth", depth, 1, 31, or_none=True)


def check_number(
    op: str,
    name: str,
    value: object,
    expected: str,
    fits: Callable[[float], bool],
    *,
    kind: str = "a number",
) -> float:
    """Return the number as a float if `fits` holds for it; raise TypeError or ValueError.

    `expected` states the range in words, `kind` the accepted types.
    """
    if not _is_number(value):
        raise TypeError(f"{op}: {name} must be {kind}, got {type(value).__name__}")
    number: Any = value
    try:
        number = number if isinstance(number, torch.SymFloat) else float(number)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be {expected}, got an integer above the range of float64") from None
    if not fits(number):
        raise ValueError(f"{op}: {name} must be {expected}, got {number}")
    return number


def check_positive(op: str, name: str, value: object) -> float:
    """Return a number above 0, infinity included."""
    return check_number(op, name, value, "> 0", lambda number: number > 0)


def check_float32(op: str, name: str, value: object) -> float:
    """Return a number >= 0 that is finite in float32, the type that kernels compute with."""
    return check_number(op, name, value, "a finite number >= 0", lambda number: 0 <= number < _MOST_FLOAT32)


def check_scale(op: str, scale: object) -> float | None:
    """Return the factor of attention scores, finite in float32, or None, which stands for the operator's default."""
    if scale is None:
        return None
    number = check_number(op, "scale", scale, "finite", math.isfinite, kind="a number or None")
    if abs(number) >= _MOST_FLOAT32:
        raise ValueError(f"{op}: scale must be finite in float32, got {number}")
    return number


def check_flag(op: str, name: str, value: object) -> bool:
    """Return the bool; raise TypeError."""
    if not _is_flag(value):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
    return bool(value)


def check_choice(op: str, name: str, value: object, allowed: Sequence[str]) -> str:
    """Return the string if it is one of `allowed`; raise TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be a string, one of {', '.join(allowed)}; got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def signed_seed(seed: int) -> int:
    """Return the same 64 bits as a signed integer, which is what operators take."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


# --- sampling --------------------------------------------------------------------------------------------


def check_temperature(op: str, value: object) -> float:
    return check_number(op, "temperature", value, "a finite number >= 0", lambda number: 0 <= number < math.inf)


def check_top_k(op: str, value: object) -> int | None:
    """Return top_k, at most 2^63 - 1, the largest that an operator takes: more than any codebook has."""
    if value is None:
        return None
    return min(check_integer(op, "top_k", value, 1, or_none=True), (1 << 63) - 1)


def check_top_p(op: str, value: object) -> float | None:
    if value is None:
        return None
    return check_number(op, "top_p", value, "in (0, 1]", lambda number: 0 < number <= 1)


def check_rows_from(op: str, offset: int, rows: int) -> None:
    """Raise ValueError unless the counter of every row fits into 63 bits."""
    if offset > (1 << 63) - 1 - rows:
        raise ValueError(f"{op}: offset must be >= 0, and offset + rows below 2^63; got {offset} with {rows} rows")


# --- tensors ---------------------------------------------------------------------------------------------


def check_tensor(op: str, name: str, tensor: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless `tensor` is a dense tensor of one of `dtypes`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if type(tensor) is not Tensor and isinstance(tensor, UninitializedTensorMixin):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got an uninitialized parameter")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be a dense tensor, got a {layout} one")


def check_writable(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError if torch would not let a result be written into `tensor`. Traced graphs are not checked."""
    if torch.compiler.is_compiling():
        return
    if tensor._is_zerotensor() or tensor.is_neg():
        raise ValueError(f"{op}: {name} must have memory to write to, got a view that is computed; clone it first")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{op}: {name} must not be made in inference mode to be written outside of it; clone it first")


def is_apart(tensor: Tensor) -> bool:
    """True if no two elements share memory, judged by sizes and strides (conservative)."""
    if tensor.numel() == 0:
        return True
    reach = 1
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in strides if size > 1):
        if stride < reach:
            return False
        reach += stride * (size - 1)
    return True


def may_overlap(a: Tensor, b: Tensor) -> bool:
    """True if the memory spans from first to last element of both tensors intersect."""
    if a.device != b.device or a.numel() == 0 or b.numel() == 0 or a.device.type == "meta":
        return False
    (begin_a, end_a), (begin_b, end_b) = _memory_of(a), _memory_of(b)
    return begin_a < end_b and begin_b < end_a


def _memory_of(tensor: Tensor) -> tuple[int, int]:
    if tensor._is_zerotensor():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    try:
        begin = tensor.data_ptr()
    except RuntimeError:  # a torch.func wrapper, which has no memory of its own
        return 0, 0
    return begin, begin + (last + 1) * tensor.element_size()


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} and {other_name} must be on the same device, got {tensor.device} and {other.device}"
        )


def check_elements(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError for 2^40 elements or more. Sizes of zero count as one, symbolic sizes are not checked."""
    elements = 1
    for size in tensor.shape:
        elements *= max(size, 1) if isinstance(size, int) else 1
    if elements >= MOST_ELEMENTS:
        raise ValueError(f"{op}: {name} must have fewer than 2^40 elements, got {shape_of(tensor)}")


def check_finite(op: str, name: str, codebooks: Tensor) -> None:
    """Raise ValueError naming the first code of (K, C) or (D, K, C) that is not finite."""
    bad = ~torch.isfinite(codebooks)
    if not bool(bad.any()):
        return
    at = bad.nonzero()[0].tolist()
    depth = f" of depth {at[0]}" if codebooks.dim() == 3 else ""
    raise ValueError(f"{op}: {name} must be finite, got {codebooks[tuple(at)].item()} in code {at[-2]}{depth}")


def differ(a: int, b: int) -> bool:
    """True if two sizes differ. Symbolic sizes never do: a check must not specialise a compiled graph."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def shapes_differ(a: Sequence[int], b: Sequence[int]) -> bool:
    return len(a) != len(b) or any(differ(x, y) for x, y in zip(a, b, strict=True))


def is_below(size: int, low: int) -> bool:
    return isinstance(size, int) and size < low


def shape_of(tensor: Tensor) -> str:
    """Format a shape for an error: (2, 8, 8), or (3) for one dimension."""
    return "(" + ", ".join(map(str, tensor.shape)) + ")"
