"""Plain-PyTorch definitions of all operators: slow and obvious; kernels are correct if they agree.

Each function has the name, arguments and meaning of its twin in `rqkernels`, and accepts and refuses the same arguments
with the same messages. It also takes float64, and then computes in it. The references import torch and the argument
checks only, so that a question about a kernel can be settled by reading one page.
"""

from .code_statistics import code_statistics
from .depth_attention import depth_attention, depth_attention_packed
from .depth_decode import (
    BlockWeights,
    PackedDepthDecoder,
    PackedTransformer,
    depth_decode,
    depth_logits,
    transformer_step,
)
from .philox import OP_SAMPLE_LOGITS, OP_STOCHASTIC_RESIDUAL_SEARCH, philox_uniform
from .residual_decode import residual_decode
from .residual_search import PackedCodebook, ResidualCodes, residual_search
from .sample_logits import sample_logits
from .soft_label import distance_softmax, fused_linear_soft_label_cross_entropy, soft_label_cross_entropy
from .stochastic_residual_search import stochastic_residual_search

__all__ = [
    "OP_SAMPLE_LOGITS",
    "OP_STOCHASTIC_RESIDUAL_SEARCH",
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
    "philox_uniform",
    "residual_decode",
    "residual_search",
    "sample_logits",
    "soft_label_cross_entropy",
    "stochastic_residual_search",
    "transformer_step",
]
