"""Arguments of `generate`, `edit` and the pipeline, checked: every error names the argument, what was expected and what
came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rqgen.checks import check_integer, check_range
from rqgen.models import Prior, Tokenizer
from rqgen.models.classes import class_label, names_of_classes
from rqgen.models.pretrained import MODELS
from rqgen.reading import shorten

_MOST_IMAGES = 2**31 - 1


@dataclass(frozen=True)
class KnownRows:
    """Codes that are given: the first rows of the codes of each image.

    Attributes:
        codes: (num, h, w, D), of a prior over stacks of codes; rows from `rows` on are ignored.
        rows: number of rows that are kept, in [0, h).
    """

    codes: Tensor
    rows: int


def check_models(prior: Any, vae: Any) -> None:
    """Raise TypeError or ValueError unless they are a prior and the tokenizer whose codes it models, on one device."""
    if not isinstance(prior, Prior):
        known = ", ".join(model.__name__ for model in MODELS.values() if issubclass(model, Prior))
        raise TypeError(f"prior: expected a prior ({known}), got {type(prior).__name__}")
    if not isinstance(vae, Tokenizer):
        expected = prior.tokenizer_class.__name__
        raise TypeError(f"vae: expected an {expected}, got {type(vae).__name__}")
    prior.check_tokenizer(vae)


def check_condition(condition: Any, prior: Prior, names: Sequence[str] | None = None) -> Tensor:
    """Return the condition as an int64 tensor on the prior's device, every id in range: integers of every width, class
    names (the prior's, or `names`) become labels."""
    prior.check_values()
    names = names_of_classes(prior) if names is None else names
    condition = _labels_of_names(condition, names)
    try:
        # A copy, because torch takes neither negative strides nor, without a warning, arrays that are read-only.
        given = np.array(condition) if isinstance(condition, (np.ndarray, np.generic)) else condition
        # On the CPU, whatever torch's default device is.
        condition = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"condition: expected a tensor or a list of integers or class names, got {shorten(condition)}"
        ) from error
    if condition.is_meta:
        raise ValueError("condition: expected a tensor with values, got one on the meta device")
    condition = condition.to(prior.device)
    if condition.dim() == 0 or condition.shape[0] == 0:
        raise ValueError(f"condition: expected at least one row, got shape {tuple(condition.shape)}")
    condition = prior.condition_ids(condition, condition.shape[0])
    check_range(condition, prior.condition_size, "condition")
    return condition


def _labels_of_names(condition: Any, names: Sequence[str]) -> Any:
    if isinstance(condition, str):
        raise TypeError(f"condition: expected a tensor or a list of integers or class names, got {condition!r}")
    if isinstance(condition, np.ndarray) and condition.dtype.kind in "UO":
        condition = condition.tolist()
    if not isinstance(condition, (list, tuple)):
        return condition
    return [
        class_label(entry, names, "condition")
        if isinstance(entry, str)
        else _labels_of_names(entry, names)
        if isinstance(entry, (list, tuple))
        else entry
        for entry in condition
    ]


def check_known(known: Any, prior: Prior) -> Tensor | None:
    """Return the known codes (num, n) on the prior's device, in range; None where none are given."""
    if known is None:
        return None
    if not isinstance(known, KnownRows):
        raise TypeError(f"known: expected a KnownRows, got {type(known).__name__}")
    layout = prior.layout
    if layout.kind != "stacks":
        raise ValueError(
            f"known: a {type(prior).__name__} samples whole token maps; rqgen.edit keeps parts of an image"
        )
    if not isinstance(known.codes, Tensor):
        raise TypeError(f"known.codes: expected a tensor, got {type(known.codes).__name__}")
    if known.codes.dtype != torch.int64:
        raise TypeError(f"known.codes: expected int64, got {known.codes.dtype}")
    if known.codes.shape[1:] != layout.shape or known.codes.shape[0] == 0:
        expected = ", ".join(map(str, layout.shape))
        raise ValueError(f"known.codes: expected shape (num, {expected}), got {tuple(known.codes.shape)}")
    height, width, depth = known.codes.shape[1:]
    rows = check_integer(known.rows, "known.rows", 0, height - 1)
    check_range(known.codes[:, :rows], layout.codebook_size, "known.codes in the known rows")
    return known.codes.to(prior.device).flatten(1)[:, : rows * width * depth]


def number_of_images(condition: Tensor | None, num: Any, known: Tensor | None) -> int:
    """Return the number of images that are asked for."""
    if num is not None:
        num = check_integer(num, "num", 1)
        if num > _MOST_IMAGES:
            raise ValueError(f"num: expected at most {_MOST_IMAGES} images, got {num}")
        if condition is not None:
            raise ValueError(f"num: expected None with a condition, whose length is the number of images, got {num}")
    counts = {
        name: count
        for name, count in (
            ("num", num),
            ("condition", None if condition is None else condition.shape[0]),
            ("known.codes", None if known is None else known.shape[0]),
        )
        if count is not None
    }
    if not counts:
        raise ValueError("num: expected the number of images, as there is no condition; got None")
    if len(set(counts.values())) > 1:
        raise ValueError(f"known.codes: expected the same number of images everywhere, got {counts}")
    return next(iter(counts.values()))


def finished_images(images: Tensor, first_image: int) -> Tensor:
    """Return images as `generate` and `edit` return them, in [-1, 1].

    Raises:
        ValueError: a value that is not finite; a clamped one would look like a picture.
    """
    bad = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"vae: expected finite images, got NaN or infinity in image {first_image + bad[0]}")
    return images.clamp(-1, 1)
