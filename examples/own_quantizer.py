"""Accelerate a residual quantizer of your own with `rqkernels` alone: same parameters, same state dict, same codes.

python examples/own_quantizer.py
"""

import argparse
import time

import torch
from torch import Tensor, nn

import rqkernels


class Quantizer(nn.Module):
    """The usual formulation: an N x K distance matrix per depth."""

    def __init__(self, num_codes: int, channels: int, depth: int) -> None:
        super().__init__()
        self.codebook, self.depth = nn.Parameter(torch.randn(num_codes, channels)), depth

    def codes(self, x_nc: Tensor) -> Tensor:
        residual, codes = x_nc.detach(), []
        for _ in range(self.depth):
            codes.append(torch.cdist(residual, self.codebook.detach()).argmin(dim=-1))
            residual = residual - self.codebook.detach()[codes[-1]]
        return torch.stack(codes, dim=-1)

    def forward(self, x_nc: Tensor) -> tuple[Tensor, Tensor]:
        """Return the quantized vectors, with a straight-through gradient, and the codebook loss."""
        quantized = rqkernels.residual_decode(self.codes(x_nc), self.codebook)  # differentiable in the codebook
        return x_nc + (quantized - x_nc).detach(), (quantized - x_nc.detach()).square().mean()


class FastQuantizer(Quantizer):
    """The search of all depths in one call; nothing of size N x K is allocated."""

    def codes(self, x_nc: Tensor) -> Tensor:
        return rqkernels.residual_search(x_nc, self.codebook, self.depth).codes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Accelerate a residual quantizer in place.")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--codes", type=int, default=4096)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model, x = Quantizer(args.codes, 64, depth=4), torch.randn(args.rows, 64, requires_grad=True)
    found = {}
    for quantizer in (Quantizer, FastQuantizer):
        model.__class__ = quantizer  # in place: parameters, optimizer and checkpoints stay as they are
        start = time.perf_counter()
        found[quantizer] = model.codes(x)
        print(f"{quantizer.__name__}: {1e3 * (time.perf_counter() - start):.1f} ms")
    same = (found[Quantizer] == found[FastQuantizer]).all(dim=-1).float().mean()
    print(f"{same:.2%} of the rows have the same codes; the others differ by the rounding of cdist")
    quantized, loss = model(x)
    x_grad, codebook_grad = torch.autograd.grad(quantized.sum() + loss, [x, model.codebook])
    print(f"gradients: x {x_grad.abs().mean():.3f}, codebook {codebook_grad.abs().mean():.1e}")


if __name__ == "__main__":
    main()
