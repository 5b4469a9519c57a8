"""Token maps from a VAR, scale by scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rqgen.models import VAR
from rqgen.models.changes import computes_as, warn_once
from rqkernels.reference import philox_uniform

from .draw import DrawSettings

# The fourth counter word of the smooth mode's noise; operators have small numbers there.
_OP_SMOOTH = 0x5A00


class ScaleSample(NamedTuple):
    """What `sample_scales` draws."""

    codes: list[Tensor]
    """int64 (B, h_k, w_k), one per scale; in the smooth mode the code that weighs most."""
    mixtures: list[Tensor] | None
    """In the smooth mode: float32 (B, h_k, w_k, C), the vectors in the place of codes; `MultiScaleDecoder.combine` says
    what they stand for."""


class Given(NamedTuple):
    """Parts of images that are kept: see `sample_scales`."""

    latents: Tensor
    """(B, C, H, W): what the tokenizer's encoder makes of the images."""
    nearest: Callable[[Tensor], Tensor]
    """Vectors (..., C) to codes: the tokenizer's `quantizer.nearest`."""
    known: Tensor
    """(B, 1, H, W): the share of each place of the latents that is to be kept, 0 .. 1."""

    def of(self, rows: slice) -> Given:
        return Given(self.latents[rows], self.nearest, self.known[rows])


