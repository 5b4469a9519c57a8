"""Generation with residual quantization: RQ-VAE and RQ-Transformer over the kernels of `rqkernels`.

`rqgen --help` lists the commands; `rqgen demo` trains both stages on handwritten digits.
"""

from . import convert
from .integrations import accelerate
from .models import RQVAE, RQTransformer, RQTransformerConfig, RQVAEConfig
from .sampling import generate

__version__ = "0.1.0"

__all__ = ["RQVAE", "RQTransformer", "RQTransformerConfig", "RQVAEConfig", "accelerate", "convert", "generate"]
