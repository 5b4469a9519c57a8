"""Benchmarks of sampling: images per second, next to the counted work and the machine's lower bound.

The names below are imported when they are first asked for: `settings` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sampling import SamplingBench, run_sampling_bench
    from .settings import parse_shape
    from .systems import SystemsBench, run_systems_bench

__all__ = ["SamplingBench", "SystemsBench", "parse_shape", "run_sampling_bench", "run_systems_bench"]

_MODULE_OF = {
    "SamplingBench": "sampling",
    "SystemsBench": "systems",
    "parse_shape": "settings",
    "run_sampling_bench": "sampling",
    "run_systems_bench": "systems",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
