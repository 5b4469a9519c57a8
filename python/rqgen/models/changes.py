"""Find changes of a model that its weights do not show: hooks, adapters, parametrizations, modules and methods
replaced.

Packed weights (`rqgen.inference.packed`), CUDA graphs and fused losses compute from a module's tensors without calling
it. They may replace the module only while it is as it was written. This module decides that.
"""

from __future__ import annotations

import inspect
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Methods used in every call of a module.
_CALLING = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "__getattribute__")
# Methods used in none.
_UNRELATED = {
    *("_initialise", "extra_repr", "reset_parameters", "set_codebooks"),
    *("check_tokenizer", "check_values", "codebook_pairs", "loss", "code_losses"),
}
GLOBAL_HOOKS = "torch calls a forward hook for all modules (register_module_forward_hook or _pre_hook)"
_CONTAINERS = (nn.Sequential, nn.ModuleList)


class Change(NamedTuple):
    """The first change of a model that its weights do not show."""

    name: str
    """The module's, as in `named_modules`; empty for the model itself, and for hooks of torch on all modules."""
    text: str
    """A description, with the module's name."""


class _Written(NamedTuple):
    """A class as it was when `as_written` saw it."""

    methods: dict[str, Any]
    settings: tuple[str, ...]


_WRITTEN: dict[type[nn.Module], _Written] = {}


def as_written(*settings: str) -> Callable[[type[ModuleT]], type[ModuleT]]:
    """Mark a module class that is computed from its tensors elsewhere: keep its methods, to compare with later.

    Args:
        settings: attributes of an instance, other than its tensors, that decide what it computes.
    """

    def remember(cls: type[ModuleT]) -> type[ModuleT]:
        names = {
            name
            for base in cls.__mro__[: cls.__mro__.index(nn.Module)]
            for name, value in vars(base).items()
            if isinstance(value, (types.FunctionType, property, classmethod, staticmethod))
            and not name.startswith("__")
        }
        names = {*(names - _UNRELATED), *_CALLING}
        _WRITTEN[cls] = _Written({name: inspect.getattr_static(cls, name) for name in sorted(names)}, settings)
        return cls

    return remember


_TORCH_MODULES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Linear, ()),
    (nn.LayerNorm, ("eps",)),
    (nn.Embedding, ("max_norm",)),
    (nn.GELU, ("approximate",)),
    (nn.Dropout, ()),
    *((container, ()) for container in _CONTAINERS),
)
for _cls, _settings in _TORCH_MODULES:
    as_written(*_settings)(_cls)


def find_change(model: nn.Module, expected: nn.Module, called: str) -> Change | None:
    """Return the first difference between the module trees of `model` and `expected`, weights aside; None without any.

    Args:
        called: the name of the model in the text.
        expected: made by the same class from the same config, on any device; its classes are those of `as_written`.
    """
    if has_global_hooks():
        return Change("", GLOBAL_HOOKS)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, wanted in expected.named_modules(remove_duplicate=False):
        found = modules.get(name)
        what = "is missing" if found is None else _difference(found, wanted)
        if what is not None:
            return Change(name, f"{called}.{name} {what}" if name else f"{called} {what}")
    return None


