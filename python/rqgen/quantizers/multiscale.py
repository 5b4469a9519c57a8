"""Residual quantization over scales: a feature map as token maps from coarse to fine (Tian et al. 2024)."""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import rqkernels
from rqgen.config import check_bounds, one_of

from .convolution import Convolution
from .layout import CodeLayout
from .seeding import sample_vectors
from .state import is_recomputed, keeping_dtype, without_autocast
from .usage import CodeUsage

INITIALISATIONS = ("data", "random")
# Sides of the square token maps of the published tokenizer, by image size.
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


@dataclass
class MultiScaleConfig:
    """Settings of a `MultiScaleQuantizer`.

    Attributes:
        codebook_size: K, codes of the one codebook that all scales share.
        scales: sizes of the token maps, from coarse to fine: [h, w] each, or one number for a square. The last is
            the size of the feature map itself, and none may be larger. The default is the published list for
            images of 256x256 (for 512: `SCALES_512`).
        normalize: search among directions: features and codes divided by their norms, as in the published
            `using_znorm`. What is looked up is the code itself.
        refinements: R, how many 3x3 convolutions phi refine what is enlarged: 0 none, 1 for all scales, a number
            between shares them among neighbouring scales, one per scale where it is the number of scales.
        refinement_ratio: r of `phi(h) = (1 - r) h + r conv(h)`.
        init: "data": the codebook is sampled from the first training batch; "random": normal numbers.
        usage_window: tokens of a scale over which codes_used and perplexity are taken (see `CodeUsage`).
    """

    codebook_size: int = 4096
    scales: list[int | list[int]] = field(default_factory=lambda: list(SCALES_256))
    normalize: bool = False
    refinements: int = 4
    refinement_ratio: float = 0.5
    init: str = "data"
    usage_window: int = 131072

    def __post_init__(self) -> None:
        check_bounds(self, codebook_size=(1, 2**24), usage_window=(1, 2**48), refinements=(0, 256))
        if not 0.0 <= self.refinement_ratio <= 1.0:
            raise ValueError(f"refinement_ratio: expected a number within 0..1, got {self.refinement_ratio}")
        if self.init not in INITIALISATIONS:
            raise ValueError(f"init: {one_of(INITIALISATIONS, self.init)}")
        if not self.scales:
            raise ValueError("scales: expected at least one")
        if len(self.scales) > 256:
            raise ValueError(f"scales: expected at most 256, got {len(self.scales)}")
        self.scales = [list(_pair(scale)) for scale in self.scales]
        height, width = self.sizes[-1]
        if max(height, width) > 2**12:
            raise ValueError(f"scales: expected token maps of at most {2**12} a side, got {[height, width]}")
        for h, w in self.sizes:
            if h > height or w > width:
                raise ValueError(f"scales: expected none larger than the last, {[height, width]}, got {[h, w]}")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(h_k, w_k) of each scale."""
        return [_pair(scale) for scale in self.scales]

    @property
    def tokens(self) -> list[int]:
        """h_k * w_k of each scale."""
        return [h * w for h, w in self.sizes]


def scales_up_to(side: int) -> list[int]:
    """Sides of square token maps for a square feature map: the published list for the next larger images (256, 512 or
    1024 pixels at a stride of 16) short of what is too large, and ``side`` itself. ValueError beyond these lists."""
    for published in (SCALES_256, SCALES_512, SCALES_1024):
        if side <= published[-1]:
            return [*(scale for scale in published if scale < side), side]
    raise ValueError(f"scales: no published list reaches a feature map of {side}x{side}; give one")


def _pair(scale: int | Sequence[int]) -> tuple[int, int]:
    sides: list[Any] = list(scale) if isinstance(scale, (list, tuple)) else [scale, scale]
    whole = all(isinstance(side, numbers.Integral) and not isinstance(side, bool) and int(side) >= 1 for side in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(f"scales: expected [h, w] or one number >= 1 for each, got {scale!r}")
    height, width = map(int, sides)  # NumPy's integers are taken as well
    return height, width


def _nearest_refinements(count: int, scales: int) -> list[int]:
    """Index of phi for each scale; empty without any. Scale k stands at (k - 1) / (K - 1) of [0, 1] and takes the
    nearest of R that stand at even distances there, the first of two. The distances are the published code's choice
    (with four there is less room at the ends), and so is its rounding, which decides ties."""
    if count == 0:
        return []
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    places = np.linspace(margin, 1 - margin, count)
    return [int(np.abs(places - k / max(scales - 1, 1)).argmin()) for k in range(scales)]


TokensOf = Callable[[int, Tensor | None], Tensor]


class ScaleStep(NamedTuple):
    """Codes and sum of one scale, see `MultiScaleQuantizer.steps`."""

    codes: Tensor  # int64 (B, h_k, w_k)
    total: Tensor  # (B, C, H, W): f_hat, the sum of what this scale and those before it added


class MultiScaleOutput(NamedTuple):
    """Result of `MultiScaleQuantizer.forward` for features (B, C, H, W)."""

    quantized: Tensor  # (B, C, H, W), dtype of the input; value: f_hat of the last scale; gradient: the input's
    codes: list[Tensor]  # int64 (B, h_k, w_k), one per scale
    commitment_loss: Tensor  # float32: mean over scales of mean |f - sg[f_hat_k]|^2
    codebook_loss: Tensor  # float32: mean over scales of mean |sg[f] - f_hat_k|^2


class Refinement(Convolution):
    """phi: `(1 - r) h + r conv(h)`, a 3x3 convolution that sharpens what enlarging blurred."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1, dtype=torch.float32)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        return (1.0 - self.ratio) * h + self.ratio * super().forward(h)


