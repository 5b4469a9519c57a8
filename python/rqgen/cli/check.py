"""`rqgen check`: the state of the installation."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import rqkernels
from rqgen.installed import REQUIREMENTS

PACKAGES = ("torch", "numpy", *REQUIREMENTS)


def installed_versions() -> dict[str, str]:
    """Return the version of Python and of every package that the commands use; "not installed" for a missing one."""
    versions = {"python": platform.python_version(), "rqkernels": rqkernels.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def installation_report() -> list[str]:
    """Return lines: versions, then the facts of `rqkernels.info`."""
    versions = installed_versions()
    width = max(map(len, versions))
    lines = [f"{package:<{width}}  {version}" for package, version in versions.items()]
    return [*lines, "", *_lines(rqkernels.info(), "")]


def _lines(facts: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, (list, tuple)):
            lines.append(f"{indent}{name}: {', '.join(map(str, value)) or 'none'}")
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines
