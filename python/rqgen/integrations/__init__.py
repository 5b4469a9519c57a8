"""Our operators inside models of other systems, recognised by their structure; none of them is imported."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from . import kakaobrain

__all__ = ["accelerate"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def accelerate(model: ModelT) -> ModelT:
    """Swaps our operators into the parts of a foreign model that are known here, in place.

    Known so far: the quantizer of kakaobrain's RQ-VAE (see `rqgen.integrations.kakaobrain` for what stays the
    same and what differs), anywhere in the module tree of `model` or `model` itself. Parameters, buffers,
    hooks and the state dict are untouched; a second call changes nothing.

        vae = accelerate(vae)       # their class, their checkpoint, their training script

    Args:
        model: what holds such a part; it is changed.

    Returns:
        `model`.

    Raises:
        TypeError: model is not a module.
        ValueError: nothing in it is known, or a known part holds what the swap cannot serve (named).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not kakaobrain.swap_quantizers(model):
        raise ValueError(
            f"model: nothing to accelerate in {type(model).__name__}: no module in it has the structure of "
            f"{kakaobrain.QUANTIZER}. Known models: kakaobrain's RQ-VAE."
        )
    return model
