"""Sampling in torch, with every shape the same at every position, so that a GPU can replay a position.

A captured CUDA graph repeats its launches with the addresses and shapes it was captured with. So the position is a
number in device memory: keys and values are written there, attention reads all the memory up to a bound and masks the
part behind the position, and the sampled codes are written there. A position is then one replay, with no host sync.
Reading masked keys is wasted work: a graph for every `BUCKET` positions keeps it small.

The prior's modules are called, and see one position at a time. A graph keeps what it has captured of them: a
prior whose modules do more than compute from their tensors is launched step by step (`rqgen.inference.stacks`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import rqkernels
from rqgen.models import RQTransformer

from .kv_cache import PlacedCache, stack_caches
from .packed import known_stacks
from .params import LevelParams, refuse_failed
from .sampler import Sampled, no_progress

# Positions that share a graph. At 64 positions three quarters of the read keys are in use, at a few captures.
BUCKET = 16
# torch captures one graph at a time in a process, and what another thread launched on the same stream would be in it.
_ONE_CAPTURE = threading.Lock()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of warm-ups and captures. A single one: cuBLAS keeps 32 MiB for every stream it has seen, and
    what it got in the warm-up is there for the capture; and graphs that share memory must be captured on the same."""
    return torch.cuda.Stream(device)


