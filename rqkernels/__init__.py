"""Residual-quantization kernels for PyTorch: CPU and CUDA twins of every op, and a plain-PyTorch reference.

Importing it loads the compiled libraries; `info()` says which, and why one did not load.
"""

from ._shadow import give_way
from ._version import __version__ as __version__

if not give_way(__name__, __file__):
    from . import reference
    from ._info import info
    from .ops.code_statistics import code_statistics
    from .ops.depth_attention import depth_attention, depth_attention_packed
    from .ops.depth_decode import (
        PackedDepthDecoder,
        PackedTransformer,
        depth_decode,
        depth_logits,
        transformer_step,
    )
    from .ops.residual_decode import residual_decode
    from .ops.residual_search import PackedCodebook, residual_search
    from .ops.sample_logits import sample_logits
    from .ops.soft_label import distance_softmax, fused_linear_soft_label_cross_entropy, soft_label_cross_entropy
    from .ops.stochastic_residual_search import stochastic_residual_search
    from .reference.depth_decode import BlockWeights
    from .reference.residual_search import ResidualCodes

__all__ = [
    "BlockWeights",
    "PackedCodebook",
    "PackedDepthDecoder",
    "PackedTransformer",
    "ResidualCodes",
    "code_statistics",
    "depth_attention",
    "depth_attention_packed",
    "depth_decode",
    "depth_logits",
    "distance_softmax",
    "fused_linear_soft_label_cross_entropy",
    "info",
    "reference",
    "residual_decode",
    "residual_search",
    "sample_logits",
    "soft_label_cross_entropy",
    "stochastic_residual_search",
    "transformer_step",
]
