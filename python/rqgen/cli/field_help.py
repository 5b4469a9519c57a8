"""The documentation of dataclass fields, read from their source."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap


def first_paragraph(cls: type) -> str:
    """Return the first paragraph of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """Return field name -> documentation: the string under the field, or the entry in the docstring's "Attributes:"."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if dataclasses.is_dataclass(one):
            found |= _attributes_section(inspect.getdoc(one) or "") | _strings_under_fields(one)
    return found


def _attributes_section(doc: str) -> dict[str, str]:
    _, marker, text = doc.partition("Attributes:\n")
    entries: dict[str, str] = {}
    for entry in re.split(r"\n {4}(?=\S)", "\n" + textwrap.dedent(text).replace("\n", "\n    ")) if marker else ():
        names, colon, body = entry.partition(":")
        if colon and re.fullmatch(r"[\w, ]+", names.strip()):
            entries |= {name.strip(): " ".join(body.split()) for name in names.split(",")}
    return entries


def _strings_under_fields(cls: type) -> dict[str, str]:
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # a class that was typed into an interpreter, or made by code
        return {}
    strings: dict[str, str] = {}
    body = next(node.body for node in ast.parse(textwrap.dedent(source)).body if isinstance(node, ast.ClassDef))
    for field, text in itertools.pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
            strings[field.target.id] = " ".join(text.value.value.split())
    return strings
