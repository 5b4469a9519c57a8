"""Errors in the user's words."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Make an error that opens with a key of ``names``, such as "top_p: ..." or "top_p[2]: ...", open with its value,
    "--top-p": functions name their arguments, and the user gave an option."""
    try:
        yield
    except (ValueError, TypeError, LookupError, OSError) as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            found = re.match(r"(\w+)(?=[:\[])", error.args[0])
            if found is not None and found[1] in names:
                error.args = (names[found[1]] + error.args[0][found.end() :],)
        raise
