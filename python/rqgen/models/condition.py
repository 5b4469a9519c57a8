"""What a prior is conditioned on: the checks and the null condition that all priors share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# All but bool, which is rather a mask than a class.
_INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,  # values that int64 has not become negative, and are out of range
)


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
    """A condition as int64 (B, L) ids; the null condition, where there is one, is id `vocab_size`.

    Args:
        condition: None; class labels (B,) or (B, 1); token ids (B, L); of any integer dtype. None means no condition at
            all for an unconditional prior, and the null condition for one that has it.
        batch: B.
        kind: "none", "class" or "tokens".
        length: L; 1 unless kind is "tokens".
        has_null: whether the prior learned a null condition.

    Raises:
        TypeError, ValueError, IndexError: wrong dtype, shape or device; a condition out of range (unchecked on CUDA,
            where the embedding kernel checks it); a condition missing, or given in vain.
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
    if not isinstance(condition, Tensor):
        raise TypeError(f"condition: expected a tensor, got {type(condition).__name__}")
    condition = integers(condition, "condition")
    if condition.shape != shape and (kind != "class" or condition.shape != (batch,)):
        expected = f"({batch},) or ({batch}, 1)" if kind == "class" else f"{shape}"
        raise ValueError(f"condition: expected shape {expected}, got {tuple(condition.shape)}")
    if condition.device != device:
        raise ValueError(f"condition: expected on {device}, where the prior is, got {condition.device}")
    check_range_without_waiting(condition, vocab_size, "condition")
    return condition.reshape(shape)


def checked_class_names(class_names: Sequence[str], classes: int | None = None) -> tuple[str, ...]:
    """The names as a tuple. Raises ValueError unless they differ from each other and there is one for each class, or
    none at all; of how many classes is open where `classes` is None."""
    names = tuple(class_names)
    if names and classes is not None and len(names) != classes:
        raise ValueError(f"class_names must be one for each of {classes} classes, or none, got {len(names)}")
    if not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) != len(names):
        raise ValueError(f"class_names must be names that differ from each other, got {list(names)[:20]}")
    return names


def check_range(ids: Tensor, size: int, name: str) -> None:
    """Raises IndexError unless all ids are in [0, size); reads them back from the device."""
    if ids.numel() == 0:
        return
    lowest, highest = (int(value) for value in ids.aminmax())
    if lowest < 0 or highest >= size:
        raise IndexError(f"{name}: expected values in [0, {size}), got {lowest if lowest < 0 else highest}")


def integers(ids: Tensor, name: str) -> Tensor:
    """Ids of any integer dtype as int64. Raises TypeError for others."""
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected int64, got {ids.dtype}")
    return ids.to(torch.int64)


def check_targets(ids: Tensor, size: int, name: str) -> None:
    """Raises TypeError or IndexError for ids that cannot be the targets of a cross-entropy over `size` of them."""
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {ids.dtype}")
    check_range_without_waiting(ids, size, name)


def check_range_without_waiting(ids: Tensor, size: int, name: str) -> None:
    """`check_range` on a CPU. On a GPU reading back would stall every training step, in a compiled graph it would
    break the graph."""
    if not (ids.is_cuda or torch.compiler.is_compiling()):
        check_range(ids, size, name)
