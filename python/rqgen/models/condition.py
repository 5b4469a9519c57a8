"""Conditions of a prior: the checks and the null condition that all priors share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rqgen.checks import check_range_without_waiting, check_tensor, integers
from rqgen.reading import shorten


def condition_ids(
    condition: Tensor | None,
    batch: int,
    *,
    kind: str,
    vocab_size: int,
    length: int,
    has_null: bool,
    device: torch.device,
) -> Tensor:
    """Return a condition as int64 (B, L) ids; the null condition, where there is one, is id `vocab_size`.

    Args:
        condition: None; class labels (B,) or (B, 1); token ids (B, L); of any integer dtype. None means no condition at
            all for an unconditional prior, and the null condition for one that has it.
        batch: B.
        kind: "none", "class" or "tokens".
        length: L; 1 unless kind is "tokens".
        has_null: True if the prior learned a null condition.

    Raises:
        TypeError, ValueError, IndexError: wrong dtype, shape or device; a condition out of range (unchecked on CUDA,
            where the embedding kernel checks it); a missing condition, or one given to an unconditional prior.
    """
    shape = (batch, length)
    if condition is None:
        if kind != "none" and not has_null:
            raise ValueError(
                f"condition: this prior needs one ({kind}); it has no null condition, "
                "because its config.condition_dropout is 0"
            )
        return torch.full(shape, vocab_size, dtype=torch.int64, device=device)
    if kind == "none":
        raise ValueError("condition: this prior is unconditional, expected None")
    check_tensor(condition, "condition")
    condition = integers(condition, "condition")
    if condition.shape != shape and (kind != "class" or condition.shape != (batch,)):
        expected = f"({batch},) or ({batch}, 1)" if kind == "class" else f"{shape}"
        raise ValueError(f"condition: expected shape {expected}, got {tuple(condition.shape)}")
    check_tensor(condition, "condition", device, "prior")
    check_range_without_waiting(condition, vocab_size, "condition")
    return condition.reshape(shape)


def checked_class_names(class_names: Sequence[str], classes: int | None = None) -> tuple[str, ...]:
    """Return the names as a tuple. Raise ValueError unless they differ from each other and there is one for each class,
    or none at all. With `classes` None any number of them is accepted."""
    if isinstance(class_names, str):
        raise ValueError(f"class_names: expected a list of names, got {class_names!r}")
    names = tuple(class_names)
    if names and classes is not None and len(names) != classes:
        raise ValueError(f"class_names: expected one for each of {classes} classes, or none, got {len(names)}")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"class_names: expected names as text, got {shorten(name)}")
    if not all(name.strip() for name in names) or len(set(names)) != len(names):
        raise ValueError(f"class_names: expected names that differ from each other, got {list(names)[:20]}")
    return names
