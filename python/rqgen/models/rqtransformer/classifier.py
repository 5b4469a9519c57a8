"""The output layer of an RQ-Transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rqkernels

from ..changes import as_written
from .loss import CodeLoss, SoftLabels

INIT_STD = 0.02


@as_written()
class CodeClassifier(nn.Module):
    """LayerNorm, then a linear layer to K logits: one for all depths (K, W), or one per depth (D, K, W)."""

    def __init__(self, width: int, codebook_size: int, depth: int, shared: bool) -> None:
        super().__init__()
        leading = () if shared else (depth,)
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.empty(*leading, codebook_size, width))
        self.bias = nn.Parameter(torch.zeros(*leading, codebook_size))
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, x: Tensor, d: int | None = None) -> Tensor:
        """Map (N, D, W) to (N, D, K) float32; with `d`, the states of that one depth: (N, W) -> (N, K)."""
        x = self.norm(x)
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias).float()
        if d is not None:
            return F.linear(x, self.weight[d], self.bias[d]).float()
        return (torch.einsum("ndw,dkw->ndk", x, self.weight) + self.bias).float()

    def soft_label_loss(self, x: Tensor, labels: SoftLabels) -> CodeLoss:
        """Return the loss of the logits of x (N, D, W) against soft labels; at most 32 MiB of these logits exist at a
        time. This replaces `forward` and the loss of its result, and does not call it."""
        x = self.norm(x)
        rows, depth, _ = x.shape
        residuals, codebooks, tau = labels
        residuals = residuals.reshape(rows, depth, -1)
        if self.weight.dim() == 2:
            losses = x.new_empty(rows, depth, dtype=torch.float32)
            mean = rqkernels.fused_linear_soft_label_cross_entropy(
                x, self.weight, self.bias, residuals, codebooks, tau, losses_out=losses
            )
            return CodeLoss(mean, losses.mean(dim=0))
        books = codebooks if codebooks.dim() == 3 else [codebooks] * depth
        means = [
            rqkernels.fused_linear_soft_label_cross_entropy(x[:, d], weight, bias, residuals[:, d], books[d], tau)
            for d, (weight, bias) in enumerate(zip(self.weight.unbind(), self.bias.unbind(), strict=True))
        ]
        per_depth = torch.stack(means)
        return CodeLoss(per_depth.mean(), per_depth.detach())
