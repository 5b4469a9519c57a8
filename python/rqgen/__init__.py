"""Generation with residual quantization: RQ-VAE and RQ-Transformer over the kernels of `rqkernels`.

`rqgen --help` lists the commands; `rqgen demo` trains both stages on handwritten digits.
"""

from __future__ import annotations

import runpy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .installed import check_requirements

if TYPE_CHECKING:
    from . import (  # noqa: F401
        bench,
        config,
        convert,
        data,
        evaluation,
        inference,
        integrations,
        losses,
        models,
        quantizers,
        report,
        sampling,
        systems,
        training,
    )
    from .integrations import accelerate
    from .models import (
        RQVAE,
        VAR,
        MultiScaleVQVAE,
        MultiScaleVQVAEConfig,
        RQTransformer,
        RQTransformerConfig,
        RQVAEConfig,
        VARConfig,
    )
    from .sampling import Engine, KnownRows, Pipeline, SamplingParams, edit, generate

    __version__: str

check_requirements()

__all__ = [
    "RQVAE",
    "VAR",
    "Engine",
    "KnownRows",
    "MultiScaleVQVAE",
    "MultiScaleVQVAEConfig",
    "Pipeline",
    "RQTransformer",
    "RQTransformerConfig",
    "RQVAEConfig",
    "SamplingParams",
    "VARConfig",
    "accelerate",
    "convert",
    "edit",
    "generate",
]

# Imported when first asked for: `rqgen --help` need not wait for torch.
_ROOM_OF = {name: "models" for name in __all__ if name[0].isupper()}
_ROOM_OF |= dict.fromkeys(("Engine", "KnownRows", "Pipeline", "SamplingParams", "edit", "generate"), "sampling")
_ROOM_OF |= {"accelerate": "integrations"}
_MODULES = (
    "bench", "config", "convert", "data", "evaluation", "inference", "integrations", "losses", "models", "quantizers",
    "report", "sampling", "systems", "training",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        value = getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)
    elif name in _MODULES:
        return import_module(f".{name}", __name__)
    elif name == "__version__":
        value = _read_version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})


def _read_version() -> str:
    """Return `rqkernels.__version__`, the one version of the distribution, without importing rqkernels and torch with
    it."""
    spec = find_spec("rqkernels")
    assert spec is not None and spec.origin is not None  # of the same distribution
    return runpy.run_path(str(Path(spec.origin).with_name("_version.py")))["__version__"]