def sample_scales(
    prior: VAR,
    labels_b: Tensor,
    settings: DrawSettings,
    *,
    first_image: int,
    smooth: bool = False,
    given: Given | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> ScaleSample:
    """Draws the token maps of the images numbered first_image .. first_image + B - 1.

    All tokens of a scale come from one pass over that scale's tokens alone; keys and values of the scales before it
    are read from the cache. With guidance g, scale k = 0 .. K-1 draws from `(1 + t) conditional - t null`,
    t = g k / (K - 1). The uniform of a token has row = the image's number, stream = the token's index.

    A prior with a `forward` of its own, or hooks on it, is called as a whole for each scale, without a cache.

    Where images are given, a place of scale k of which at least half is known takes the code nearest to what is left
    there of the given latents (their mean over the known part): whatever was drawn elsewhere, the known part is
    approached as closely as the tokenizer itself would.

    Args:
        labels_b: int64 (B,), of `VAR.condition_ids`.
        settings: lists with one entry per scale.
        smooth: what a scale adds is a mixture of codes and not the drawn one: weights softmax((logits (1 + p) +
            Gumbel noise) / max(0.27 (1 - 0.95 p), 0.005)), p = k / (K - 1), over what top-k and top-p leave (for
            pictures; the published code calls it more_smooth).
        given: what is kept, for editing.
        advance: called with B after each scale.

    Raises:
        ValueError: logits with NaN, +inf, or nothing but -inf; the smooth mode with a prior that must be called as a
            whole, which takes codes and no mixtures.
    """
    whole = not computes_as(prior, VAR)
    if whole and smooth:
        raise ValueError("smooth: mixtures of codes do not pass through forward, and this prior has hooks or its own")
    if labels_b.device.type == "cpu" and len(labels_b) > 1:
        # A matrix product's last bits depend on its number of rows: on the CPU each image goes alone, and comes out
        # the same however a batch is split.
        parts = []
        for row in range(len(labels_b)):
            one = slice(row, row + 1)
            part = None if given is None else given.of(one)
            parts.append(
                sample_scales(
                    prior,
                    labels_b[one],
                    settings,
                    first_image=first_image + row,
                    smooth=smooth,
                    given=part,
                    advance=advance,
                )
            )
        codes = [torch.cat(maps) for maps in zip(*(part.codes for part in parts), strict=True)]
        mixtures = None
        if smooth:
            mixtures = [torch.cat(some) for some in zip(*(part.mixtures for part in parts), strict=True)]
        return ScaleSample(codes, mixtures)

    if whole:
        warn_once(
            prior,
            "prior: it has forward hooks or a forward of its own, which drawing scale by scale would leave out: it is "
            "called as a whole for every scale, which takes longer",
        )
    batch, quantizer = len(labels_b), prior.quantizer
    if settings.guidance:
        labels_b = torch.cat([labels_b, torch.full_like(labels_b, prior.config.num_classes)])
    if not whole:
        modulation, cache = prior.modulation(labels_b), prior.new_cache(len(labels_b))
    last = max(len(prior.scales) - 1, 1)
    rest, total, codes = None if given is None else given.latents.float(), None, []
    mixtures: list[Tensor] = []
    lowest_b = torch.zeros(batch, dtype=torch.int64, device=prior.device)
    for k, (height, width) in enumerate(prior.scales):
        if whole:
            logits_blk = _whole_logits(prior, labels_b, codes, settings.copies)
        else:
            features = None
            if total is not None:
                features = quantizer.shrink(total, k)
                features = features.repeat(settings.copies, 1, 1, 1)
            logits_blk = prior.scale_logits(k, features, modulation, cache)
        logits_blk = settings.guided(logits_blk, settings.guidance * k / last)
        begin = prior.ends[k] - height * width
        drawn = settings.draw(logits_blk, k, first_image=first_image, first_stream=begin)
        lowest_b = torch.minimum(lowest_b, drawn.amin(1))
        vectors = None
        if smooth:
            weights = _mixture(settings.kept(logits_blk, k), k / last, settings.seed, first_image, begin)
            drawn = weights.argmax(dim=-1)
            vectors = (weights @ quantizer.codebook.float()).view(batch, height, width, -1)
        drawn = drawn.view(batch, height, width)
        if given is not None:
            kept, nearest = _nearest_to_given(prior, given, rest, k)
            drawn = torch.where(kept, nearest, drawn)
            if vectors is not None:
                vectors = torch.where(kept.unsqueeze(-1), quantizer.embed(nearest), vectors)
        codes.append(drawn)
        if vectors is None:
            vectors = quantizer.embed(drawn)
        else:
            mixtures.append(vectors)
        added = quantizer.added(k, vectors)
        total = added if total is None else total + added
        if rest is not None:
            rest = rest - added
        advance(batch)
    failed = (lowest_b < 0).nonzero().flatten().tolist()  # on a GPU nothing was said before
    if failed:
        raise ValueError(f"prior: the logits of image {first_image + failed[0]} have NaN, +inf, or nothing but -inf")
    return ScaleSample(codes, mixtures if smooth else None)


def _whole_logits(prior: VAR, labels_b: Tensor, codes: list[Tensor], copies: int) -> Tensor:
    """Logits of the scale that follows these token maps, from `prior(codes, condition)`."""
    k, batch = len(codes), len(labels_b) // copies
    maps = [*codes, *(labels_b.new_zeros(batch, *scale) for scale in prior.scales[k:])]
    begin = prior.ends[k - 1] if k else 0
    logits = []
    for part_b in labels_b.chunk(copies):
        null = bool((part_b == prior.config.num_classes).all())
        logits.append(prior(maps, None if null else part_b).logits[:, begin : prior.ends[k]])
    return torch.cat(logits)


def _nearest_to_given(prior: VAR, given: Given, rest: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which places of scale k are kept, bool (B, h, w), and the codes nearest to the known part of the rest there."""
    known = given.known.to(rest.dtype)
    share = prior.quantizer.shrink(known, k)
    mean = prior.quantizer.shrink(rest * known, k) / share.clamp(min=torch.finfo(rest.dtype).tiny)
    return share.squeeze(-1) >= 0.5, given.nearest(mean)


def _mixture(logits_blk: Tensor, progress: float, seed: int, first_image: int, begin: int) -> Tensor:
    """Weights (B, l, K) of the codes in the smooth mode; the noise of a code depends on image, token and code."""
    batch, length, num_codes = logits_blk.shape
    device = logits_blk.device
    rows = first_image + torch.arange(batch, device=device).view(-1, 1, 1)
    tokens = begin + torch.arange(length, device=device).view(-1, 1)
    stream = tokens * num_codes + torch.arange(num_codes, device=device)
    uniform = philox_uniform(rows, seed=seed, stream=stream, op_id=_OP_SMOOTH)
    noise = -(-uniform.log()).log()
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return torch.softmax((logits_blk.double() * (1 + progress) + noise) / temperature, dim=-1).float()
