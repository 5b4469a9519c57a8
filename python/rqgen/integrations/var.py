"""The quantizer of the published VAR (FoundationVision/VAR, `VectorQuantizer2`) on our operators.

`rqgen.integrations.swap` describes the swap. It replaces the search: for every scale the published code computes
N x K distances (N the positions of that scale in the whole batch) and takes their argmin, here it is one
`rqkernels.residual_search` of depth 1, in training (`forward`) and in encoding (`f_to_idxBl_or_fhat`, which the
tokenizer's `img_to_idxBl` and `img_to_reconstructed_img` call). Shrinking, enlarging, refining and adding up are the
published operations in their order. A VAR holds its tokenizer outside its module tree, so accelerate the tokenizer:
the prior calls the same object. What is the same as before, and what is not:

- Codes are certified: nearest by float64 distance, the lowest index at ties; with `using_znorm` among the float32
  directions. The published float32 argmin (with `using_znorm` argmax of products) can pick another code only where two
  agree within its rounding. For equal codes everything is equal to the last bit: features, losses, gradients, counts.
- Codes are counted as published: in training, and only where the published module `dist` says that its launcher made a
  process group (where the class has no such module: where torch has one). The counts of all scales are exchanged in one
  call and not in one per scale.
- `forward` works without a process group too, where the published one stops at `get_world_size`. Autocast has no effect
  in it on any device; published: on CUDA.
- A vector that is not finite gets code -1, NaN is added at its place, and it is not counted.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from rqgen.quantizers.multiscale import nearest_codes

from .published import VectorQuantizer2
from .swap import gives_way, has_structure, swap_class

METHODS = ("embed_to_fhat", "f_to_idxBl_or_fhat", "idxBl_to_var_input", "get_next_autoregressive_input")
ATTRIBUTES = (
    "vocab_size",
    "Cvae",
    "using_znorm",
    "v_patch_nums",
    "quant_resi",
    "ema_vocab_hit_SV",
    "record_hit",
    "beta",
    "embedding",
    "prog_si",
)

QUANTIZER = f"VAR's VectorQuantizer2 (attributes {', '.join(ATTRIBUTES)}; methods {', '.join(METHODS)})"


def swap_quantizers(model: nn.Module) -> int:
    """Accelerate every published quantizer in the tree of `model`; return how many it holds, earlier swaps included.

    Raises:
        ValueError: a quantizer whose codebook, counts or scales are not as published. No module has been changed then.
    """
    found = {name: module for name, module in model.named_modules() if _is_quantizer(module)}
    for name, quantizer in found.items():
        _check_quantizer(quantizer, name or "model")
    for quantizer in found.values():
        swap_class(quantizer, Quantizer)
    return len(found)


class Quantizer(VectorQuantizer2):
    """`VectorQuantizer2`: a codebook `embedding` (K, C), S scales of `v_patch_nums[k]` squared positions, refinements
    `quant_resi` found by the scale's place in [0, 1], counts `ema_vocab_hit_SV` (S, K)."""

    @gives_way()
    def forward(self, f_BChw: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        """Return features (float32, with the gradient of the input), percentages of codes in use by scale, loss."""
        with torch.autocast(f_BChw.device.type, enabled=False):
            wanted = f_BChw.float()
            fixed = wanted.detach()
            total, loss = torch.zeros_like(fixed), fixed.new_zeros(())
            tokens: list[Tensor] = []
            for codes, added in self._steps(fixed, self.v_patch_nums):
                tokens.append(codes)
                total = total + added
                loss = loss + (F.mse_loss(total.detach(), wanted).mul_(self.beta) + F.mse_loss(total, fixed))
            loss = loss * (1.0 / len(tokens))
            quantized = (total.detach() - fixed).add_(wanted)
        if self.training and self._in_group():
            self._count(tokens)
        if not ret_usages:
            return quantized, None, loss
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        least = processes * (f_BChw.numel() / f_BChw.shape[1]) / self.vocab_size * 0.08
        return quantized, [(hits_v >= least).float().mean().item() * 100 for hits_v in self.ema_vocab_hit_SV], loss

    @gives_way()
    def f_to_idxBl_or_fhat(
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[int | Sequence[int]] | None = None
    ) -> list[Tensor]:
        """Return the codes of each scale, int64 (B, h_k * w_k), or the features up to it, (B, C, H, W)."""
        scales = v_patch_nums or self.v_patch_nums
        if _sides(scales[-1]) != tuple(f_BChw.shape[2:]):
            raise ValueError(f"v_patch_nums: expected {tuple(f_BChw.shape[2:])}, as f_BChw, at last, got {scales[-1]}")
        # Progressive training stops after scale prog_si; it is off at -1.
        steps = itertools.islice(self._steps(f_BChw.detach(), scales), self.prog_si + 1 if self.prog_si >= 0 else None)
        if not to_fhat:
            return [codes.flatten(1) for codes, _ in steps]
        total = torch.zeros_like(f_BChw)
        return [total.add_(added).clone() for _, added in steps]

    def _steps(self, features: Tensor, scales: Sequence[int | Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the residual loop; yield of each scale its codes (B, h_k, w_k) and the features that it adds, (B, C, H,
        W)."""
        rest, last = features.clone(), len(scales) - 1
        for k, scale in enumerate(scales):
            shrunken = rest if k == last else F.interpolate(rest, size=_sides(scale), mode="area")
            codes = nearest_codes(
                shrunken.permute(0, 2, 3, 1), self.embedding.weight.detach(), normalize=self.using_znorm
            )
            vectors = torch.where((codes < 0).unsqueeze(-1), torch.nan, self.embedding(codes.clamp(min=0)))
            added = vectors.permute(0, 3, 1, 2)
            if k != last:
                added = F.interpolate(added, size=features.shape[2:], mode="bicubic")
            added = self.quant_resi[k / max(last, 1)](added.contiguous())
            rest.sub_(added.detach())
            yield codes, added

    def _in_group(self) -> bool:
        theirs: Any = type(self).__bases__[-1]
        published = getattr(theirs.forward, "__globals__", {}).get("dist")
        if isinstance(published, types.ModuleType) and callable(getattr(published, "initialized", None)):
            return published.initialized()
        return dist.is_available() and dist.is_initialized()

    @torch.no_grad()
    def _count(self, tokens: Sequence[Tensor]) -> None:
        """Update the moving averages of how often each code was chosen at each scale, by all processes."""
        hits_sv = torch.zeros_like(self.ema_vocab_hit_SV)
        for hits_v, codes in zip(hits_sv, tokens, strict=True):
            hits_v.copy_(codes[codes >= 0].bincount(minlength=self.vocab_size))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(hits_sv)
        for average_v, hits_v in zip(self.ema_vocab_hit_SV, hits_sv, strict=True):
            # The first scale of the first call starts the averages; `record_hit` counts scales, not calls.
            if self.record_hit == 0:
                average_v.copy_(hits_v)
            else:
                kept, new = (0.9, 0.1) if self.record_hit < 100 else (0.99, 0.01)
                average_v.mul_(kept).add_(hits_v.mul(new))
            self.record_hit += 1


def _sides(scale: int | Sequence[int]) -> tuple[int, int]:
    return (scale, scale) if isinstance(scale, int) else (scale[0], scale[1])


def _is_quantizer(module: nn.Module) -> TypeGuard[VectorQuantizer2]:
    return has_structure(module, METHODS, ATTRIBUTES)


def _check_quantizer(quantizer: VectorQuantizer2, name: str) -> None:
    size, scales = (quantizer.vocab_size, quantizer.Cvae), quantizer.v_patch_nums
    if not scales or not all(isinstance(scale, int) for scale in scales):
        raise ValueError(f"{name}.v_patch_nums: expected the sides of the token maps, got {scales}")
    for part, tensor, shape in (
        ("embedding.weight", quantizer.embedding.weight, size),
        ("ema_vocab_hit_SV", quantizer.ema_vocab_hit_SV, (len(scales), size[0])),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}.{part}: expected shape {shape}, got {tuple(tensor.shape)}")
