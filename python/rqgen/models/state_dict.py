"""State dicts of other systems, taken apart tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class ForeignTensors:
    """A foreign state dict, of which every tensor is to be taken once; gathers all that does not fit.

    A small tensor replaces each one that is missing or does not fit: a configuration may expect any shape. `finish`
    then raises.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._remaining = dict(tensors)
        self._problems: list[str] = []

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the floating-point tensor of this name and shape."""
        tensor = self._pop(name, shape)
        if tensor is not None and not tensor.is_floating_point():
            self._problems.append(f"{name}: expected floating-point numbers, got {tensor.dtype}")
            tensor = None
        # As many dimensions, and enough in each to be split into three (query, key and value).
        return torch.zeros([min(size, 3) for size in shape]) if tensor is None else tensor

    def drop(
        self, name: str, shape: tuple[int | None, ...], fault_of: Callable[[Tensor], str | None] = lambda tensor: None
    ) -> None:
        """Take a tensor that our model has no place for: it must have this shape (None: any size) and no fault."""
        tensor = self._pop(name, shape)
        if tensor is not None and (fault := fault_of(tensor)) is not None:
            self._problems.append(f"{name}: {fault}")

    def finish(self, expected: str, *, where: str = "") -> None:
        """Raise ValueError, which starts with `where`, if a tensor was missing, did not fit, or is left over;
        `expected` says what they are to fit."""
        problems = self._problems + [f"unknown {name}" for name in sorted(map(str, self._remaining))]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            told = f"tensors do not fit {expected}: {'; '.join(problems[:5])}{more}"
            raise ValueError(f"{where}: {told}" if where else told)

    def _pop(self, name: str, shape: tuple[int | None, ...]) -> Tensor | None:
        tensor = self._remaining.pop(name, None)
        if tensor is None:
            self._problems.append(f"missing {name}")
            return None
        found = tuple(tensor.shape)
        if len(found) != len(shape) or any(size not in (None, has) for size, has in zip(shape, found, strict=True)):
            wanted = str(shape).replace("None", "any")
            self._problems.append(f"{name}: expected shape {wanted}, got {found}")
            return None
        return tensor
