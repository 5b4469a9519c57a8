"""Keys and values of the positions a transformer has already seen, as an explicit object."""

from __future__ import annotations

import torch
from torch import Tensor

from rqgen.models import VAR, RQTransformer
from rqgen.models.transformer import Transformer


class KVCache:
    """Preallocated keys and values of every layer of one stack, written in place.

    The caller owns it and passes it in; the stack writes behind `length` and advances it. Nothing is
    concatenated, and `length` is a Python int, so a step needs no host-device synchronisation.

    Attributes:
        keys, values: (layers, batch, heads, capacity, head_dim); only the first `length` are in use.
        length: positions seen so far.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, batch, heads, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: int, k_bhnd: Tensor, v_bhnd: Tensor) -> tuple[Tensor, Tensor]:
        """Store n new positions of one layer; return its keys and values of all positions, as views.

        `length` stays as it is, because every layer of a pass writes to the same positions: call `advance`
        after the last one.

        Raises:
            ValueError: another batch size than the cache's, or more positions than its capacity.
        """
        end = self.length + k_bhnd.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache: expected at most {self.capacity} positions, its capacity, got {end}")
        if k_bhnd.shape[0] != self.keys.shape[1]:
            raise ValueError(f"cache: expected {self.keys.shape[1]} rows, got {k_bhnd.shape[0]}")
        self.keys[layer, :, :, self.length : end] = k_bhnd
        self.values[layer, :, :, self.length : end] = v_bhnd
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def mask(self, new: int) -> Tensor | None:
        """Mark the keys that each of `new` positions behind `length` sees, bool (new, length + new); None where that is
        all of them, or where nothing was seen before and attention is causal without an offset."""
        if self.length == 0 or new == 1:
            return None
        seen = torch.ones(new, self.length + new, dtype=torch.bool, device=self.keys.device)
        return seen.tril(self.length)

    def advance(self, positions: int) -> None:
        """Count the positions that all layers have written."""
        self.length += positions

    def reset(self) -> None:
        """Forget every position; the memory is kept."""
        self.length = 0


class PlacedCache(KVCache):
    """One step's view of a cache in which the position is a number on the device, so that a CUDA graph can be replayed
    for the next one: every step reads and writes memory of the same shape.

    Args:
        cache: the cache that the step writes to; its `length` does not change.
        place: int64 (1,), where the step's one position is written.
        bound: how many positions attention reads; those behind `place` are masked.
    """

    def __init__(self, cache: KVCache, place: Tensor, bound: int) -> None:
        self.keys, self.values, self.length = cache.keys, cache.values, 0
        self._place, self._bound = place, bound
        self._seen = (torch.arange(bound, device=place.device) <= place)[None, None, None]

    def write(self, layer: int, k_bhnd: Tensor, v_bhnd: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self._place, k_bhnd)
        values.index_copy_(2, self._place, v_bhnd)
        return keys[:, :, : self._bound], values[:, :, : self._bound]

    def mask(self, new: int) -> Tensor | None:
        return self._seen

    def advance(self, positions: int) -> None:
        """Do nothing: the owner of `place` moves it."""


def cache_dtype(prior: RQTransformer | VAR) -> torch.dtype:
    """Return the dtype of a prior's keys and values: its own, or autocast's."""
    if torch.is_autocast_enabled(prior.device.type):
        return torch.get_autocast_dtype(prior.device.type)
    return prior.dtype


def stack_cache(stack: Transformer, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Return an empty cache of one stack for `batch` rows of up to `capacity` positions."""
    head_dim = stack.width // stack.heads
    return KVCache(len(stack.blocks), batch, stack.heads, capacity, head_dim, dtype=dtype, device=device)


def stack_caches(prior: RQTransformer, batch: int) -> tuple[KVCache, KVCache]:
    """Return empty caches of the spatial and the depth transformer for sampling `batch` code maps."""
    dtype, device = cache_dtype(prior), prior.device
    capacity = prior.config.condition_length + prior.positions - 1
    return (
        stack_cache(prior.spatial_transformer, batch, capacity, dtype=dtype, device=device),
        stack_cache(prior.depth_transformer, batch, prior.depth, dtype=dtype, device=device),
    )


def scale_cache(prior: VAR, batch: int) -> KVCache:
    """Return an empty cache of all tokens for sampling `batch` images of a VAR."""
    heads = prior.config.heads
    shape = len(prior.blocks), batch, heads, prior.ends[-1], prior.config.embed_dim // heads
    return KVCache(*shape, dtype=cache_dtype(prior), device=prior.device)
