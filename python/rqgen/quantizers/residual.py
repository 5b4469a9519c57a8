"""Residual quantization with codebooks learned by exponential moving averages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize

import rqkernels
from rqgen.config import check_bounds, one_of

from .seeding import kmeans, sample_vectors
from .state import is_recomputed, keeping_dtype
from .usage import CodeUsage

EMA_UPDATES = ("after_all_depths", "per_depth")
INITIALISATIONS = ("data", "kmeans", "random")
UNUSED = ("shrink", "keep")
# Buffers that training writes.
_WRITTEN = ("codebook", "ema_count", "ema_sum")
# Products of all pairs of codes are amortised once they have saved this many scans of the codebook per code.
_AMORTISED_AFTER = 8


@dataclass
class QuantizerConfig:
    """Settings of a `ResidualQuantizer`.

    Attributes:
        codebook_size: K, codes per codebook.
        depth: D, codes per vector. 1 is plain vector quantization (VQ-VAE).
        shared_codebook: one codebook for all depths, or one per depth.
        decay: of the moving averages; the share of the past kept at each training step.
        epsilon: Laplace smoothing of the averaged counts.
        restart_dead_codes: put unused codes onto vectors of the current batch.
        dead_code_threshold: a code is dead once its averaged count (vectors per training step) is below this.
            With fewer vectors per step than codes, 1.0 would declare nearly all codes dead: lower it then. A code
            that was just placed counts as chosen by `max(1, dead_code_threshold)` vectors per step.
        unused: of a code that no vector chose in a step. "shrink": the paper's formula, see
            `ResidualQuantizer.update_codebook`: it stays where it is until its averaged count comes near `epsilon`
            (after some 1,100 steps with the defaults) and then shrinks towards zero, unless it is restarted before.
            "keep": it does not move until a vector chooses it again. Its averages decay either way, so that it can be
            found dead, and moves to its new vectors as quickly.
        ema_update: "after_all_depths": one update per training step, from all depths together.
            "per_depth": compatibility with the published training code, which updates after each depth, so
            that with a shared codebook a depth searches what the depth before has just moved.
        init: "data": codes sampled from the first training batch; "kmeans": clustered from it; "random": normal
            numbers, independent of the data.
        kmeans_iterations: rounds of Lloyd's algorithm for init="kmeans".
        usage_window: positions over which codes_used and perplexity are taken (see `CodeUsage`).
    """

    codebook_size: int = 16384
    depth: int = 4
    shared_codebook: bool = True
    decay: float = 0.99
    epsilon: float = 1e-5
    restart_dead_codes: bool = True
    dead_code_threshold: float = 1.0
    unused: str = "shrink"
    ema_update: str = "after_all_depths"
    init: str = "data"
    kmeans_iterations: int = 10
    usage_window: int = 131072

    def __post_init__(self) -> None:
        check_bounds(
            self,
            codebook_size=(1, 2**24),
            depth=(1, 2**10),
            kmeans_iterations=(1, 10**6),
            usage_window=(1, 2**48),
            epsilon=(0.0, math.inf),
            dead_code_threshold=(0.0, 1e9),
        )
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"decay: expected a number within 0..1, got {self.decay}")
        for name, allowed in (("unused", UNUSED), ("ema_update", EMA_UPDATES), ("init", INITIALISATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {one_of(allowed, getattr(self, name))}")


class QuantizerOutput(NamedTuple):
    """Result of `ResidualQuantizer.forward` for vectors (..., C)."""

    quantized: Tensor  # (..., C), dtype of the input; value: sum of the chosen codes; gradient: the input's
    codes: Tensor  # int64 (..., D)
    commitment_loss: Tensor  # float32 scalar


class _Book(NamedTuple):
    """Views of one codebook and its averages, written in place."""

    codes: Tensor  # (K, C)
    counts: Tensor  # (K,)
    sums: Tensor  # (K, C)


class ResidualQuantizer(nn.Module):
    """Residual quantizer of vectors (..., C); Lee et al. 2022, equations (3)-(7).

    With `r_0 = z`: `k_d = argmin_k |r_{d-1} - e_d(k)|^2` (ties to the lowest k), `r_d = r_{d-1} - e_d(k_d)`,
    partial sums `Z^(d) = e_1(k_1) + ... + e_d(k_d)`. Naively

        for d in range(D):
            k[..., d] = torch.cdist(r, e[d]).argmin(-1);  r = r - e[d][k[..., d]]

    but the search is `rqkernels.residual_search`: exact, and no N x K tensor of distances or one-hot codes
    is ever allocated, in training either. Search and codebooks are float32 under autocast and after
    `.half()`/`.bfloat16()`/`.double()` too. A vector that is not finite gets code -1 at all depths, a NaN result, and
    does not touch the codebook.

    Codebooks are not trained by gradient: in train mode `forward` ends with `update_codebook`. So it must not be run
    again by `torch.utils.checkpoint`, which would find other codes. In eval mode no state ever changes. All state
    (codebooks, averages, usage) lies in buffers; restarts and initialisation sample by torch's global generator (see
    `rqgen.quantizers.seeding`), so that buffers and generator together resume a run bit for bit.

    Args:
        config: see `QuantizerConfig`.
        code_dim: C.

    Buffers: `codebook` float32 (K, C) shared, or (D, K, C); `ema_count` and `ema_sum`, the moving averages
    of how many vectors chose a code in a step, and of their sum; `initialized`, a bool.
    """

    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    initialized: Tensor

    def __init__(self, config: QuantizerConfig, code_dim: int) -> None:
        super().__init__()
        if code_dim < 1:
            raise ValueError(f"code_dim: expected at least 1, got {code_dim}")
        self.config = config
        self.code_dim = code_dim
        books = () if config.shared_codebook else (config.depth,)
        # Also what a model that never trained searches; data replaces it unless init="random".
        codebook = torch.randn(*books, config.codebook_size, code_dim, dtype=torch.float32)
        self.register_buffer("codebook", codebook)
        self.register_buffer("ema_count", torch.full_like(codebook[..., 0], self._first_count))
        self.register_buffer("ema_sum", codebook * self._first_count)
        self.register_buffer("initialized", torch.tensor(config.init == "random"))
        self.usage = CodeUsage(config.depth, config.codebook_size, config.usage_window)

    @property
    def codebooks(self) -> Tensor:
        """float32 (K, C) shared by all depths, or (D, K, C): what `rqkernels.residual_search` takes."""
        return self.codebook

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z (..., C); in train mode also update codebooks and usage.

        `commitment_loss = mean_d mean |z - sg[Z^(d)]|^2`, the mean over depths, vectors and features
        (equation (7) writes the sum over depths; the published code takes this mean). NaN where there is no vector.

        Raises:
            ValueError: the last dimension of z is not C; in train mode no vector, or none that is finite in the first
                batch.
            RuntimeError: in train mode run again in a backward pass, by activation checkpointing.
        """
        self._check_vectors(z)
        if self.training:
            self._check_trainable(z)
        z32 = z.float()
        vectors = z32.detach()
        if self.training and not self.initialized:
            self.initialize(vectors)
        if self.training and self.config.ema_update == "per_depth":
            quantized, codes, norms, mean_residual = self._quantize_and_update_per_depth(vectors)
        else:
            # The residuals are needed for restarts and the loss's derivative only.
            wanted = self.training or z.requires_grad or forward_ad.unpack_dual(z).tangent is not None
            found = rqkernels.residual_search(
                vectors,
                self.codebook,
                self.config.depth,
                return_residuals=wanted,
                return_statistics=self.training,
            )
            quantized, codes, norms = found.quantized, found.codes, found.residual_sq_norms
            mean_residual = None
            if found.residuals is not None:
                last = vectors - quantized
                mean_residual = (found.residuals[..., 1:, :].sum(dim=-2) + last) / self.config.depth
            if self.training:
                self.update_codebook(found)
        if self.training:
            self.usage.update(codes)
        loss = norms.mean() / self.code_dim
        if mean_residual is not None:
            # |z + delta - Z^(d)|^2 = |r_d|^2 + delta (delta + 2 r_d), since z - Z^(d) = r_d: a term of value zero
            # carries all derivatives, so that no partial sum has to be kept for backward.
            delta = z32 - vectors
            loss = loss + (delta * (delta + 2.0 * mean_residual)).mean()
        # z - z is exactly zero, so the value is exactly what `decode` gives for these codes.
        straight_through = quantized.to(z.dtype) + (z - z.detach())
        return QuantizerOutput(straight_through, codes, loss)

    @torch.no_grad()
    def encode(self, z: Tensor, packed: rqkernels.PackedCodebook | None = None) -> Tensor:
        """Codes int64 (..., D) of vectors (..., C), searched in `packed` (see `pack_codebook`) where given. Changes no
        state in any mode."""
        self._check_vectors(z)
        return rqkernels.residual_search(
            z.float(), self.codebook if packed is None else packed, self.config.depth
        ).codes

    def pack_codebook(self, count: int) -> rqkernels.PackedCodebook | None:
        """The codebook as it is now, prepared for encoding about `count` vectors (the codes are the same).

        None where it is not worth the arithmetic: few vectors, one depth, a codebook per depth, on a GPU, or where
        `rqkernels.PackedCodebook` has no products to offer.
        """
        config = self.config
        if not config.shared_codebook or self.codebook.device.type != "cpu":
            return None
        if count * (config.depth - 1) < _AMORTISED_AFTER * config.codebook_size:
            return None
        packed = rqkernels.PackedCodebook(self.codebook)
        return packed if packed.has_gram else None

    def code_tensors(self) -> list[Tensor]:
        """The tensors that decide what codes stand for."""
        return [self.codebook]

    def decode(self, codes: Tensor, depth: int | None = None) -> Tensor:
        """Sum of the codes, float32 (..., C); of the first `depth` codes only if given.

        `decode(encode(z))` equals `forward(z).quantized` bit for bit (in float32).

        Raises:
            ValueError: codes are not (..., D), or depth is not within 1..D.
            IndexError: a code outside [0, K).
        """
        self._check_codes(codes)
        if depth is not None and not 1 <= depth <= self.config.depth:
            raise ValueError(f"depth: expected 1..{self.config.depth}, got {depth}")
        return rqkernels.residual_decode(codes, self.codebook, depth)

    def embed(self, codes: Tensor) -> Tensor:
        """The code vectors themselves, float32 (..., D, C), not summed.

        Raises:
            ValueError: codes are not (..., D).
            IndexError: a code outside [0, K).
        """
        self._check_codes(codes)
        size = self.config.codebook_size
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise IndexError(f"codes: expected 0 <= code < {size}, got {int(codes.min())}..{int(codes.max())}")
        if self.config.shared_codebook:
            return F.embedding(codes, self.codebook)
        depths = torch.arange(self.config.depth, device=codes.device)
        return self.codebook[depths, codes]

    @torch.no_grad()
    def initialize(self, z: Tensor) -> None:
        """Set codebooks and averages from vectors (..., C); `forward` does so with the first training batch.

        A codebook per depth is sampled (or clustered) from that depth's residuals. A shared one has an equal
        share of its codes sampled from the residuals of every depth, each after quantization with the shares
        before it: later depths meet much smaller vectors than the first, and need codes of their size.
        """
        self._check_vectors(z)
        residual = z.detach().float().reshape(-1, self.code_dim)
        residual = residual[residual.isfinite().all(dim=1)]
        config = self.config
        books = self._books()
        for d in range(config.depth):
            if config.shared_codebook:
                start = config.codebook_size * d // config.depth
                stop = config.codebook_size * (d + 1) // config.depth
            else:
                start, stop = 0, config.codebook_size
            if stop > start:
                count = stop - start
                book = books[0 if config.shared_codebook else d]
                codes = (
                    kmeans(residual, count, config.kmeans_iterations)
                    if config.init == "kmeans"
                    else sample_vectors(residual, count)
                )
                book.codes[start:stop] = codes
                book.sums[start:stop] = codes * self._first_count
                book.counts[start:stop] = self._first_count
                residual = residual - rqkernels.residual_search(residual, codes, 1).quantized
        self.usage.reset()
        self.initialized.fill_(True)

    @torch.no_grad()
    def update_codebook(self, found: rqkernels.ResidualCodes) -> None:
        """One step of the moving averages, of restarts, and of the codebooks, from all depths together.

        With `n_k` vectors of sum `s_k` assigned to code k: `N_k = decay N_k + (1 - decay) n_k`,
        `S_k = decay S_k + (1 - decay) s_k`, `e(k) = S_k / N'_k` with
        `N'_k = (N_k + epsilon) sum(N) / (sum(N) + K epsilon)` (van den Oord et al. 2017, appendix A.1). With
        restarts, a code with `N_k < dead_code_threshold` is placed on a sampled vector v: `e(k) = v`,
        `N_k = max(1, dead_code_threshold)`, `S_k = N_k v`.

        By this formula a code without vectors stays where it is as long as `N_k` is far above epsilon, and then
        shrinks towards zero; with `unused="keep"` it stays as it is (`N_k` and `S_k` decay).

        Args:
            found: of `rqkernels.residual_search` in this codebook, with residuals and statistics.

        Raises:
            ValueError: found has no residuals or no statistics.
        """
        if found.residuals is None or found.statistics is None:
            raise ValueError("found: expected a search with return_residuals=True and return_statistics=True")
        counts, sums = found.statistics
        books = self._books()
        if self.config.shared_codebook:
            vectors_nc = found.residuals.reshape(-1, self.code_dim)
            self._update_book(books[0], vectors_nc, found.codes.reshape(-1), counts, sums)
            return
        for d, book in enumerate(books):
            vectors_nc = found.residuals[..., d, :].reshape(-1, self.code_dim)
            self._update_book(book, vectors_nc, found.codes[..., d].reshape(-1), counts[d], sums[d])

    def _quantize_and_update_per_depth(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The compatibility mode: search one depth, update its codebook, go on with the next.

        Returns quantized (..., C), codes (..., D), residual norms (..., D), mean of r_1..r_D (..., C).
        """
        books = self._books()
        residual = vectors
        quantized, residual_sum = torch.zeros_like(vectors), torch.zeros_like(vectors)
        codes, norms = [], []
        for d in range(self.config.depth):
            book = books[0 if self.config.shared_codebook else d]
            found = rqkernels.residual_search(residual, book.codes, 1, return_statistics=True)
            assert found.statistics is not None  # asked for
            counts, sums = found.statistics
            vectors_nc = residual.reshape(-1, self.code_dim)
            self._update_book(book, vectors_nc, found.codes.reshape(-1), counts, sums)
            residual = residual - found.quantized
            quantized = quantized + found.quantized
            residual_sum = residual_sum + residual
            codes.append(found.codes)
            norms.append(found.residual_sq_norms)
        return quantized, torch.cat(codes, -1), torch.cat(norms, -1), residual_sum / self.config.depth

    def _update_book(self, book: _Book, vectors_nc: Tensor, codes_n: Tensor, counts: Tensor, sums: Tensor) -> None:
        config = self.config
        # Several processes must leave here with the same averages: the sum of `counts` and `sums` over them
        # belongs on this line and nowhere else. (`lerp_` leaves an average that equals its new value as it is: by
        # rounding alone a code at the threshold must not fall below it.)
        book.counts.lerp_(counts, 1.0 - config.decay)
        book.sums.lerp_(sums, 1.0 - config.decay)
        restarted = self._restart_dead_codes(book, vectors_nc, codes_n) if config.restart_dead_codes else None
        total = book.counts.sum()
        smoothed = (book.counts + config.epsilon) * (total / (total + config.codebook_size * config.epsilon))
        moves = smoothed > 0  # nothing can be said of a code without a count where epsilon is 0
        if config.unused == "keep":
            moves &= counts > 0
        book.codes.copy_(torch.where(moves.unsqueeze(1), book.sums / smoothed.unsqueeze(1), book.codes))
        if restarted is not None:
            dead, vectors = restarted
            book.codes[dead] = vectors

    def _restart_dead_codes(self, book: _Book, vectors_nc: Tensor, codes_n: Tensor) -> tuple[Tensor, Tensor] | None:
        """Give dead codes fresh averages; return a mask of them, bool (K,), and the vectors they are placed on."""
        threshold, size = self.config.dead_code_threshold, self.config.codebook_size
        if vectors_nc.shape[0] < threshold * size:
            warnings.warn(
                f"{vectors_nc.shape[0]} vectors per step cannot keep {size} codes at dead_code_threshold={threshold} "
                f"(that takes {math.ceil(threshold * size)}): codes in use restart at every step. Lower the threshold "
                "or codebook_size, or enlarge the batch.",
                stacklevel=2,
            )
        dead = book.counts < threshold
        num_dead = int(dead.sum())
        finite = vectors_nc[codes_n >= 0] if num_dead else vectors_nc
        if num_dead == 0 or finite.shape[0] == 0:
            return None
        vectors = sample_vectors(finite, num_dead)
        # The averages restart with the code: stale ones would pull it back to where it died.
        book.counts[dead] = self._first_count
        book.sums[dead] = vectors * self._first_count
        return dead, vectors

    @property
    def _first_count(self) -> float:
        """Averaged count of a code that was just placed: one below the threshold would be dead at the next step."""
        return max(1.0, self.config.dead_code_threshold) if self.config.restart_dead_codes else 1.0

    def _books(self) -> list[_Book]:
        if parametrized := [name for name in _WRITTEN if parametrize.is_parametrized(self, name)]:
            raise ValueError(
                f"quantizer: its {', '.join(parametrized)} is parametrized, and moving averages cannot be "
                "written to it: remove the parametrization to train, or keep the quantizer in eval mode"
            )
        if self.config.shared_codebook:
            return [_Book(self.codebook, self.ema_count, self.ema_sum)]
        return [_Book(*views) for views in zip(self.codebook, self.ema_count, self.ema_sum, strict=True)]

    def _check_vectors(self, z: Tensor) -> None:
        if not isinstance(z, Tensor):
            raise TypeError(f"z: expected a tensor, got {type(z).__name__}")
        if z.ndim == 0 or z.shape[-1] != self.code_dim:
            raise ValueError(f"z: expected (..., {self.code_dim}), got shape {tuple(z.shape)}")
        if not z.is_floating_point():
            raise TypeError(f"z: expected a floating-point tensor, got {z.dtype}")

    def _check_trainable(self, z: Tensor) -> None:
        if z.numel() == 0:
            raise ValueError(f"z: expected at least one vector in train mode, got shape {tuple(z.shape)}")
        if is_recomputed():
            raise RuntimeError(
                f"{type(self).__name__}: activation checkpointing runs this forward again in backward, where it finds "
                "other codes: in train mode it has moved its codebook. Keep the quantizer out of the checkpointed "
                "part; gradient_checkpointing=True in a model's config recomputes its blocks alone"
            )

    def _check_codes(self, codes: Tensor) -> None:
        if not isinstance(codes, Tensor):
            raise TypeError(f"codes: expected a tensor, got {type(codes).__name__}")
        if codes.ndim == 0 or codes.shape[-1] != self.config.depth:
            raise ValueError(f"codes: expected (..., {self.config.depth}), got shape {tuple(codes.shape)}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidualQuantizer:
        return super()._apply(keeping_dtype(fn), recurse)
