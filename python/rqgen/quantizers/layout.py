"""The shape of an image's codes, and everything that depends on it alone."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rqgen.checks import check_range_without_waiting, check_tensor

Codes = Tensor | list[Tensor]
"""Codes of N images: stacks int64 (N, h, w, D), or a list of token maps int64 (N, h_k, w_k)."""


@dataclass(frozen=True)
class CodeLayout:
    """The layout of the codes of an image.

    Attributes:
        kind: "stacks": D codes at each of h x w positions, one tensor (N, h, w, D). "maps": a token map per scale, a
            list of tensors (N, h_k, w_k), from coarse to fine.
        shape: (h, w, D), or (h_k, w_k) of each token map.
        codebook_size: K; codes are in [0, K).
    """

    kind: Literal["stacks", "maps"]
    shape: tuple[int, int, int] | tuple[tuple[int, int], ...]
    codebook_size: int

    def __post_init__(self) -> None:
        # Integers of NumPy, of which settings may be made, are told from pairs by being Python's.
        sizes = tuple(tuple(map(int, part)) if isinstance(part, (tuple, list)) else int(part) for part in self.shape)
        object.__setattr__(self, "shape", sizes)  # the dataclass is frozen

    @classmethod
    def stacks(cls, shape: Sequence[int], codebook_size: int) -> CodeLayout:
        """D codes at each of h x w positions, from [h, w, D]."""
        if len(shape) != 3:
            raise ValueError(f"code_shape: expected [h, w, D], got {list(shape)}")
        height, width, depth = shape
        return cls("stacks", (height, width, depth), codebook_size)

    @classmethod
    def maps(cls, shape: Sequence[Sequence[int]], codebook_size: int) -> CodeLayout:
        """A token map per scale, from [h_k, w_k] of each."""
        return cls("maps", tuple((height, width) for height, width in shape), codebook_size)

    @classmethod
    def of(cls, codes: Codes, codebook_size: int) -> CodeLayout:
        """The layout that these codes have: of a tensor (N, h, w, D), or a list of (N, h_k, w_k)."""
        if isinstance(codes, Tensor):
            return cls.stacks(codes.shape[1:], codebook_size)
        return cls.maps([tokens.shape[1:] for tokens in codes], codebook_size)

    @classmethod
    def from_json(cls, shape: Any, codebook_size: int) -> CodeLayout:
        """The layout of what `to_json` gave. Raise ValueError for anything else."""
        nested = isinstance(shape, list) and all(isinstance(part, list) for part in shape)
        parts = shape if nested else [shape]
        sizes = (2,) if nested else (3,)
        if not (
            isinstance(shape, list)
            and shape
            and all(len(part) in sizes and all(type(n) is int and n >= 1 for n in part) for part in parts)
        ):
            raise ValueError(f"code_shape: expected [h, w, D], or [h, w] of each token map, got {str(shape)[:200]}")
        return cls.maps(shape, codebook_size) if nested else cls.stacks(shape, codebook_size)

    def to_json(self) -> list[int] | list[list[int]]:
        """`shape` in lists: [h, w, D], or [h_k, w_k] of each token map."""
        return list(self._shapes[0]) if self.kind == "stacks" else [list(scale) for scale in self._shapes]

    @property
    def axis(self) -> str:
        """The name of what is counted by `levels`: "depth" or "scale"."""
        return "depth" if self.kind == "stacks" else "scale"

    @property
    def levels(self) -> int:
        """D, or the number of token maps: an image decoded from the first levels alone is a coarser one."""
        return self._shapes[0][2] if self.kind == "stacks" else len(self.shape)

    @property
    def level_sizes(self) -> list[int]:
        """Codes of each level: h * w of a stack's depths, h_k * w_k of the token maps."""
        if self.kind == "stacks":
            return [self.count // self.levels] * self.levels
        return [math.prod(scale) for scale in self._shapes]

    @property
    def count(self) -> int:
        """L, codes of an image."""
        return sum(math.prod(shape) for shape in self._shapes)

    @property
    def steps(self) -> list[tuple[int, slice]]:
        """The steps of an autoregressive prior, in order: (level, the codes' places among the L of `flatten`).
        A code by itself in stacks, position by position and depth by depth; a whole token map otherwise."""
        if self.kind == "stacks":
            return [(place % self.levels, slice(place, place + 1)) for place in range(self.count)]
        ends = list(itertools.accumulate(self.level_sizes))
        return [(k, slice(end - size, end)) for k, (end, size) in enumerate(zip(ends, self.level_sizes, strict=True))]

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        """The shape of each tensor of codes, without the images' dimension."""
        maps: list[tuple[int, ...]] = [scale for scale in self.shape if isinstance(scale, tuple)]
        return maps or [tuple(size for size in self.shape if isinstance(size, int))]

    def _parts(self, codes: Codes) -> list[Tensor]:
        return [codes] if isinstance(codes, Tensor) else list(codes)

    def _whole(self, parts: list[Tensor]) -> Codes:
        return parts[0] if self.kind == "stacks" else parts

    def map(self, function: Callable[[Tensor], Tensor], codes: Codes) -> Codes:
        """Apply a function to every tensor of `codes`: move it to a device, take some of the images, ..."""
        return self._whole([function(part) for part in self._parts(codes)])

    def select(self, codes: Codes, rows: slice) -> Codes:
        """Codes of some of the images."""
        return self.map(lambda part: part[rows], codes)

    def concatenate(self, batches: Sequence[Codes]) -> Codes:
        """Codes of several batches of images, one after another."""
        return self._whole([torch.cat(same) for same in zip(*map(self._parts, batches), strict=True)])

    def flatten(self, codes: Codes) -> Tensor:
        """All codes of an image side by side, (N, L): stacks position by position and depth by depth, token maps scale
        by scale."""
        parts = [part.flatten(1) for part in self._parts(codes)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def unflatten(self, codes_nl: Tensor) -> Codes:
        """The opposite of `flatten`. Raise ValueError for another number of codes than `count`."""
        if codes_nl.ndim != 2 or codes_nl.shape[1] != self.count:
            raise ValueError(f"codes: expected (N, {self.count}), got {tuple(codes_nl.shape)}")
        parts = codes_nl.split([math.prod(shape) for shape in self._shapes], dim=1)
        return self._whole([part.unflatten(1, shape) for part, shape in zip(parts, self._shapes, strict=True)])

    def by_level(self, codes: Codes) -> list[Tensor]:
        """The codes of each level: (N, h, w) for each depth, or the token maps."""
        return list(codes.unbind(-1)) if isinstance(codes, Tensor) else list(codes)

    def in_words(self) -> str:
        """Return text such as "8x8x4 codes" or "token maps of 1x1, 2x2, 4x4"."""
        texts = ["x".join(map(str, shape)) for shape in self._shapes]
        return f"{texts[0]} codes" if self.kind == "stacks" else f"token maps of {', '.join(texts)}"

    def check(self, codes: Any, *, device: torch.device | None = None, owner: str = "model") -> None:
        """Raise unless `codes` are int64, of this layout and in [0, K), and on `device`, that of their `owner`, where
        one is given.

        Raises:
            TypeError: no tensor (or no list of tensors, where it should be one), or not int64.
            ValueError: another shape, another number of token maps, or on another device.
            IndexError: a code out of range (unchecked on CUDA, where reading it back would stall training).
        """
        names = ["codes"]
        if self.kind == "maps":
            if isinstance(codes, (Tensor, str)) or not isinstance(codes, Sequence):
                raise TypeError(f"codes: expected a list of token maps, got {type(codes).__name__}")
            if len(codes) != self.levels:
                raise ValueError(f"codes: expected {self.levels} token maps, got {len(codes)}")
            names = [f"codes[{k}]" for k in range(len(codes))]
        parts = [codes] if self.kind == "stacks" else list(codes)
        for one, part, shape in zip(names, parts, self._shapes, strict=True):
            check_tensor(part, one)
            if part.dtype != torch.int64:
                raise TypeError(f"{one}: expected int64, got {part.dtype}")
            same = part.ndim == 1 + len(shape) and tuple(part.shape[1:]) == shape and len(part) == len(parts[0])
            if not same:
                raise ValueError(f"{one}: expected shape (B, {', '.join(map(str, shape))}), got {tuple(part.shape)}")
            check_tensor(part, one, device, owner)
            check_range_without_waiting(part, self.codebook_size, one)


def code_fingerprint(*tensors: Tensor) -> str:
    """The first 16 hex digits of SHA-256 over all that decides what a code stands for: codebooks, and of token maps
    what refines them. Of each tensor its shape and float32 bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(str(tuple(values.shape)).encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
