"""Shapes of the systems that residual quantization serves, as tests/support/op_calls has them for all callers."""

from __future__ import annotations

from _harness import QUICK
from op_calls import Shape, codebook_at, shapes

SHAPES = shapes(QUICK)

__all__ = ["SHAPES", "Shape", "codebook_at"]
