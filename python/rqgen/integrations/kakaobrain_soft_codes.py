"""The published RQ-Transformer's loss of soft targets, without the targets.

Stage 2 of kakaobrain/rq-vae-transformer passes soft targets from one model to the other:

    soft_codes, codes = vae.get_soft_codes(images, temp=tau, stochastic=True)
    logits = transformer(codes, vae, cond=labels)
    loss = transformer.compute_loss(logits, soft_codes, use_soft_target=True)
    by_depth = transformer.compute_codebook_loss(logits, soft_codes, use_soft_target=True)

As published, `soft_codes` is a tensor of N * D x K, made of distances of the same size, and the loss makes several
more. After

    rqgen.accelerate(vae, lazy_soft_codes=True)
    rqgen.accelerate(transformer)

the same four lines run, and `soft_codes` is a `SoftCodes`: what the targets are made of. The loss is then
`rqkernels.soft_label_cross_entropy`, which allocates nothing of that size but the gradient of the logits. What is the
same as before, and what is not:

- Loss and gradient agree with the published ones within float32 rounding and the 1e-7 that those add to the sum of
  exponentials. Logits in half precision are summed up in float32; published, outside of autocast, in half.
- Codes are certified, as in `rqgen.integrations.kakaobrain`. With stochastic=True they are sampled by
  `rqkernels.stochastic_residual_search`, with a seed from torch's global CPU generator, of which that takes one number:
  reproducible after `torch.manual_seed`, of the same distribution, but not the codes that torch.multinomial samples.
- `SoftCodes` is not a tensor. Our losses take it; `materialize()` gives the published tensor; any other use raises.
  That is why it is made on request only: code that computes with `get_soft_codes` needs the tensor.
- A tensor of soft targets, or hard ones, goes to the published methods, as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import rqkernels

from .kakaobrain import Bottleneck
from .published import RQTransformer
from .swap import has_structure, override_of, swap_class

TRANSFORMER_METHODS = (
    "embed_with_model_aux",
    "cached_forward",
    "sample",
    "compute_loss",
    "compute_cond_loss",
    "compute_codebook_loss",
)
TRANSFORMER_ATTRIBUTES = ("block_size", "vocab_size", "classifier", "body_transformer", "head_transformer")

TRANSFORMER = (
    f"kakaobrain's RQTransformer (attributes {', '.join(TRANSFORMER_ATTRIBUTES)}; methods "
    f"{', '.join(TRANSFORMER_METHODS)})"
)


def swap_losses(model: nn.Module) -> int:
    """Accelerate every published transformer's losses in the tree of `model`; return how many it holds."""
    transformers = [
        module for module in model.modules() if has_structure(module, TRANSFORMER_METHODS, TRANSFORMER_ATTRIBUTES)
    ]
    for transformer in transformers:
        swap_class(transformer, SoftCodeLoss)
    return len(transformers)


def make_soft_codes_lazy(model: nn.Module) -> None:
    """Let every quantizer in the tree of `model`, accelerated before, return `SoftCodes`."""
    for module in list(model.modules()):
        if isinstance(module, Bottleneck):
            swap_class(module, LazySoftCodes)


