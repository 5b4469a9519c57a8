"""Checkpoints of other systems, read into our models."""

from .kakaobrain import load_kakaobrain
from .var import load_var

__all__ = ["load_kakaobrain", "load_var"]
