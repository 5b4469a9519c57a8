"""`rqgen check`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import rqkernels
from rqgen.installed import REQUIREMENTS

PACKAGES = ("torch", "numpy", *REQUIREMENTS)


def installed_versions() -> dict[str, str]:
    """Version of Python and of every package the commands use; "not installed" where there is none."""
    versions = {"python": platform.python_version(), "rqkernels": rqkernels.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def installation_report() -> list[str]:
    """One line per fact: versions, then everything `rqkernels.info` knows."""
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