class MultiScaleDecoder(nn.Module):
    """Decoder of token maps of several scales to feature maps (B, C, H, W) (Tian et al. 2024, algorithm 2).

        f_hat_k = f_hat_{k-1} + a_k,    a_k = phi_k(bicubic(e(t_k), (H, W)))       looked up, enlarged, refined

    for scales k = 1..K of size (h_k, w_k), f_hat_0 = 0. `steps` is the one residual loop; decoding, the inputs of a
    prior, and encoding and training (in `MultiScaleQuantizer`) are readings of it. Arithmetic, codebook and refinements
    are float32, under autocast and after `.half()`/`.bfloat16()`/`.double()` too.

    Args:
        config: see `MultiScaleConfig`.
        code_dim: C.
    """

    def __init__(self, config: MultiScaleConfig, code_dim: int) -> None:
        super().__init__()
        if code_dim < 1:
            raise ValueError(f"code_dim: expected at least 1, got {code_dim}")
        self.config = config
        self.code_dim = code_dim
        self.layout = CodeLayout.maps(config.sizes, config.codebook_size)
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, code_dim, dtype=torch.float32))
        self.refinements = nn.ModuleList(
            Refinement(code_dim, config.refinement_ratio) for _ in range(config.refinements)
        )
        self._refinement_of = _nearest_refinements(config.refinements, len(config.scales))

    def fixed_tensors(self) -> dict[str, Tensor]:
        """The tensors that a prior copies, named as in the state dict of a `MultiScaleDecoder`, parametrized or not."""
        convolutions = [f"refinements.{r}.{part}" for r in range(len(self.refinements)) for part in ("weight", "bias")]
        return {name: operator.attrgetter(name)(self) for name in ("codebook", *convolutions)}

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.config.scales)

    def code_tensors(self) -> list[Tensor]:
        """The tensors that decide what token maps of these scales stand for."""
        ratio = torch.tensor([self.config.refinement_ratio] if self.refinements else [], dtype=torch.float32)
        return [self.codebook, *self.refinements.parameters(), ratio]

    def decode(self, codes: Sequence[Tensor], scales: int | None = None) -> Tensor:
        """f_hat, float32 (B, C, H, W), of token maps; of the first `scales` only, if given.

        Raises:
            TypeError, ValueError, IndexError: as `check_codes`; scales not within 1..K.
        """
        self.check_codes(codes)
        if scales is not None and not 1 <= scales <= self.num_scales:
            raise ValueError(f"scales: expected 1..{self.num_scales}, got {scales}")
        with without_autocast(self.codebook.device):
            *_, last = self.steps(lambda k, _: codes[k], scales=scales)
        return last.total

    def combine(self, vectors: Sequence[Tensor]) -> Tensor:
        """f_hat, float32 (B, C, H, W), of vectors (B, h_k, w_k, C) for every scale: codes' own, or mixtures of them."""
        with without_autocast(self.codebook.device):
            return functools.reduce(torch.add, (self.contribution(k, some) for k, some in enumerate(vectors)))

    def next_inputs(self, codes: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the inputs of a prior for scales 2..K: f_hat_{k-1} shrunk to scale k, float32 (B, h_k, w_k, C) each."""
        with without_autocast(self.codebook.device):
            for k, (_, total) in enumerate(self.steps(lambda k, _: codes[k], scales=self.num_scales - 1)):
                yield self.downsample(total, k + 1)

    def steps(
        self, tokens_of: TokensOf, features: Tensor | None = None, scales: int | None = None
    ) -> Iterator[ScaleStep]:
        """The residual loop: `tokens_of(k, rest)` gives the tokens of scale k = 0, 1, ... from what is left of
        `features`, None where none are given."""
        total, rest = None, features
        for k in range(self.num_scales if scales is None else scales):
            codes = tokens_of(k, rest)
            contribution = self.contribution(k, self.embed(codes))
            total = contribution if total is None else total + contribution
            if rest is not None:
                rest = rest - contribution.detach()
            yield ScaleStep(codes, total)

    def embed(self, codes: Tensor) -> Tensor:
        """Code vectors, float32 (..., C); NaN for code -1. Differentiable in the codebook."""
        vectors = F.embedding(codes.clamp(min=0), self.codebook.float())
        return torch.where((codes < 0).unsqueeze(-1), torch.nan, vectors)

    def contribution(self, k: int, vectors_bhwc: Tensor) -> Tensor:
        """a_k, (B, C, H, W), of vectors (B, h_k, w_k, C): enlarged (bicubic) and refined."""
        h = vectors_bhwc.permute(0, 3, 1, 2)
        sizes = self.config.sizes
        if sizes[k] != sizes[-1]:
            h = F.interpolate(h, size=sizes[-1], mode="bicubic")
        refinement = self._refinement(k)
        return h.contiguous() if refinement is None else refinement(h)

    def downsample(self, features: Tensor, k: int) -> Tensor:
        """Features (B, C, H, W) averaged to scale k: (B, h_k, w_k, C)."""
        sizes = self.config.sizes
        if sizes[k] != sizes[-1]:
            features = F.interpolate(features, size=sizes[k], mode="area")
        return features.permute(0, 2, 3, 1)

    def check_codes(self, codes: Sequence[Tensor]) -> None:
        """Raise unless `codes` are token maps of every scale: int64 (B, h_k, w_k) in [0, K) here.

        TypeError (not a list of int64 tensors), ValueError (number, shapes, device), IndexError (a code out of range).
        """
        self.layout.check(codes, device=self.codebook.device, owner="codebook")

    def _refinement(self, k: int) -> nn.Module | None:
        """phi of scale k; None without any."""
        return self.refinements[self._refinement_of[k]] if self._refinement_of else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiScaleDecoder:
        return super()._apply(keeping_dtype(fn), recurse)


class ScaleUsage(nn.ModuleList):
    """`CodeUsage` of every scale; each counts its window in tokens of its own."""

    def __init__(self, scales: int, codebook_size: int, window: int) -> None:
        super().__init__(CodeUsage(1, codebook_size, window) for _ in range(scales))

    def of_scales(self) -> list[CodeUsage]:
        """The usage of each scale."""
        return [usage for usage in self if isinstance(usage, CodeUsage)]

    def reset(self) -> None:
        """Forget everything counted so far."""
        for usage in self.of_scales():
            usage.reset()

    def counts(self) -> Tensor:
        """int64 (scales, K): how often each code was chosen at each scale within its window."""
        return torch.cat([usage.counts() for usage in self.of_scales()])

    def codes_used(self) -> Tensor:
        """int64 (scales,): number of different codes chosen at each scale within its window."""
        return torch.cat([usage.codes_used() for usage in self.of_scales()])

    def perplexity(self) -> Tensor:
        """float32 (scales,): see `CodeUsage.perplexity`."""
        return torch.cat([usage.perplexity() for usage in self.of_scales()])


def nearest_codes(vectors: Tensor, codebook: Tensor, *, normalize: bool) -> Tensor:
    """Nearest codes int64 (...) of vectors (..., C) in a codebook (K, C); where `normalize`, among directions: of
    `vectors / |vectors|` in `codebook / |codebook|`. Not differentiable."""
    if normalize:
        vectors, codebook = F.normalize(vectors, dim=-1), F.normalize(codebook, dim=-1)
    return rqkernels.residual_search(vectors, codebook, 1).codes.squeeze(-1)


class MultiScaleQuantizer(MultiScaleDecoder):
    """Quantizer of feature maps (B, C, H, W) into token maps of growing size (Tian et al. 2024, algorithm 1).

    With the rest `f_0 = f`, for scales k = 1..K, and a_k from `MultiScaleDecoder`:

        t_k = nearest codes of area(f_{k-1}, (h_k, w_k))        a token per place of the shrunken rest
        f_k = f_{k-1} - a_k

    It is residual quantization whose depths are scales: the nearest code is `rqkernels.residual_search` of depth 1
    (certified, ties to the lowest code). A place of the rest that is not finite gets token -1 and makes what is
    enlarged from it NaN.

    The codebook and the refinements are trained by gradient (van den Oord et al. 2017, equation 3, at every scale),
    so that processes of one group agree as far as their gradients are averaged. A code that no vector chooses has no
    gradient and stays where it is (but for an optimizer's weight decay); none is restarted.

    Args:
        config: see `MultiScaleConfig`.
        code_dim: C.
    """

    initialized: Tensor

    def __init__(self, config: MultiScaleConfig, code_dim: int) -> None:
        super().__init__(config, code_dim)
        self.register_buffer("initialized", torch.tensor(config.init == "random"))
        self.usage = ScaleUsage(self.num_scales, config.codebook_size, config.usage_window)

    def forward(self, features: Tensor) -> MultiScaleOutput:
        """Quantize features (B, C, H, W); in train mode also count usage, and the first time sample the codebook.

        Raises:
            TypeError, ValueError: features that are not floating-point numbers (B, C, H, W); in train mode no features,
                or no finite vector in the first batch.
        """
        self._check_features(features)
        if self.training and features.numel() == 0:
            raise ValueError(f"features: expected at least one map in train mode, got shape {tuple(features.shape)}")
        # Checkpointed, a forward runs again in backward: its codes are the same, and have been counted.
        counted = self.training and not is_recomputed()
        with without_autocast(features.device):
            wanted = features.float()
            fixed = wanted.detach()
            if self.training and not self.initialized:
                self.initialize(fixed)
            codes, commitment, codebook, total = [], [], [], fixed
            for k, (tokens, total) in enumerate(self.steps(self._nearest_of_rest, fixed)):
                codes.append(tokens)
                commitment.append(F.mse_loss(wanted, total.detach()))
                codebook.append(F.mse_loss(total, fixed))
                if counted:
                    self.usage.of_scales()[k].update(tokens.unsqueeze(-1))
        # f - f is exactly zero, so the value is what `decode` gives for these codes.
        quantized = total.detach().to(features.dtype) + (features - features.detach())
        return MultiScaleOutput(quantized, codes, torch.stack(commitment).mean(), torch.stack(codebook).mean())

    @torch.no_grad()
    def encode(self, features: Tensor) -> list[Tensor]:
        """Token maps int64 (B, h_k, w_k) of features (B, C, H, W). Changes no state in any mode."""
        self._check_features(features)
        with without_autocast(features.device):
            return [step.codes for step in self.steps(self._nearest_of_rest, features.detach().float())]

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """`nearest_codes` in the codebook, by `config.normalize`."""
        return nearest_codes(vectors, self.codebook.detach().float(), normalize=self.config.normalize)

    @torch.no_grad()
    def initialize(self, features: Tensor) -> None:
        """Sample the codebook from features (B, C, H, W); `forward` does so with the first training batch.

        Every scale gets an equal share of the codes, sampled from the rest that it meets with the shares before it.
        In a process group all processes take what the first one sampled.
        """
        self._check_features(features)
        if parametrize.is_parametrized(self, "codebook"):
            raise ValueError("quantizer: its codebook is parametrized and cannot be sampled from data: do so before")
        rest = features.detach().float()
        size, scales = self.config.codebook_size, self.num_scales
        codebook = self.codebook.detach()
        for k in range(scales):
            start, stop = size * k // scales, size * (k + 1) // scales
            vectors_nc = self.downsample(rest, k).reshape(-1, self.code_dim)
            vectors_nc = vectors_nc[vectors_nc.isfinite().all(dim=1)]
            if stop == start:
                continue
            codes = sample_vectors(vectors_nc, stop - start)
            codebook[start:stop] = codes
            found = rqkernels.residual_search(self.downsample(rest, k), codes, 1)
            rest = rest - self.contribution(k, found.quantized)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(codebook, 0)
        self.usage.reset()
        self.initialized.fill_(True)

    def _nearest_of_rest(self, k: int, rest: Tensor | None) -> Tensor:
        assert rest is not None  # `steps` was given features
        return self.nearest(self.downsample(rest, k))

    def _check_features(self, features: Tensor) -> None:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"features: expected a floating-point tensor, got {got}")
        expected = (self.code_dim, *self.config.sizes[-1])
        if features.ndim != 4 or tuple(features.shape[1:]) != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"features: expected (B, {sizes}), got shape {tuple(features.shape)}")
