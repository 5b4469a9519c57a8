"""The packages that rqgen needs beyond those of rqkernels: the extra `gen` of pyproject.toml."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

# Name to install -> name to import.
REQUIREMENTS = {
    "accelerate": "accelerate",
    "matplotlib": "matplotlib",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "rich": "rich",
    "safetensors": "safetensors",
    "scikit-learn": "sklearn",
    "tensorboard": "tensorboard",
    "typer": "typer",
}


def check_requirements() -> None:
    """Raise ImportError where one of `REQUIREMENTS` is not installed; none is imported, which would take seconds."""
    missing = [package for package, module in REQUIREMENTS.items() if _is_missing(module)]
    if not missing:
        return
    message = f'rqgen needs {", ".join(missing)}, not installed here: pip install "rqkernels[gen]"'
    # The command (the script rqgen, or python -m rqgen) starts inside this package: only here can the error be one
    # line.
    if sys.argv and (sys.argv[0] == "-m" or Path(sys.argv[0]).stem == "rqgen"):
        sys.exit(f"error: {message}")
    raise ImportError(message)


def _is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except (ImportError, ValueError):  # a finder that refuses the name, or a half-made module in sys.modules
        return module not in sys.modules