class SoftCodes:
    """Soft targets `Q_tau(k | r) = softmax_k(-|r - e(k)|^2 / tau)` that have not been computed (equation 15).

    Attributes:
        residuals: float32 (B, h, w, D, C), what each depth quantized.
        codebooks: (K, C), or (D, K, C): copies, so that later updates of a codebook do not change the targets.
        tau: the temperature.
        shape, dtype, device: of the tensor that `materialize` makes.
    """

    def __init__(self, residuals: Tensor, codebooks: Tensor, tau: float) -> None:
        self.residuals, self.codebooks, self.tau = residuals, codebooks, tau
        self.shape = torch.Size((*residuals.shape[:-1], codebooks.shape[-2]))
        self.dtype, self.device = codebooks.dtype, residuals.device

    def materialize(self) -> Tensor:
        """Return the published tensor (B, h, w, D, K), rows summing to one, in the dtype of the codebooks."""
        return rqkernels.distance_softmax(self.residuals, self.codebooks, self.tau).to(self.dtype)

    def cross_entropy(self, logits: Tensor, reduction: str) -> Tensor:
        """Return the cross-entropy of logits (B, h, w, D, K), or the same rows in another shape, against these targets,
        in float32."""
        if logits.numel() != self.shape.numel() or logits.shape[-1:] != self.shape[-1:]:
            raise ValueError(f"logits: expected {tuple(self.shape)} for these soft codes, got {tuple(logits.shape)}")
        return rqkernels.soft_label_cross_entropy(
            logits.reshape(self.shape), self.residuals, self.codebooks, self.tau, reduction=reduction
        )

    def __repr__(self) -> str:
        return f"SoftCodes(shape={tuple(self.shape)}, tau={self.tau}, device='{self.device}')"

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse(getattr(func, "__name__", str(func)))

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("numpy")  # which would make an array of one object

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"SoftCodes has no attribute '{name}': it is not a tensor; {_ADVICE}")


_ADVICE = "call .materialize() for the tensor (B, h, w, D, K)"


def _refuse(what: str) -> NoReturn:
    raise TypeError(f"{what}: expected a tensor, got SoftCodes; {_ADVICE}")


class LazySoftCodes(Bottleneck):
    """`RQBottleneck`, accelerated: soft codes as `SoftCodes`."""

    @torch.no_grad()
    def get_soft_codes(self, x: Tensor, temp: float = 1.0, stochastic: bool = False) -> tuple[SoftCodes, Tensor]:
        change = override_of(self, (), ("get_soft_codes",)) or self._change_of_parts()
        if change is not None:
            raise ValueError(
                f"get_soft_codes: {change}, which lazy soft codes do not include; do without lazy_soft_codes"
            )
        codebooks = self._searchable_codebooks()
        if codebooks is None:
            sizes = ", ".join(str(codebook.n_embed) for codebook in self.codebooks)
            raise ValueError(f"get_soft_codes: codebooks of different sizes ({sizes}) have no common soft codes")
        x, depth, tau = self.to_code_shape(x), len(self.codebooks), float(temp)
        if stochastic:
            seed = int(torch.randint(2**63 - 1, ()))
            found = rqkernels.stochastic_residual_search(x, codebooks, depth, tau=tau, seed=seed, return_residuals=True)
        else:
            found = rqkernels.residual_search(x, codebooks, depth, return_residuals=True)
        assert found.residuals is not None  # asked for
        return SoftCodes(found.residuals, codebooks.clone(), tau), found.codes


class SoftCodeLoss(RQTransformer):
    """`RQTransformer`: its losses against `SoftCodes`."""

    def compute_loss(self, logits: Tensor, targets: Any, use_soft_target: bool = False) -> Tensor:
        if not isinstance(targets, SoftCodes):
            return super().compute_loss(logits, targets, use_soft_target)
        _check_soft(self, "compute_loss", use_soft_target)
        return targets.cross_entropy(logits, "mean")

    @torch.no_grad()
    def compute_codebook_loss(self, logits: Tensor, targets: Any, use_soft_target: bool = False) -> Tensor:
        if not isinstance(targets, SoftCodes):
            return super().compute_codebook_loss(logits, targets, use_soft_target)
        _check_soft(self, "compute_codebook_loss", use_soft_target)
        return targets.cross_entropy(logits, "none").flatten(0, -2).mean(dim=0)


def _check_soft(transformer: nn.Module, loss: str, use_soft_target: bool) -> None:
    change = override_of(transformer, (), (loss,))
    if change is not None:
        raise ValueError(
            f"targets: got SoftCodes, but {change}, which computes with tensors: do without lazy_soft_codes"
        )
    if not use_soft_target:
        raise ValueError("targets: got SoftCodes with use_soft_target=False; expected codes, or use_soft_target=True")