class CapturedSampler:
    """Sample from the modules of a prior, position by position.

    Args:
        prior: in eval mode whenever codes are sampled.
        capture: replay CUDA graphs (the prior must be on a GPU); without, the same steps are launched one by one.
    """

    def __init__(self, prior: RQTransformer, *, capture: bool) -> None:
        self.prior, self.capture = prior, capture
        self._batch: _Batch | None = None

    def steps(self, known: int = 0) -> int:
        """Return the number of positions that are not known."""
        return self.prior.positions - known // self.prior.depth

    @torch.no_grad()
    def sample(
        self,
        condition_ids: Tensor,
        params: LevelParams,
        *,
        first_image: int = 0,
        known: Tensor | None = None,
        advance: Callable[[int], None] = no_progress,
    ) -> Sampled:
        """See `rqgen.inference.Sampler`. Graphs are kept for the next call of the same batch size and settings.

        Raises:
            ValueError: logits with NaN, +inf, or nothing but -inf; known when all positions are sampled.
        """
        prior, batch = self.prior, len(condition_ids)
        known_btd = known_stacks(condition_ids, known, prior.depth)
        # A graph reads the memory that it was captured with: new values there are seen, another tensor is not.
        weights = tuple(tensor.data_ptr() for tensor in (*prior.parameters(), *prior.buffers())) if self.capture else ()
        settings = _Settings(batch, params, weights)
        with torch.autocast(prior.device.type, enabled=False):
            batch_state = self._batch
            if batch_state is None or batch_state.settings != settings:
                self._batch = None  # its memory is free for the next one
                batch_state = self._batch = _Batch(prior, settings)
            batch_state.begin(condition_ids, known_btd, first_image)
            batch_state.sample_stack()
            advance(batch)
            for position in range(known_btd.shape[1] + 1, prior.positions):
                # Tokens seen by then: the condition's and the stacks before this position.
                bound = -(-(prior.config.condition_length + position) // BUCKET) * BUCKET
                bound = min(bound, batch_state.spatial.capacity)
                if self.capture:
                    batch_state.graph(bound).replay()
                else:
                    batch_state.sample_next(bound)
                advance(batch)
            try:
                refuse_failed(batch_state.min_code_b, first_image)
            except ValueError:
                # Its keys and values have NaN, which even with weight zero would be in all later samples.
                self._batch = None
                raise
            return Sampled(batch_state.codes_btd.clone().view(batch, *prior.config.code_shape))


class _Settings(NamedTuple):
    """Settings that a captured graph cannot change."""

    batch: int
    params: LevelParams
    weights: tuple[int, ...]
    """Addresses of the prior's tensors."""


class _Batch:
    """The memory of a batch and the graphs that work on it; everything that a replay touches keeps its address.

    Attributes:
        offset: int64 on the device, the number of the first image.
        position: int64 on the device, the position whose stack is sampled next, or was sampled last.
        context_bw: the context of that position, (copies * B, W).
        codes_btd: the known and the sampled codes.
        min_code_b: the lowest code that was sampled for an image, -1 where logits had no distribution. (That code is
            never looked up: after a look-up out of range a device is unusable for this process.)
    """

    def __init__(self, prior: RQTransformer, settings: _Settings) -> None:
        self.prior, self.settings = prior, settings
        # With guidance the null condition follows the condition, in a second half.
        self.copies = settings.params.copies
        rows = self.copies * settings.batch
        self.spatial, self.depth = stack_caches(prior, rows)
        # Masked keys and values have weight zero, but zero times NaN is NaN.
        self.spatial.keys.zero_()
        self.spatial.values.zero_()
        self.offset, self.position = (torch.zeros(1, dtype=torch.int64, device=prior.device) for _ in range(2))
        self.codes_btd = self.position.new_zeros(settings.batch, prior.positions, prior.depth)
        self.min_code_b = self.position.new_zeros(settings.batch)
        self.context_bw = self.spatial.keys.new_empty(rows, prior.config.embed_dim)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def begin(self, condition_bl: Tensor, known_btd: Tensor, offset: int) -> None:
        """Compute the context of the first position that is not known."""
        known = known_btd.shape[1]
        if self.settings.params.cfg_scale:
            condition_bl = torch.cat([condition_bl, self.prior.condition_ids(None, self.settings.batch)])
        self.spatial.reset()
        known_bnd = known_btd.repeat(self.copies, 1, 1)
        self.context_bw.copy_(self.prior.spatial_outputs(known_bnd, condition_bl, self.spatial)[:, -1])
        self.codes_btd[:, :known] = known_btd
        self.min_code_b.zero_()
        self.offset.fill_(offset)
        self.position.fill_(known)

    def sample_stack(self) -> None:
        """Sample the D codes of the position."""

        params, first = self.settings.params, self.position * self.prior.depth

        def sample(logits: Tensor, d: int) -> Tensor:
            codes = rqkernels.sample_logits(
                params.guide(logits, d),
                temperature=params.temperature[d],
                top_k=params.top_k[d],
                top_p=params.top_p[d],
                seed=params.seed,
                offset=self.offset,
                stream=first + d,
            )
            torch.minimum(self.min_code_b, codes, out=self.min_code_b)
            return codes.clamp_min(0).repeat(self.copies)

        stack_bd = self.prior.sample_stack(self.context_bw, sample, self.depth)[: self.settings.batch]
        self.codes_btd.index_copy_(1, self.position, stack_bd[:, None])

    def sample_next(self, bound: int) -> None:
        """Sample the D codes of the next position, attending to at most `bound` cached tokens."""
        prior = self.prior
        stack_b1d = self.codes_btd.index_select(1, self.position).repeat(self.copies, 1, 1)
        x_b1w = prior.embed_stacks(stack_b1d) + prior.spatial_positions.index_select(0, self.position)
        cache = PlacedCache(self.spatial, self.position + prior.config.condition_length, bound)
        self.context_bw.copy_(prior.spatial_transformer(prior.embedding_dropout(x_b1w), cache)[:, 0])
        self.position += 1
        self.sample_stack()

    def graph(self, bound: int) -> torch.cuda.CUDAGraph:
        """Return `sample_next(bound)` captured, at the first call; the state stays as it is."""
        if bound in self._graphs:
            return self._graphs[bound]
        state = [(t, t.clone()) for t in (self.position, self.context_bw, self.codes_btd, self.min_code_b)]
        with _ONE_CAPTURE, torch.cuda.device(self.prior.device):
            # Libraries' first-call initialisation must not happen in a capture. (The keys and values written here are
            # those that the replay will write.)
            side = _capture_stream(self.prior.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.sample_next(bound)
            torch.cuda.current_stream().wait_stream(side)
            for tensor, content in state:
                tensor.copy_(content)
            graph = torch.cuda.CUDAGraph()
            # Graphs that run one after another can share their scratch memory: a replay's results are stored elsewhere.
            # CUDA calls of other threads meanwhile, such as allocations, are not errors of this capture.
            pool = next((other.pool() for other in self._graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.sample_next(bound)
        self._graphs[bound] = graph
        return graph
