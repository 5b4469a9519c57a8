"""Settings: dataclasses from plain data, YAML files and command-line overrides, and back.

Every configuration of this package is a dataclass. A scalar in a file or an override is text until the setting's own
type reads it: `010` is the class "010" where a class name stands and 10 where a number does. Nothing is resolved or
executed: `${...}`, tags and merge keys have no meaning here. Every value remembers where it was written, so that an
error names the file, the line and the dotted key.

Three class attributes of a settings dataclass are read here: ``recipe`` (see `load`), ``shorthand``, the field that a
scalar stands for where the section is expected (`data.folder=PATH`), and ``moved``, which maps keys that older versions
wrote to where they stand now (`{"fit": "folder.fit"}`).
"""

from .bounds import MAX_SEED, check_bounds, check_fields, check_finite, check_seeds
from .fields import nested_dataclasses, setting_names, shorthands
from .layers import find_file, given, load
from .plain import to_dict
from .registry import Registered, Registry, did_you_mean, one_of, suggestion
from .sections import fill_sections, open_sections
from .typed import Given, from_dict
from .yaml_text import read_yaml, scalar_text, to_yaml

__all__ = [
    "MAX_SEED",
    "Given",
    "Registered",
    "Registry",
    "check_bounds",
    "check_fields",
    "check_finite",
    "check_seeds",
    "did_you_mean",
    "fill_sections",
    "find_file",
    "from_dict",
    "given",
    "load",
    "nested_dataclasses",
    "one_of",
    "open_sections",
    "read_yaml",
    "scalar_text",
    "setting_names",
    "shorthands",
    "suggestion",
    "to_dict",
    "to_yaml",
]
