"""Images as codes on disk: one safetensors file with everything needed to read it again."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rqgen.reading import shorten, unreadable

FORMAT_VERSION = 2

Codes = Tensor | list[Tensor]
# [h, w, D] of an image's stacks of codes, or [h_k, w_k] of each of its token maps.
CodeShape = list[int] | list[list[int]]
_T = TypeVar("_T")


def flatten_codes(codes: Tensor | Sequence[Tensor]) -> Tensor:
    """All codes of an image side by side, (N, L): stacks (N, h, w, D) position by position and depth by depth, token
    maps (N, h_k, w_k) scale by scale."""
    if isinstance(codes, Tensor):
        return codes.flatten(1)
    return torch.cat([tokens.flatten(1) for tokens in codes], dim=1)


def unflatten_codes(codes_nl: Tensor, code_shape: CodeShape) -> Codes:
    """The opposite of `flatten_codes`: (N, h, w, D) for [h, w, D], a list for a list of [h_k, w_k]."""
    if isinstance(code_shape[0], int):
        return codes_nl.unflatten(1, code_shape)
    parts = codes_nl.split([math.prod(scale) for scale in code_shape], dim=1)
    return [part.unflatten(1, scale) for part, scale in zip(parts, code_shape, strict=True)]


@dataclass
class EncodedImages:
    """Codes as the tokenizer gives and takes them, with labels int64 (N,), -1 for "no class".

    ``codes`` are integers, (N, h, w, D) of an RQ-VAE, a list of token maps (N, h_k, w_k) of a multi-scale VQ-VAE.
    ``codebook_id`` (see `code_fingerprint`) says what the codes stand for; ``info`` is free (the data's settings, the
    tokenizer's folder).
    """

    codes: Codes
    labels: Tensor
    codebook_size: int
    codebook_id: str
    class_names: tuple[str, ...]
    info: dict[str, Any]

    def __post_init__(self) -> None:
        maps, ndim, kind = ([self.codes], 4, "(N, h, w, D)") if self.stacked else (self.codes, 3, "(N, h_k, w_k) each")
        if not maps:
            raise ValueError("codes: expected at least one token map, got none")
        for tokens in maps:
            if tokens.ndim != ndim or tokens.is_floating_point():
                raise ValueError(f"codes: expected integers {kind}, got {tokens.dtype} {tuple(tokens.shape)}")
            if self.labels.shape != tokens.shape[:1]:
                raise ValueError(f"labels: expected shape {tuple(tokens.shape[:1])}, got {tuple(self.labels.shape)}")
            if tokens.numel():
                lowest, highest = (int(value) for value in tokens.aminmax())
                if lowest < 0 or highest >= self.codebook_size:
                    raise ValueError(f"codes: expected 0 <= code < {self.codebook_size}, got {lowest}..{highest}")

    @property
    def stacked(self) -> bool:
        """Whether they are stacks of codes, and not token maps of several scales."""
        return isinstance(self.codes, Tensor)

    @property
    def code_shape(self) -> CodeShape:
        """[h, w, D], or [h_k, w_k] of each token map."""
        if self.stacked:
            return list(self.codes.shape[1:])
        return [list(tokens.shape[1:]) for tokens in self.codes]

    def check_tokenizer(self, code_shape: CodeShape, codebook_id: str) -> None:
        """Raises ValueError unless they are the codes of a tokenizer with this shape and `code_fingerprint`."""
        if self.code_shape != code_shape:
            raise ValueError(
                f"codes: expected {code_shape_in_words(code_shape)}, as the tokenizer has, "
                f"got {code_shape_in_words(self.code_shape)}"
            )
        if self.codebook_id != codebook_id:
            raise ValueError("codes: they were written by another tokenizer than the given one")


def code_fingerprint(*tensors: Tensor) -> str:
    """The first 16 hex digits of SHA-256 over all that decides what a code stands for: codebooks, and of token maps
    what refines them. Of each tensor its shape and float32 bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(str(tuple(values.shape)).encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def write_codes(path: Path, encoded: EncodedImages) -> None:
    """Writes tensors "codes" (int32 (N, L), see `flatten_codes`) and "labels" (int64) with metadata; whole or not at
    all."""
    metadata = {
        "format": "rqgen-codes",
        "format_version": str(FORMAT_VERSION),
        "code_shape": json.dumps(encoded.code_shape),
        "codebook_size": str(encoded.codebook_size),
        "codebook_id": encoded.codebook_id,
        "class_names": json.dumps(list(encoded.class_names)),
        "info": json.dumps(encoded.info, sort_keys=True),
    }
    tensors = {
        "codes": flatten_codes(encoded.codes).to("cpu", torch.int32).contiguous(),
        "labels": encoded.labels.to("cpu", torch.int64).contiguous(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_codes(path: Path) -> EncodedImages:
    """Reads what `write_codes` wrote, in this version or the first, whose codes are (N, h, w, D). Raises
    FileNotFoundError, or ValueError for any other file."""
    if not path.is_file():
        raise FileNotFoundError(f"codes file not found: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "rqgen-codes":
                raise ValueError("not a file of codes written by 'rqgen encode'")
            version = metadata.get("format_version")
            if version not in ("1", str(FORMAT_VERSION)):
                raise ValueError(f"expected format_version 1 or {FORMAT_VERSION}, got {version}")
            codes, labels = _integers(file, "codes"), _integers(file, "labels")
        if version != "1":
            codes = _unflattened(codes, _from_json(metadata, "code_shape", list))
        return EncodedImages(
            codes,
            labels,
            codebook_size=_from_json(metadata, "codebook_size", int),
            codebook_id=metadata["codebook_id"],
            class_names=tuple(map(str, _from_json(metadata, "class_names", list))),
            info=_from_json(metadata, "info", dict),
        )
    except (SafetensorError, OSError) as error:
        raise unreadable(path, "safetensors file", error) from error
    except KeyError as error:
        raise ValueError(f"{path}: its metadata lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def code_shape_in_words(code_shape: CodeShape) -> str:
    """Such as "8x8x4 codes" or "token maps of 1x1, 2x2, 4x4"."""
    if isinstance(code_shape[0], int):
        return f"{'x'.join(map(str, code_shape))} codes"
    return f"token maps of {', '.join(f'{h}x{w}' for h, w in code_shape)}"


def _unflattened(codes_nl: Tensor, code_shape: CodeShape) -> Codes:
    try:
        shapes = [code_shape] if isinstance(code_shape[0], int) else code_shape
        fits = codes_nl.ndim == 2 and sum(map(math.prod, shapes)) == codes_nl.shape[1]
        if fits and min(map(min, shapes)) >= 1:
            return unflatten_codes(codes_nl, code_shape)
    except (LookupError, RuntimeError, TypeError, ValueError):
        pass
    raise ValueError(f"code_shape: {shorten(code_shape)} does not fit codes {tuple(codes_nl.shape)}")


def _integers(file: safe_open, name: str) -> Tensor:
    if name not in file.keys():  # noqa: SIM118 (not a dictionary)
        raise ValueError(f"it holds no tensor '{name}'")
    tensor = file.get_tensor(name)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int32 or int64, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor.long()


def _from_json(metadata: Mapping[str, str], key: str, kind: type[_T]) -> _T:
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key}: expected JSON of {kind.__name__}, got {shorten(metadata[key])}")
    return value
