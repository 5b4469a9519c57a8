"""Checkpoints of other systems, read into our models."""

from .kakaobrain import load_kakaobrain

__all__ = ["load_kakaobrain"]
