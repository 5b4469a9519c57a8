"""The sampler of a VAR: token maps, scale by scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rqgen.models import VAR
from rqgen.models.changes import computes_as, warn_once
from rqkernels.reference import philox_uniform

from .kv_cache import scale_cache
from .params import LevelParams, refuse_failed
from .sampler import Engine, Sampled, make_sampler, no_progress, step_logits

# The fourth counter word of the smooth mode's noise; operators use small numbers there.
_OP_SMOOTH = 0x5A00


class KnownRegion(NamedTuple):
    """Parts of images that are kept, see `ScaleSampler.sample`."""

    latents: Tensor
    """(B, C, H, W): what the tokenizer's encoder makes of the images."""
    nearest: Callable[[Tensor], Tensor]
    """Vectors (..., C) to codes: the tokenizer's `quantizer.nearest`."""
    share: Tensor
    """(B, 1, H, W): the share of each place of the latents that is to be kept, 0 .. 1."""

    def of(self, rows: slice) -> KnownRegion:
        """Return the region of some of the images."""
        return KnownRegion(self.latents[rows], self.nearest, self.share[rows])


class ScaleSampler:
    """Sample the token maps of a VAR.

    All tokens of a scale come from one pass over that scale's tokens alone; keys and values of the scales before it
    are read from the cache. The uniform of a token has row = the image's number, stream = the token's index.

    A prior with a `forward` of its own, or hooks on it, is called as a whole for each scale, without a cache.

    Args:
        prior: in eval mode whenever codes are sampled.
    """

    def __init__(self, prior: VAR) -> None:
        self.prior = prior

    def steps(self, known: int = 0) -> int:
        """Return the number of scales."""
        return self.prior.levels

    @torch.no_grad()
    def sample(
        self,
        condition_ids: Tensor,
        params: LevelParams,
        *,
        first_image: int = 0,
        known: Tensor | None = None,
        region: KnownRegion | None = None,
        advance: Callable[[int], None] = no_progress,
    ) -> Sampled:
        """See `Sampler`.

        With smooth sampling, what a scale adds is a mixture of codes and not the sampled one: weights
        softmax((logits (1 + p) + Gumbel noise) / max(0.27 (1 - 0.95 p), 0.005)), p = k / (K - 1), over the codes kept
        by top-k and top-p (the published code calls it more_smooth).

        Where a region is known, a place of scale k of which at least half is known takes the code nearest to the rest
        of the given latents there (their mean over the known part): whatever is sampled elsewhere, the known part is
        approached as closely as the tokenizer itself would.

        Raises:
            ValueError: logits with NaN, +inf, or nothing but -inf; known codes; smooth sampling of a prior that must be
                called as a whole, which takes codes, not mixtures.
        """
        prior = self.prior
        if known is not None and known.shape[1]:
            raise ValueError("known: a VAR samples whole token maps, expected None")
        whole = not computes_as(prior, VAR)
        if whole and params.smooth:
            raise ValueError(
                "smooth: mixtures of codes do not pass through forward, and this prior has hooks or its own"
            )
        if whole:
            warn_once(
                prior,
                "prior: it has forward hooks or a forward of its own, which sampling scale by scale would leave out: "
                "it is called as a whole for every scale, which takes longer",
            )
        # A matrix product's last bits depend on its number of rows: on the CPU each image goes alone, and comes out
        # the same however a batch is split.
        count = len(condition_ids)
        step = 1 if prior.device.type == "cpu" else max(count, 1)
        parts = []
        for start in range(0, count, step):
            rows = slice(start, start + step)
            some = None if region is None else region.of(rows)
            scales = _Scales(
                prior, params, condition_ids[rows], first_image=first_image + start, region=some, whole=whole
            )
            parts.append(scales.sample(advance))
        vectors = None
        if params.smooth:
            vectors = [torch.cat(same) for same in zip(*(part.vectors for part in parts), strict=True)]
        return Sampled(prior.layout.concatenate([part.codes for part in parts]), vectors)


@make_sampler.register
def make_scale_sampler(prior: VAR, engine: Engine) -> ScaleSampler:
    """Make a VAR ready. Raise ValueError for another precision than "fp32"."""
    engine.check_prior(prior)
    return ScaleSampler(prior)


