"""Shapes of systems that use residual quantization, of tests/support/op_calls."""

from __future__ import annotations

from _harness import QUICK
from op_calls import Shape, codebook_at, shapes

SHAPES = shapes(QUICK)

__all__ = ["SHAPES", "Shape", "codebook_at"]
