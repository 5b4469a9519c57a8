"""How our operators come into a foreign module: it keeps its parameters, buffers and attributes, and gets another
class, derived from ours (one or several) and from its own, so that ours override the few methods they know and
everything else stays theirs. `isinstance`, the state dict, hooks, `.to()`, optimizers and wrappers see no difference;
copies and pickles come back accelerated."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn


class Accelerated(nn.Module):
    """What all our classes share: a class made on the fly is pickled and copied by what it was made from."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, _, state, *rest = super().__reduce_ex__(max(protocol, 2))
        return (_new_instance, type(self).__bases__, state, *rest)


def swap_class(module: nn.Module, ours: type[Accelerated]) -> None:
    """Puts `ours` before what the module's class derives from; nothing where it is there already."""
    if isinstance(module, ours):
        return
    bases = type(module).__bases__ if isinstance(module, Accelerated) else (type(module),)
    module.__class__ = _accelerated_class(ours, *bases)


def has_structure(module: nn.Module, methods: Sequence[str], attributes: Sequence[str]) -> bool:
    # Methods are looked up in the class: wrappers such as torch.compile's show those of the module they wrap.
    return all(callable(getattr(type(module), name, None)) for name in methods) and all(
        hasattr(module, name) for name in attributes
    )


@functools.cache
def _accelerated_class(*bases: type) -> type:
    ours, theirs = bases[0], bases[-1]
    return type(theirs.__name__, bases, {"__module__": ours.__module__, "__doc__": theirs.__doc__})


def _new_instance(*bases: type) -> nn.Module:
    cls = _accelerated_class(*bases)
    return cls.__new__(cls)
