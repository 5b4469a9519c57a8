"""Generation with residual quantization: RQ-VAE and RQ-Transformer over the kernels of `rqkernels`.

`rqgen --help` lists the commands; `rqgen demo` trains both stages on handwritten digits.
"""

from . import convert
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
from .sampling import edit, generate

__version__ = "0.1.0"

__all__ = [
    "RQVAE",
    "VAR",
    "MultiScaleVQVAE",
    "MultiScaleVQVAEConfig",
    "RQTransformer",
    "RQTransformerConfig",
    "RQVAEConfig",
    "VARConfig",
    "accelerate",
    "convert",
    "edit",
    "generate",
]
