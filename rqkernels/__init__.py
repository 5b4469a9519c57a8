"""Residual-quantization kernels for PyTorch: CPU and CUDA twins of every op, and a plain-PyTorch reference.

Importing this loads the compiled libraries; `info()` says which, and why one was not.
"""

from . import reference
from ._info import info
from .ops.code_statistics import code_statistics
from .ops.residual_decode import residual_decode
from .ops.residual_search import FrozenCodebook, residual_search
from .ops.sample_logits import sample_logits
from .ops.soft_label import distance_softmax, fused_linear_soft_label_cross_entropy, soft_label_cross_entropy
from .ops.stochastic_residual_search import stochastic_residual_search
from .reference.residual_search import ResidualCodes

__all__ = [
    "FrozenCodebook",
    "ResidualCodes",
    "code_statistics",
    "distance_softmax",
    "fused_linear_soft_label_cross_entropy",
    "info",
    "reference",
    "residual_decode",
    "residual_search",
    "sample_logits",
    "soft_label_cross_entropy",
    "stochastic_residual_search",
]
