"""Convolutions and their activation with the same bits for every number of threads, where images and codes are made.

On a CPU torch sums convolutions of few numbers, and those of 1x1 where it runs on one thread, by a matrix product whose
order of sums follows the number of threads; and it computes exponentials by one formula where vectors are whole and
by another at the ends of each thread's part. What oneDNN does in the layouts chosen here, and exponentials by
themselves, depend on neither (tests say so; no library promises it). In training and under autocast the choice is
torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F


class Convolution(nn.Conv2d):
    """`nn.Conv2d` with zeros for padding; without gradients, in float32 and on a CPU the same to the last bit on any
    number of threads, for inputs (N, C, H, W)."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        usual = input.ndim == 4 and self.padding_mode == "zeros" and _same_bits_wanted(input)
        if isinstance(self.padding, str) or not (usual and torch.backends.mkldnn.is_available()):
            return super()._conv_forward(input, weight, bias)
        if self.kernel_size == (1, 1):
            # Rows of channels: of the layouts the one in which oneDNN does not split these sums among threads. A copy
            # even where only the strides of a single image differ, by which the layout would go unseen.
            input = torch.empty_like(input, memory_format=torch.channels_last).copy_(input)
        convolved = torch.mkldnn_convolution(input, weight, bias, self.padding, self.stride, self.dilation, self.groups)
        return convolved.contiguous()


def silu(x: Tensor) -> Tensor:
    """`x / (1 + exp(-x))`."""
    if not _same_bits_wanted(x):
        return F.silu(x)
    divisor = x.neg().exp_().add_(1)
    return torch.div(x, divisor, out=divisor)


def _same_bits_wanted(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0  # tangents are kept under no_grad too, and oneDNN's operator has none
    )