def computes_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Return True if calling `module` runs the `forward` that `cls` was written with and nothing else, so that another
    way to compute it may stand in.

    Parametrizations are allowed: the other way reads weights by their names too. torch.compile can trace this.
    """
    return (
        isinstance(module, cls)
        and type(module).forward is _WRITTEN[cls].methods["forward"]
        and not is_overridden(module, "forward")
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not has_global_hooks()
    )


def is_overridden(module: nn.Module, name: str) -> bool:
    """Return True if an instance has another method than its class. (The class's own, bound and set on the instance, is
    left behind by wrappers that took theirs off again, such as Accelerate's for mixed precision.)"""
    if name not in module.__dict__:
        return False
    method = module.__dict__[name]
    own = isinstance(method, types.MethodType) and method.__self__ is module
    return not (own and method.__func__ is getattr(type(module), name))


def parametrized_names(module: nn.Module) -> str | None:
    """Return the names of a module's parametrized tensors, separated by commas; None without any."""
    found = getattr(module, "parametrizations", None)
    return ", ".join(found) if isinstance(found, nn.ModuleDict) and found else None


def has_global_hooks() -> bool:
    """Return True if torch calls a forward hook for all modules."""
    return bool(torch_module._global_forward_hooks) or bool(torch_module._global_forward_pre_hooks)


def change_of_torch_module(module: nn.Module) -> str | None:
    """Describe a change in a module of an unknown class, as far as it can be seen: a parametrization, a method set on
    the instance, a forward hook, and of torch's layers another `forward` or another epsilon."""
    if names := parametrized_names(module):
        return f"has a parametrized {names}"
    for name in module.__dict__:
        if callable(getattr(type(module), name, None)) and is_overridden(module, name):
            return f"has a {name} of its own, set on the instance"
    hook = hook_of(module)
    if hook is not None:
        return hook
    for cls, defaults in ((nn.Linear, {}), (nn.LayerNorm, {"eps": 1e-5})):
        if isinstance(module, cls):
            if inspect.getattr_static(type(module), "forward") is not _WRITTEN[cls].methods["forward"]:
                return f"has its forward from {type(module).__qualname__}"
            for name, value in defaults.items():
                if getattr(module, name) != value:
                    return f"has {name}={getattr(module, name)!r} and not {value!r}"
    return None


def hook_of(module: nn.Module) -> str | None:
    """Describe the first forward hook of a module; None without any."""
    for what, hooks in (("hook", module._forward_hooks), ("pre-hook", module._forward_pre_hooks)):
        for hook in hooks.values():
            return f"has a forward {what} ({getattr(hook, '__qualname__', type(hook).__qualname__)})"
    return None


def _difference(found: nn.Module, wanted: nn.Module) -> str | None:
    cls, kind = type(wanted), type(found)
    if names := parametrized_names(found):
        return f"has a parametrized {names}"
    if not issubclass(kind, cls):
        return f"is a {kind.__module__}.{kind.__qualname__} and not a {cls.__name__}"
    methods, settings = _WRITTEN[cls]
    for name, method in methods.items():
        if inspect.getattr_static(kind, name, None) is not method:
            source = kind.__qualname__ if kind is not cls else f"outside of the class {cls.__qualname__}"
            return f"has its {name} from {source}"
    children, tensors = wanted._modules.keys(), {**wanted._parameters, **wanted._buffers}
    for name in found.__dict__:
        if (name in methods and is_overridden(found, name)) or name in children or name in tensors:
            return f"has a {name} of its own, set on the instance"
    hook = hook_of(found)
    if hook is not None:
        return hook
    if isinstance(wanted, _CONTAINERS) and list(found._modules) != list(children):
        return f"holds {len(found._modules)} modules and not {len(children)}"
    for name in (*children, *tensors):
        if getattr(kind, name, None) is not None:
            return f"has its {name} from the class {kind.__qualname__}"
    for name, tensor in tensors.items():
        what = _difference_of_tensor({**found._parameters, **found._buffers}.get(name), tensor)
        if what is not None:
            return f"has a {name} that {what}"
    for name in settings:
        if getattr(found, name) != getattr(wanted, name):
            return f"has {name}={getattr(found, name)!r} and not {getattr(wanted, name)!r}"
    return None


def _difference_of_tensor(found: Tensor | None, wanted: Tensor | None) -> str | None:
    if found is None or wanted is None:
        return None if found is wanted else "is missing" if found is None else "is not its config's"
    if type(found) not in (Tensor, nn.Parameter):
        return f"is a {type(found).__name__}"
    if found.shape != wanted.shape:
        return f"is {tuple(found.shape)} and not {tuple(wanted.shape)}"
    return None if found.is_floating_point() else f"is {found.dtype}"


# --- warnings ---------------------------------------------------------------------------------------------

_SAID: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def warn_once(model: nn.Module, text: str) -> None:
    """Warn, unless `model` was warned of with this text before."""
    said = _SAID.setdefault(model, set())
    if text not in said:
        said.add(text)
        warnings.warn(text, stacklevel=_caller_outside())


def _caller_outside() -> int:
    """Return the stack level of whoever called into this package, for `warnings.warn` in the function that asks."""
    frame, level, package = inspect.currentframe(), 0, __name__.partition(".")[0]
    ours = (package, "torch", "functools")  # the latter calls the samplers that are registered for a class
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame, level = frame.f_back, level + 1
    return level
