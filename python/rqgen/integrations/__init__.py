"""Our operators inside models of other systems, recognised by their structure; none of them is imported."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from . import kakaobrain, kakaobrain_sampling, kakaobrain_soft_codes, var

__all__ = ["accelerate"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def accelerate(model: ModelT, *, lazy_soft_codes: bool = False) -> ModelT:
    """Swap our operators into the parts of a foreign model that are known here, in place.

    Known, anywhere in the module tree of `model` or `model` itself (each of these modules says what stays the same and
    what differs):

    ========================================== ===============================================
    kakaobrain's RQ-VAE: quantizer             `rqgen.integrations.kakaobrain`
    kakaobrain's RQ-Transformer: loss          `rqgen.integrations.kakaobrain_soft_codes`
    kakaobrain's RQ-Transformer: `sample`      `rqgen.integrations.kakaobrain_sampling`
    VAR's tokenizer: quantizer                 `rqgen.integrations.var`
    ========================================== ===============================================

    Parameters, buffers, hooks and the state dict are untouched; a second call changes nothing.

        vae = accelerate(vae)       # their class, their checkpoint, their training script

    Args:
        model: what holds such a part; it is changed.
        lazy_soft_codes: `get_soft_codes` of kakaobrain's quantizer returns no tensor of N * D x K, but an object for
            the losses of an accelerated transformer, which never make one either.

    Returns:
        `model`.

    Raises:
        TypeError: model is not a module.
        ValueError: nothing in it is known, a known part holds what the swap cannot serve (named), or lazy_soft_codes
            without kakaobrain's quantizer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    quantizers = kakaobrain.swap_quantizers(model)
    transformers = kakaobrain_soft_codes.swap_losses(model) + kakaobrain_sampling.swap_samplers(model)
    if not quantizers + transformers + var.swap_quantizers(model):
        raise ValueError(
            f"model: nothing to accelerate in {type(model).__name__}: no module in it has the structure of "
            f"{kakaobrain.QUANTIZER}, of {kakaobrain_soft_codes.TRANSFORMER}, of {kakaobrain_sampling.SAMPLER} or of "
            f"{var.QUANTIZER}. Known models: kakaobrain's RQ-VAE and RQ-Transformer, VAR's tokenizer."
        )
    if lazy_soft_codes:
        if not quantizers:
            raise ValueError(f"lazy_soft_codes: no quantizer in {type(model).__name__} that could return them")
        kakaobrain_soft_codes.make_soft_codes_lazy(model)
    return model
