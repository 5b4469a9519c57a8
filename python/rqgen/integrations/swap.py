"""Put our operators into a foreign module: it keeps its parameters, buffers and attributes, and gets another class,
derived from ours (one or several) and from its own, so that ours override the few methods they know and everything else
stays theirs. `isinstance`, the state dict, hooks, `.to()`, optimizers and wrappers see no difference; copies and
pickles come back accelerated.

Where a method that ours replaces, or one that ours does not call, was overridden by someone else, ours gives way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from torch import nn

from rqgen.models.changes import (
    GLOBAL_HOOKS,
    change_of_torch_module,
    has_global_hooks,
    is_overridden,
    parametrized_names,
    warn_once,
)

MethodT = TypeVar("MethodT", bound=Callable[..., Any])


class Accelerated(nn.Module):
    """Base of all our classes: a class made on the fly is pickled and copied by the classes it was made from."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(max(protocol, 2))
        assert isinstance(reduced, tuple)  # a name only for globals
        _, _, state, *rest = reduced
        return (_new_instance, type(self).__bases__, state, *rest)

    def _change_of_parts(self) -> str | None:
        """Describe the first change in modules that ours does not call; None without any."""
        return None


def gives_way(*bypassed: str) -> Callable[[MethodT], MethodT]:
    """Mark a method of ours as one that gives way: theirs runs instead, with one warning, where a class derived from
    theirs overrides it, where one of the methods `bypassed` by ours is overridden there or on the instance, or where
    parts were changed."""

    def decorate(ours: MethodT) -> MethodT:
        name = ours.__name__

        @functools.wraps(ours)
        def method(self: Accelerated, *args: Any, **kwargs: Any) -> Any:
            change = override_of(self, bypassed, (name,)) or self._change_of_parts()
            if change is None:
                return ours(self, *args, **kwargs)
            warn_once(self, f"{change}: so {name} runs as published, and is not accelerated")
            owner = next(cls for cls in type(self).__mro__ if vars(cls).get(name) is method)
            return getattr(super(owner, self), name)(*args, **kwargs)

        return cast("MethodT", method)  # with the signature that wraps has copied

    return decorate


def override_of(module: nn.Module, names: Sequence[str], by_classes_only: Sequence[str] = ()) -> str | None:
    """Describe the first of these methods that someone has overridden: on the instance, or in a class derived from the
    one that brought it."""
    kind = type(module).__name__
    for name in names:
        if is_overridden(module, name):
            return f"{kind} has a {name} of its own, set on the instance"
    for name in (*names, *by_classes_only):
        classes = [cls for cls in type(module).__mro__ if _brings(cls, name)]
        if len(classes) > 1:
            return f"{classes[0].__qualname__} overrides {name} of {classes[-1].__qualname__}"
    return None


def change_in_tree(model: nn.Module) -> str | None:
    """Describe the first change in a foreign module tree that its weights do not show, as far as it can be seen; of
    `model` itself, whose methods are its own, a parametrization alone."""
    if has_global_hooks():
        return GLOBAL_HOOKS
    if names := parametrized_names(model):
        return f"{type(model).__name__} has a parametrized {names}"
    for name, module in model.named_modules():
        change = change_of_torch_module(module) if name else None
        if change is not None:
            return f"{name} {change}"
    return None


def _brings(cls: type, name: str) -> bool:
    method = vars(cls).get(name)
    ours_or_torch = issubclass(cls, Accelerated) or cls.__module__.partition(".")[0] == "torch"
    return method is not None and not ours_or_torch and not getattr(method, "__isabstractmethod__", False)


def swap_class(module: nn.Module, ours: type[Accelerated]) -> None:
    """Put `ours` before what the module's class derives from; nothing where it is there already."""
    if isinstance(module, ours):
        return
    bases = type(module).__bases__ if isinstance(module, Accelerated) else (type(module),)
    module.__class__ = _accelerated_class(ours, *bases)


def has_structure(module: nn.Module, methods: Sequence[str], attributes: Sequence[str]) -> bool:
    # Methods are looked up in the class: wrappers such as torch.compile's show those of the module they wrap.
    return all(callable(getattr(type(module), name, None)) for name in methods) and all(
        hasattr(module, name) for name in attributes
    )


_CLASSES: dict[tuple[type[nn.Module], ...], type[nn.Module]] = {}


def _accelerated_class(*bases: type[nn.Module]) -> type[nn.Module]:
    if bases not in _CLASSES:
        ours, theirs = bases[0], bases[-1]
        _CLASSES[bases] = type(theirs.__name__, bases, {"__module__": ours.__module__, "__doc__": theirs.__doc__})
    return _CLASSES[bases]


def _new_instance(*bases: type[nn.Module]) -> nn.Module:
    cls = _accelerated_class(*bases)
    return cls.__new__(cls)
