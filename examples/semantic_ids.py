"""Turn item embeddings into semantic IDs by residual k-means, with `rqkernels` alone.

python examples/semantic_ids.py                              # embeddings made up of clusters
python examples/semantic_ids.py --embeddings items.npy       # float (N, C)
"""

import argparse

import numpy as np
import torch
from torch import Tensor

import rqkernels


def residual_kmeans(x_nc: Tensor, num_codes: int, depth: int, iterations: int) -> Tensor:
    """Fit one codebook per depth to what the depths before it leave (Lloyd's algorithm); float32 (depth, K, C)."""
    residual_nc, codebooks = x_nc.float(), []
    for _ in range(depth):
        codebook = residual_nc[torch.randperm(len(residual_nc))[:num_codes]].clone()
        for _ in range(iterations):
            codes = rqkernels.residual_search(residual_nc, codebook, depth=1).codes[:, 0]
            counts, sums = rqkernels.code_statistics(residual_nc, codes, num_codes)
            used = counts > 0
            codebook[used] = sums[used] / counts[used, None]
        codebooks.append(codebook)
        residual_nc = residual_nc - rqkernels.residual_search(residual_nc, codebook, depth=1).quantized
    return torch.stack(codebooks)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Turn item embeddings into semantic IDs.")
    parser.add_argument("--embeddings", help="a .npy file, float (N, C)")
    parser.add_argument("--items", type=int, default=20_000, help="number of made-up items without a file")
    parser.add_argument("--codes", type=int, default=256, help="codes per depth")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=10)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    if args.embeddings:
        x = torch.from_numpy(np.load(args.embeddings)).float()
        if x.ndim != 2:
            parser.error(f"--embeddings: expected an array (N, C), got shape {tuple(x.shape)}")
    else:
        x = torch.randn(500, 32)[torch.randint(500, (args.items,))] + 0.3 * torch.randn(args.items, 32)
    if not 1 <= args.codes <= len(x):
        parser.error(f"--codes: expected 1 to {len(x)}, the number of items, got {args.codes}")
    codebooks = residual_kmeans(x, args.codes, args.depth, args.iterations)
    ids = rqkernels.residual_search(x, codebooks).codes  # (N, depth): all depths in one call
    for depth in range(1, args.depth + 1):
        error = (rqkernels.residual_decode(ids, codebooks, depth=depth) - x).square().sum() / x.square().sum()
        print(f"depth {depth}: {error:.1%} of the energy left")
    print(f"{len(ids.unique(dim=0))} different IDs for {len(x)} items; item 0: {'-'.join(map(str, ids[0].tolist()))}")


if __name__ == "__main__":
    main()
