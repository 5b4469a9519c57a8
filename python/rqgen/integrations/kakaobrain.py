"""The quantizer of the published RQ-VAE (kakaobrain/rq-vae-transformer) on our operators.

`rqgen.integrations.swap` describes the swap; `Bottleneck` and `Codebook` below override the few methods that search,
count and decode.

Replaced are the N x K distances of the search (`rqkernels.residual_search`; out of training all depths in one
call), the K x N one-hot of the averages (`rqkernels.code_statistics`) and the (N, D, C) gather of decoding
(`rqkernels.residual_decode`). What is the same as before, and what is not:

- Codes are certified: nearest by float64 distance, the lowest index at ties. The published float32 argmin can
  pick another code only where two distances agree within its rounding, which restarts favour: with fewer vectors
  than codes they make near copies. For equal codes quantized vectors are equal, and loss and gradients with them;
  `embed_code` adds in depth order, and may differ in the last bits.
- Training updates after every depth, as published: with a shared codebook depth d searches what depth d - 1 has
  just moved. Restarts use torch's global generator with the same calls in the same order. Sums of the
  averages are rounded once from float64, so buffers agree within float32 rounding.
- Half-precision input, and any input under autocast, is searched as float32 and quantized in float32, cast once;
  published, distances and residuals are rounded to half. Noise of restarts is then sampled in float32 too.
- A vector that is not finite gets code -1 and NaN, and touches no average; published, it makes the whole
  codebook NaN. A code whose restart samples an invalid vector stays as it was.
- Other changes count: where a method of a codebook was overridden, or one has hooks, the published methods that call it
  run (with one warning).
- `get_soft_codes` returns N x K by contract, and computes it as published (under autocast in half, too);
  `rqgen.integrations.kakaobrain_soft_codes` does without.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import rqkernels
from rqgen.models.changes import GLOBAL_HOOKS, has_global_hooks, hook_of

from .published import RQBottleneck, VQEmbedding
from .swap import gives_way, has_structure, override_of, swap_class

BOTTLENECK_METHODS = (
    "quantize",
    "to_code_shape",
    "to_latent_shape",
    "compute_commitment_loss",
    "embed_code",
    "embed_code_with_depth",
    "embed_partial_code",
    "get_soft_codes",
)
BOTTLENECK_ATTRIBUTES = ("codebooks", "code_shape", "latent_shape", "shared_codebook")
CODEBOOK_METHODS = (
    "compute_distances",
    "find_nearest_embedding",
    "embed",
    "_tile_with_noise",
    "_update_buffers",
    "_update_embedding",
)
CODEBOOK_ATTRIBUTES = ("weight", "n_embed", "decay", "eps", "restart_unused_codes")

QUANTIZER = (
    f"kakaobrain's RQBottleneck (attributes {', '.join(BOTTLENECK_ATTRIBUTES)}; methods "
    f"{', '.join(BOTTLENECK_METHODS)}; `codebooks` a ModuleList of VQEmbedding)"
)


def swap_quantizers(model: nn.Module) -> int:
    """Accelerate every published quantizer in the tree of `model`; return how many it holds, earlier swaps included.

    Raises:
        ValueError: a quantizer whose codebooks are not as published. No module has been changed then.
    """
    quantizers = {name: module for name, module in model.named_modules() if _is_bottleneck(module)}
    for name, quantizer in quantizers.items():
        _check_codebooks(quantizer, name or "model")
    for quantizer in quantizers.values():
        swap_class(quantizer, Bottleneck)
        for codebook in quantizer.codebooks:
            swap_class(codebook, Codebook)
    return len(quantizers)


class Codebook(VQEmbedding):
    """`VQEmbedding`: weight (K + 1, C), the last row for padding and never searched; buffers `cluster_size_ema`
    (K,) and `embed_ema` (K, C)."""

    @gives_way("compute_distances")
    @torch.no_grad()
    def find_nearest_embedding(self, inputs: Tensor) -> Tensor:
        return rqkernels.residual_search(inputs, self.weight[:-1], 1).codes.squeeze(-1)

    @gives_way("find_nearest_embedding", "compute_distances", "embed")
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        found = rqkernels.residual_search(inputs.float(), self.weight[:-1], 1)
        codes = found.codes.squeeze(-1)
        if self.training:
            self._update_buffers(inputs, codes)
            self._update_embedding()
        return found.quantized.to(self.weight.dtype), codes

    @gives_way()
    @torch.no_grad()
    def _update_buffers(self, vectors: Tensor, idxs: Tensor) -> None:
        """Update moving averages of counts and sums over all processes, then restarts of codes with a count below 1."""
        num_codes, code_dim = self.embed_ema.shape
        vectors_nc = vectors.reshape(-1, code_dim)
        counts, sums = rqkernels.code_statistics(vectors_nc, idxs.reshape(-1), num_codes)
        distributed = dist.is_available() and dist.is_initialized()
        if distributed:
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        self.cluster_size_ema.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.embed_ema.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        if not self.restart_unused_codes:
            return
        if vectors_nc.shape[0] < num_codes:
            vectors_nc = self._tile_with_noise(vectors_nc, num_codes)
        # A vector for every code, dead or not: these are the published calls to the generator.
        candidates = vectors_nc[torch.randperm(vectors_nc.shape[0], device=vectors.device)[:num_codes]]
        if distributed:
            dist.broadcast(candidates, 0)
        dead = ~(self.cluster_size_ema >= 1) & candidates.isfinite().all(dim=1)
        self.embed_ema.copy_(torch.where(dead.unsqueeze(1), candidates, self.embed_ema))
        self.cluster_size_ema.masked_fill_(dead, 1)


class Bottleneck(RQBottleneck):
    """`RQBottleneck`: D codebooks in `codebooks`, the same module D times where they share one."""

    def _change_of_parts(self) -> str | None:
        if has_global_hooks():
            return GLOBAL_HOOKS
        for d, codebook in enumerate(self.codebooks):
            hook = hook_of(codebook)
            if hook is not None:
                return f"codebooks.{d} {hook}"
            change = override_of(codebook, ("forward", "find_nearest_embedding", "compute_distances", "embed"))
            if change is not None:
                return f"codebooks.{d}: {change}"
        return None

    @gives_way()
    def quantize(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return partial sums `Z^(1) .. Z^(D)`, each like x, (B, h, w, C), and codes int64 (B, h, w, D)."""
        codebooks = self._searchable_codebooks()
        sums: Iterable[Tensor]
        if codebooks is None or any(codebook.training for codebook in self.codebooks):
            # One depth after another in their loop, over our `Codebook.forward`.
            sums, codes = super().quantize(x.float())
        else:
            codes = rqkernels.residual_search(x, codebooks, len(self.codebooks)).codes
            sums = itertools.accumulate(self._code_vectors(codes, len(self.codebooks), check=False))
        return [partial.to(x.dtype) for partial in sums], codes

    @gives_way()
    @torch.no_grad()
    def embed_code(self, code: Tensor) -> Tensor:
        self._check_code(code)
        return self.to_latent_shape(self._decode(code, len(self.codebooks)))

    @gives_way()
    @torch.no_grad()
    def embed_partial_code(self, code: Tensor, code_idx: int, decode_type: str = "select") -> Tensor:
        self._check_code(code)
        if not 0 <= code_idx < len(self.codebooks):
            raise ValueError(f"code_idx: expected 0..{len(self.codebooks) - 1}, got {code_idx}")
        if decode_type == "select":
            return self.to_latent_shape(self.codebooks[code_idx].embed(code[..., code_idx]))
        if decode_type == "add":
            return self.to_latent_shape(self._decode(code, code_idx + 1))
        raise NotImplementedError(f"decode_type: expected 'select' or 'add', got {decode_type!r}")

    @gives_way()
    @torch.no_grad()
    def get_soft_codes(self, x: Tensor, temp: float = 1.0, stochastic: bool = False) -> tuple[Any, Tensor]:
        # A tensor here; a class derived from this one gives an object in its place.
        codebooks = self._searchable_codebooks()
        if stochastic or codebooks is None:
            # Sampling stays theirs, torch.multinomial; distributions of different sizes have no common tensor.
            return super().get_soft_codes(x, temp, stochastic)
        found = rqkernels.residual_search(self.to_code_shape(x), codebooks, len(self.codebooks), return_residuals=True)
        assert found.residuals is not None  # asked for
        residuals = found.residuals.to(codebooks.dtype).unbind(-2)
        soft = [
            F.softmax(-codebook.compute_distances(residual) / temp, dim=-1)
            for codebook, residual in zip(self.codebooks, residuals, strict=True)
        ]
        return torch.stack(soft, dim=-2), found.codes

    def _shares_codebook(self) -> bool:
        return all(codebook is self.codebooks[0] for codebook in self.codebooks)

    def _searchable_codebooks(self) -> Tensor | None:
        """Return the codebooks as `rqkernels.residual_search` takes them; None where sizes differ by depth, which is
        searched by depth.

        Codebooks of one size are stacked again at every call: a kept stack would miss writes that leave no trace
            (through `.data`, or by a collective), and its copy is cheap compared with a search in it.
        """
        if self._shares_codebook():
            return self.codebooks[0].weight[:-1]
        weights = [codebook.weight[:-1] for codebook in self.codebooks]
        same_size = all(weight.shape == weights[0].shape for weight in weights)
        return torch.stack(weights) if same_size else None

    def _code_vectors(self, code: Tensor, depth: int, *, check: bool = True) -> Iterator[Tensor]:
        """Yield the code vectors of depths 1..depth, float32 (..., C) each; with check=False NaN for code -1."""
        for d in range(depth):
            weight = self.codebooks[d].weight  # with its padding row, which may be decoded
            yield rqkernels.residual_decode(code[..., d : d + 1], weight, check=check).float()

    def _decode(self, code: Tensor, depth: int) -> Tensor:
        weight = self.codebooks[0].weight
        if self._shares_codebook():
            return rqkernels.residual_decode(code, weight, depth)
        return functools.reduce(torch.add, self._code_vectors(code, depth)).to(weight.dtype)

    def _check_code(self, code: Tensor) -> None:
        if code.shape[1:] != self.code_shape:
            raise ValueError(f"code: expected (B, {', '.join(map(str, self.code_shape))}), got {tuple(code.shape)}")


