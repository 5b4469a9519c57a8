"""Systems of the command line: a tokenizer, a prior over its codes, and the settings of both trainings.

A system is a module of this room that holds its `System` as SYSTEM, and one line in the table below. Modules are
imported when a system is asked for: `rqgen --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rqgen.config import one_of

if TYPE_CHECKING:
    from .system import System

# A line per system: its name, which is that of its module, and its title.
TITLES = {
    "rq": "RQ-VAE and RQ-Transformer",
    "var": "multi-scale VQ-VAE and VAR",
}
DEFAULT = "rq"

_registered: dict[str, System] = {}


def register(system: System, title: str) -> None:
    """Add a system that is defined outside of this room. ValueError for a name that is taken."""
    if system.name in TITLES:
        raise ValueError(f"name: expected one that is not taken ({', '.join(TITLES)}), got '{system.name}'")
    TITLES[system.name] = title
    _registered[system.name] = system


def unregister(name: str) -> None:
    """Undo `register`."""
    del _registered[name], TITLES[name]


def find_system(name: str) -> System:
    """Return the system of this name. ValueError for an unknown one."""
    if name not in TITLES:
        raise ValueError(f"--system: {one_of(TITLES, name)}")
    if name not in _registered:
        _registered[name] = import_module(f".{name}", __name__).SYSTEM
    return _registered[name]


def all_systems() -> list[System]:
    """Return every system, in the order of the table."""
    return [find_system(name) for name in TITLES]


def system_of(run: Any) -> System:
    """Return the system whose stage these settings train: a `TokenizerRun` or `PriorRun`, an instance or the class.
    LookupError for settings of no system."""
    cls = run if isinstance(run, type) else type(run)
    for system in all_systems():
        if cls in (system.tokenizer_run, system.prior_run):
            return system
    raise LookupError(f"run: expected the settings of a registered system, got {cls.__name__}")
