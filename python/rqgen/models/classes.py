"""Classes of a prior: how many there are, what they are called, and which one is meant."""

from __future__ import annotations

import re
import unicodedata

from rqgen.config import did_you_mean

from .rqtransformer import RQTransformer
from .var import VAR


def number_of_classes(prior: RQTransformer | VAR) -> int:
    """Classes that a prior can be asked for; 0 without a class condition."""
    if isinstance(prior, VAR):
        return prior.config.num_classes
    return prior.config.condition_vocab_size if prior.config.condition == "class" else 0


def names_of_classes(prior: RQTransformer | VAR) -> tuple[str, ...]:
    """A name for each class: the prior's own, or else its number."""
    return prior.config.class_names or _numbers(number_of_classes(prior))


def class_label(given: str, prior: RQTransformer | VAR, argument: str) -> int:
    """The label of a class that is given by its name, or by its number.

    A name comes first. Where classes have numbers as names ("10", "2", "33", sorted as text), a number is only ever a
    name, so that none is taken for the label of another class; digits are called what their labels are.

    Raises:
        ValueError: no such class, or none at all; starts with `argument`.
    """
    classes, names = number_of_classes(prior), names_of_classes(prior)
    if classes == 0:
        raise ValueError(f"{argument}: expected none, as this prior knows no classes, got '{given}'")
    # One letter may be several code points: files and keyboards differ in that.
    by_name = {unicodedata.normalize("NFC", name): label for label, name in reversed(list(enumerate(names)))}
    by_name |= {name: label for label, name in enumerate(names)}
    label = by_name.get(given, by_name.get(unicodedata.normalize("NFC", given)))
    if label is not None:
        return label
    numbered = names != _numbers(classes) and any(_is_number(name) for name in names)
    if not _is_number(given) or numbered:
        hint = " (classes have numbers as names here: a number is a name)" if numbered and _is_number(given) else ""
        raise ValueError(f"{argument}: unknown class '{given}'; {did_you_mean(given, names)}{hint}")
    if not 0 <= int(given) < classes:
        raise ValueError(f"{argument}: expected 0..{classes - 1}, got {given}")
    return int(given)


def _numbers(classes: int) -> tuple[str, ...]:
    return tuple(map(str, range(classes)))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]+", text) is not None