def _is_bottleneck(module: nn.Module) -> TypeGuard[RQBottleneck]:
    known = has_structure(module, BOTTLENECK_METHODS, BOTTLENECK_ATTRIBUTES)
    return known and isinstance(module.codebooks, nn.ModuleList)


def _check_codebooks(quantizer: RQBottleneck, name: str) -> None:
    depth = quantizer.code_shape[-1]
    if len(quantizer.codebooks) != depth:
        raise ValueError(f"{name}.codebooks: expected {depth}, from code_shape, got {len(quantizer.codebooks)}")
    for d, codebook in enumerate(quantizer.codebooks):
        problem = _problem_of_codebook(codebook)
        if problem is not None:
            raise ValueError(f"{name}.codebooks.{d}: not a VQEmbedding as published: {problem}")


def _problem_of_codebook(codebook: VQEmbedding) -> str | None:
    missing = [name for name in CODEBOOK_METHODS if not callable(getattr(type(codebook), name, None))]
    missing += [name for name in CODEBOOK_ATTRIBUTES if not hasattr(codebook, name)]
    if missing:
        return f"{type(codebook).__name__} has no {', '.join(missing)}"
    if not getattr(codebook, "ema", False):
        return "expected a codebook trained by moving averages (ema=True)"
    if codebook.weight.dim() != 2 or codebook.weight.shape[0] != codebook.n_embed + 1:
        return (
            f"expected a weight of n_embed + 1 = {codebook.n_embed + 1} rows, the last for padding, "
            f"got {tuple(codebook.weight.shape)}"
        )
    num_codes, code_dim = codebook.n_embed, codebook.weight.shape[1]
    for buffer, shape in (("cluster_size_ema", (num_codes,)), ("embed_ema", (num_codes, code_dim))):
        tensor = getattr(codebook, buffer, None)
        if tensor is None or tuple(tensor.shape) != shape:
            return f"expected a buffer {buffer} {shape}, got {None if tensor is None else tuple(tensor.shape)}"
    return None
