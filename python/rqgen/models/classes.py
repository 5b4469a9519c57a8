"""Names of classes, and labels found by them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rqgen.checks import DIGIT_NAMES, find_name
from rqgen.config import did_you_mean

from .interfaces import Prior


def names_of_classes(prior: Prior) -> tuple[str, ...]:
    """Return a name for each class: the prior's own, or else its number."""
    return prior.class_names or _numbers(prior.num_classes)


def class_label(given: str, names: Sequence[str], argument: str) -> int:
    """Return the label of a class that is given by its name, or by its number, among the `names` of all classes.

    A name comes first. Where classes have numbers as names ("10", "2", "33", sorted as text, or "three", "seven"), a
    number is always a name, so that it is never taken for the label of another class; digits have their labels as
    names.

    Raises:
        ValueError: no such class, or none at all; starts with `argument`.
    """
    names = tuple(names)
    if not names:
        raise ValueError(f"{argument}: expected none, as this prior knows no classes, got '{given}'")
    label = find_name(given, names)
    if label is not None:
        return label
    ordered = names in (_numbers(len(names)), DIGIT_NAMES[: len(names)])
    numbered = not ordered and (set(names) <= set(DIGIT_NAMES) or any(_is_number(name) for name in names))
    if not _is_number(given) or numbered:
        hint = " (classes have numbers as names here: a number is a name)" if numbered and _is_number(given) else ""
        raise ValueError(f"{argument}: unknown class '{given}'; {did_you_mean(given, names)}{hint}")
    # Python reads no number of thousands of digits.
    if len(given) > 20 or not 0 <= int(given) < len(names):
        raise ValueError(f"{argument}: expected 0..{len(names) - 1}, got {given[:20]}{'...' * (len(given) > 20)}")
    return int(given)


def _numbers(classes: int) -> tuple[str, ...]:
    return tuple(map(str, range(classes)))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]+", text) is not None
