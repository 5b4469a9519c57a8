"""Usage of a codebook, counted over a running window of positions."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class UsageCounts(Protocol):
    """Counts of the codes chosen at each level (depth or scale) within a window."""

    def counts(self) -> Tensor:
        """int64 (levels, K)."""
        ...

    def codes_used(self) -> Tensor:
        """int64 (levels,): number of different codes."""
        ...

    def perplexity(self) -> Tensor:
        """float32 (levels,): exp of the entropy of the codes' frequencies."""
        ...


class CodeUsage(nn.Module):
    """Per-depth code counts over a running window.

    The window is measured in positions (quantized vectors), not batches, so the figures do not depend on the
    batch size. Two count tables are kept: the window being filled and the full one before it; every figure is
    taken over their sum, hence over at least the last `window` positions and at most twice as many (fewer at
    the start). That is O(D*K) memory however long the window is, and needs no read-back from the device.

    All state lies in buffers and is saved with the model, so a resumed run reports what it would have.

    Args:
        depth: D, codes per position.
        codebook_size: K.
        window: positions per count table, >= 1.
    """

    current: Tensor
    previous: Tensor
    positions: Tensor

    def __init__(self, depth: int, codebook_size: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("current", torch.zeros(depth, codebook_size, dtype=torch.int64))
        self.register_buffer("previous", torch.zeros(depth, codebook_size, dtype=torch.int64))
        self.register_buffer("positions", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, codes: Tensor) -> None:
        """Count `codes` int64 (..., D); code -1 (a position that was not finite) counts nowhere."""
        depth, codebook_size = self.current.shape
        codes_dn = codes.reshape(-1, depth).t()
        # A spare last column takes the -1 codes; selecting them away would read their number back.
        table = torch.zeros(depth, codebook_size + 1, dtype=torch.int64, device=codes.device)
        columns = torch.where(codes_dn < 0, codebook_size, codes_dn)
        table.scatter_add_(1, columns, torch.ones_like(columns))
        full = self.positions >= self.window
        self.previous.copy_(torch.where(full, self.current, self.previous))
        self.current.copy_(torch.where(full, 0, self.current) + table[:, :codebook_size])
        self.positions.copy_(torch.where(full, 0, self.positions) + codes_dn.shape[1])

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything counted so far."""
        for table in (self.current, self.previous, self.positions):
            table.zero_()

    def counts(self) -> Tensor:
        """int64 (D, K): how often each code was chosen at each depth within the window."""
        return self.current + self.previous

    def codes_used(self) -> Tensor:
        """int64 (D,): number of different codes chosen at each depth within the window."""
        return (self.counts() > 0).sum(dim=1)

    def perplexity(self) -> Tensor:
        """float32 (D,): `exp(-sum_k p_k log p_k)` of the code frequencies p at each depth.

        Between 1 (one code) and K (all alike); 0 where nothing has been counted.
        """
        counts = self.counts().double()
        totals = counts.sum(dim=1)
        p_dk = counts / totals.clamp(min=1).unsqueeze(1)
        entropy = -torch.special.xlogy(p_dk, p_dk).sum(dim=1)
        return torch.where(totals > 0, entropy.exp(), 0.0).float()
