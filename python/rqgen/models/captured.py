"""Sampling in torch, with every shape the same at every position, so that a GPU can replay a position.

A captured CUDA graph repeats its launches with the addresses and shapes it was captured with. So the position is a
number in device memory: keys and values are written where it says, attention sees all the memory up to a bound and
masks what lies behind the position, and the drawn codes go where it says. A position is then one replay, with no look
at the device from the host. Masked keys are read in vain: a graph for every `BUCKET` positions keeps that small.

The prior's modules are called, and see one position at a time. What a graph has captured of them stays as it was: a
prior whose modules do more than compute from their tensors is launched step by step (`rqgen.models.sampler`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import rqkernels

from .kv_cache import PlacedCache
from .rqtransformer import RQTransformer

# Positions that share a graph. At 64 positions three quarters of the read keys are in use, at a few captures.
BUCKET = 16
# torch captures one graph at a time in a process, and what another thread launched on the same stream would be in it.
_ONE_CAPTURE = threading.Lock()


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream of warm-ups and captures. A single one: cuBLAS keeps 32 MiB for every stream it has seen, and what it
    got in the warm-up is there for the capture; and graphs that share memory must be captured on the same."""
    return torch.cuda.Stream(device)


class CapturedSampler:
    """Draws from the modules of a prior, position by position.

    Args:
        prior: in eval mode whenever codes are drawn.
        capture: replay CUDA graphs (the prior must be on a GPU); without, the same steps are launched one by one.
    """

    def __init__(self, prior: RQTransformer, *, capture: bool) -> None:
        self.prior, self.capture = prior, capture
        self._drawing: _Drawing | None = None

    @torch.no_grad()
    def sample(
        self,
        condition_bl: Tensor,
        known_btd: Tensor,
        *,
        temperature: Sequence[float],
        top_k: Sequence[int | None],
        top_p: Sequence[float | None],
        guidance: float = 0.0,
        seed: int,
        offset: int = 0,
        advance: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """See `rqgen.models.sampler.Sampler`. Graphs are kept for the next call of the same batch size and settings.

        Raises:
            ValueError: logits with NaN, +inf, or nothing but -inf; known when all positions are drawn.
        """
        prior = self.prior
        # A graph reads the memory that it was captured with: what is written there is seen, another tensor is not.
        weights = tuple(tensor.data_ptr() for tensor in (*prior.parameters(), *prior.buffers())) if self.capture else ()
        settings = _Settings(len(condition_bl), tuple(temperature), tuple(top_k), tuple(top_p), guidance, seed, weights)
        with torch.autocast(prior.device.type, enabled=False):
            drawing = self._drawing
            if drawing is None or drawing.settings != settings:
                self._drawing = None  # its memory is free for the next one
                drawing = self._drawing = _Drawing(prior, settings)
            drawing.begin(condition_bl, known_btd, offset)
            drawing.draw_stack()
            advance()
            for position in range(known_btd.shape[1] + 1, prior.positions):
                # Tokens seen by then: the condition's and the stacks before this position.
                bound = -(-(prior.config.condition_length + position) // BUCKET) * BUCKET
                bound = min(bound, drawing.spatial.capacity)
                if self.capture:
                    drawing.graph(bound).replay()
                else:
                    drawing.draw_next(bound)
                advance()
            try:
                drawing.check()
            except ValueError:
                # Its keys and values have NaN, which even without weight would be in all that it draws hereafter.
                self._drawing = None
                raise
            return drawing.codes_btd.clone()


class _Settings(NamedTuple):
    """What a captured graph cannot change."""

    batch: int
    temperature: tuple[float, ...]
    top_k: tuple[int | None, ...]
    top_p: tuple[float | None, ...]
    guidance: float
    seed: int
    weights: tuple[int, ...]
    """Addresses of the prior's tensors."""


class _Drawing:
    """The memory of a batch and the graphs that work on it; everything that a replay touches keeps its address.

    Attributes:
        offset: int64 on the device, the number of the first image.
        position: int64 on the device, the position whose stack is drawn next, or was drawn last.
        context_bw: the context of that position, (copies * B, W).
        codes_btd: what is known and drawn.
        lowest_b: the lowest code that was drawn for an image, -1 where logits had no distribution. (That code is never
            looked up: a device on which a look-up was out of range does nothing more for this process.)
    """

    def __init__(self, prior: RQTransformer, settings: _Settings) -> None:
        self.prior, self.settings = prior, settings
        # With guidance the null condition follows the condition, in a second half.
        self.copies = 2 if settings.guidance else 1
        rows = self.copies * settings.batch
        self.spatial, self.depth = prior.new_caches(rows)
        # Masked keys and values have no weight, but NaN without weight is NaN.
        self.spatial.keys.zero_()
        self.spatial.values.zero_()
        self.offset, self.position = (torch.zeros(1, dtype=torch.int64, device=prior.device) for _ in range(2))
        self.codes_btd = self.position.new_zeros(settings.batch, prior.positions, prior.depth)
        self.lowest_b = self.position.new_zeros(settings.batch)
        self.context_bw = self.spatial.keys.new_empty(rows, prior.config.embed_dim)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def begin(self, condition_bl: Tensor, known_btd: Tensor, offset: int) -> None:
        """The context of the first position that is not known."""
        known = known_btd.shape[1]
        if self.settings.guidance:
            condition_bl = torch.cat([condition_bl, self.prior.condition_ids(None, self.settings.batch)])
        self.spatial.reset()
        known_bnd = known_btd.repeat(self.copies, 1, 1)
        self.context_bw.copy_(self.prior.spatial_outputs(known_bnd, condition_bl, self.spatial)[:, -1])
        self.codes_btd[:, :known] = known_btd
        self.lowest_b.zero_()
        self.offset.fill_(offset)
        self.position.fill_(known)

    def draw_stack(self) -> None:
        """The D codes of the position."""

        settings, first = self.settings, self.position * self.prior.depth

        def draw(logits: Tensor, d: int) -> Tensor:
            if settings.guidance:
                conditional, null = logits.chunk(2)
                logits = (1 + settings.guidance) * conditional - settings.guidance * null
            codes = rqkernels.sample_logits(
                logits,
                temperature=settings.temperature[d],
                top_k=settings.top_k[d],
                top_p=settings.top_p[d],
                seed=settings.seed,
                offset=self.offset,
                stream=first + d,
            )
            torch.minimum(self.lowest_b, codes, out=self.lowest_b)
            return codes.clamp_min(0).repeat(self.copies)

        stack_bd = self.prior.sample_stack(self.context_bw, draw, self.depth)[: settings.batch]
        self.codes_btd.index_copy_(1, self.position, stack_bd[:, None])

    def draw_next(self, bound: int) -> None:
        """The D codes of the position after it, of which no more than `bound` tokens are seen."""
        prior = self.prior
        stack_b1d = self.codes_btd.index_select(1, self.position).repeat(self.copies, 1, 1)
        x_b1w = prior.embed_stacks(stack_b1d) + prior.spatial_positions.index_select(0, self.position)
        cache = PlacedCache(self.spatial, self.position + prior.config.condition_length, bound)
        self.context_bw.copy_(prior.spatial_transformer(prior.embedding_dropout(x_b1w), cache)[:, 0])
        self.position += 1
        self.draw_stack()

    def check(self) -> None:
        """Waits for the device.

        Raises:
            ValueError: a code that could not be drawn.
        """
        failed = (self.lowest_b < 0).nonzero().flatten().tolist()
        if failed:
            image = int(self.offset) + failed[0]
            raise ValueError(f"prior: the logits of image {image} have NaN, +inf, or nothing but -inf")

    def graph(self, bound: int) -> torch.cuda.CUDAGraph:
        """`draw_next(bound)` captured, at the first call; the state stays as it is."""
        if bound in self._graphs:
            return self._graphs[bound]
        state = [(t, t.clone()) for t in (self.position, self.context_bw, self.codes_btd, self.lowest_b)]
        with _ONE_CAPTURE, torch.cuda.device(self.prior.device):
            # What libraries set up at a first call must not happen in a capture. (The keys and values it writes are
            # those that the replay will write.)
            aside = _aside(self.prior.device)
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self.draw_next(bound)
            torch.cuda.current_stream().wait_stream(aside)
            for tensor, content in state:
                tensor.copy_(content)
            graph = torch.cuda.CUDAGraph()
            # Graphs that follow one another can share their scratch memory: all that a replay leaves behind stands
            # elsewhere. What other threads ask of CUDA meanwhile, memory for one, is no error of this capture.
            pool = next((other.pool() for other in self._graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                self.draw_next(bound)
        self._graphs[bound] = graph
        return graph
