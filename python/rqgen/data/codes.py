"""Images as codes on disk: one safetensors file with everything needed to read it again."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT_VERSION = 1


@dataclass
class EncodedImages:
    """Codes int64 (N, h, w, D) with labels int64 (N,), -1 for "no class".

    ``codebook_id`` (see `codebook_fingerprint`) says which codebooks the codes belong to; ``info`` is free
    (the data's settings, the tokenizer's folder).
    """

    codes_nhwd: torch.Tensor
    labels: torch.Tensor
    codebook_size: int
    codebook_id: str
    class_names: tuple[str, ...]
    info: dict[str, Any]

    def __post_init__(self) -> None:
        codes = self.codes_nhwd
        if codes.ndim != 4 or codes.is_floating_point():
            raise ValueError(f"codes: expected integers (N, h, w, D), got {codes.dtype} {tuple(codes.shape)}")
        if self.labels.shape != codes.shape[:1]:
            raise ValueError(f"labels: expected shape {tuple(codes.shape[:1])}, got {tuple(self.labels.shape)}")
        if codes.numel():
            lowest, highest = (int(value) for value in codes.aminmax())
            if lowest < 0 or highest >= self.codebook_size:
                raise ValueError(f"codes: expected 0 <= code < {self.codebook_size}, got {lowest}..{highest}")


def codebook_fingerprint(codebooks: torch.Tensor) -> str:
    """The first 16 hex digits of SHA-256 over the codebooks' float32 bytes and their shape."""
    values = codebooks.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def write_codes(path: Path, encoded: EncodedImages) -> None:
    """Writes tensors "codes" (int32) and "labels" (int64) with metadata; whole or not at all."""
    metadata = {
        "format": "rqgen-codes",
        "format_version": str(FORMAT_VERSION),
        "codebook_size": str(encoded.codebook_size),
        "codebook_id": encoded.codebook_id,
        "class_names": json.dumps(list(encoded.class_names)),
        "info": json.dumps(encoded.info, sort_keys=True),
    }
    tensors = {
        "codes": encoded.codes_nhwd.to("cpu", torch.int32).contiguous(),
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
    """Reads what `write_codes` wrote. Raises FileNotFoundError, or ValueError for any other file."""
    if not path.is_file():
        raise FileNotFoundError(f"codes file not found: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "rqgen-codes":
                raise ValueError(f"{path}: not a file of codes written by 'rqgen encode'")
            if metadata.get("format_version") != str(FORMAT_VERSION):
                raise ValueError(
                    f"{path}: expected format_version {FORMAT_VERSION}, got {metadata.get('format_version')}"
                )
            codes_nhwd, labels = file.get_tensor("codes").long(), file.get_tensor("labels")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    return EncodedImages(
        codes_nhwd,
        labels,
        codebook_size=int(metadata["codebook_size"]),
        codebook_id=metadata["codebook_id"],
        class_names=tuple(json.loads(metadata["class_names"])),
        info=json.loads(metadata["info"]),
    )
