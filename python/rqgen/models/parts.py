"""Parts of torch's containers, which know no types."""

from __future__ import annotations

from typing import TypeVar, cast

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def members(container: nn.ModuleList, kind: type[ModuleT]) -> list[ModuleT]:
    """Return the modules of a list as the `kind` it was made of.

    Nothing is checked: wrappers such as adapters may have replaced them, and are used in the same way.
    """
    return cast("list[ModuleT]", list(container))


def linear(container: nn.Sequential, index: int) -> nn.Linear:
    """Return a linear layer of a sequence. Nothing is checked, see `members`."""
    return cast("nn.Linear", container[index])