class _Scales:
    """The scales of some images, one after another."""

    def __init__(
        self,
        prior: VAR,
        params: LevelParams,
        condition_ids: Tensor,
        *,
        first_image: int,
        region: KnownRegion | None,
        whole: bool,
    ) -> None:
        self._prior, self._params, self._first_image, self._region = prior, params, first_image, region
        self._batch, self._whole = len(condition_ids), whole
        self._ids = condition_ids
        if params.cfg_scale:
            self._ids = torch.cat([condition_ids, prior.condition_ids(None, self._batch)])
        if not whole:
            self._modulation, self._cache = prior.modulation(self._ids[:, 0]), scale_cache(prior, len(self._ids))

    def sample(self, advance: Callable[[int], None]) -> Sampled:
        """Sample the token maps, and with smooth sampling return the mixtures too."""
        prior, params, region, quantizer = self._prior, self._params, self._region, self._prior.quantizer
        rest = None if region is None else region.latents.float()
        total: Tensor | None = None
        codes: list[Tensor] = []
        mixtures: list[Tensor] = []
        min_code_b = torch.zeros(self._batch, dtype=torch.int64, device=prior.device)
        last = max(prior.levels - 1, 1)
        for k, (height, width) in enumerate(prior.scales):
            logits_blk = params.guide(self._logits(k, total, codes), k)
            begin = prior.ends[k] - height * width
            tokens = params.sample(logits_blk, k, first_image=self._first_image, first_stream=begin)
            min_code_b = torch.minimum(min_code_b, tokens.amin(1))
            vectors = None
            if params.smooth:
                kept = params.kept(logits_blk, k)
                weights = _mixture(kept, k / last, params.seed, self._first_image, begin)
                tokens = weights.argmax(dim=-1)
                vectors = (weights @ quantizer.codebook.float()).view(self._batch, height, width, -1)
            tokens = tokens.view(self._batch, height, width)
            if region is not None and rest is not None:
                known, nearest = _nearest_to_region(prior, region, rest, k)
                tokens = torch.where(known, nearest, tokens)
                if vectors is not None:
                    vectors = torch.where(known.unsqueeze(-1), quantizer.embed(nearest), vectors)
            codes.append(tokens)
            if vectors is None:
                vectors = quantizer.embed(tokens)
            else:
                mixtures.append(vectors)
            contribution = quantizer.contribution(k, vectors)
            total = contribution if total is None else total + contribution
            if rest is not None:
                rest = rest - contribution
            advance(self._batch)
        refuse_failed(min_code_b, self._first_image)  # on a GPU nothing was raised before
        return Sampled(codes, mixtures if params.smooth else None)

    def _logits(self, k: int, total: Tensor | None, codes: list[Tensor]) -> Tensor:
        """Return logits (copies * B, l, K) of scale k, given the scales before: their sum, and their token maps."""
        prior, copies = self._prior, self._params.copies
        if not self._whole:
            features = None
            if total is not None:
                features = prior.quantizer.downsample(total, k).repeat(copies, 1, 1, 1)
            return prior.scale_logits(k, features, self._modulation, self._cache)
        codes_bl = self._ids.new_zeros(self._batch, prior.layout.count)
        places = prior.steps[k][1]
        if codes:
            codes_bl[:, : places.start] = torch.cat([tokens.flatten(1) for tokens in codes], dim=1)
        return torch.cat([step_logits(prior, codes_bl, part, places) for part in self._ids.chunk(copies)])


def _nearest_to_region(prior: VAR, region: KnownRegion, rest: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the places of scale k that are kept, bool (B, h, w), and the codes nearest to the known part of the rest
    there."""
    known = region.share.to(rest.dtype)
    share = prior.quantizer.downsample(known, k)
    mean = prior.quantizer.downsample(rest * known, k) / share.clamp(min=torch.finfo(rest.dtype).tiny)
    return share.squeeze(-1) >= 0.5, region.nearest(mean)


def _mixture(logits_blk: Tensor, progress: float, seed: int, first_image: int, begin: int) -> Tensor:
    """Return weights (B, l, K) of the codes in the smooth mode; the noise of a code depends on image, token and
    code."""
    batch, length, num_codes = logits_blk.shape
    device = logits_blk.device
    rows = first_image + torch.arange(batch, device=device).view(-1, 1, 1)
    tokens = begin + torch.arange(length, device=device).view(-1, 1)
    stream = tokens * num_codes + torch.arange(num_codes, device=device)
    uniform = philox_uniform(rows, seed=seed, stream=stream, op_id=_OP_SMOOTH)
    noise = -(-uniform.log()).log()
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return torch.softmax((logits_blk.double() * (1 + progress) + noise) / temperature, dim=-1).float()
