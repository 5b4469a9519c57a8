"""Images as codes on disk: one safetensors file with everything needed to read it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rqgen.checks import check_integer, check_within, checked_integers
from rqgen.files import CHECKSUM, UNSIGNED, check_tensors, new_file, sign_tensors
from rqgen.quantizers import CodeLayout, Codes
from rqgen.reading import require_file, shorten, unreadable

FORMAT_VERSION = 3
SUFFIX = ".safetensors"
# The metadata entry of a file, next to its checksum.
_ENTRY = "rqgen-codes"


@dataclass
class EncodedImages:
    """Codes as the tokenizer gives and takes them, with labels (N,), -1 for "no class".

    ``codes`` are integers, (N, h, w, D) of an RQ-VAE, a list of token maps (N, h_k, w_k) of a multi-scale VQ-VAE. They
    and the labels are kept as int64. ``class_names`` has a name for each label, or none at all.
    ``codebook_id`` (`Tokenizer.fingerprint`) says what the codes stand for; ``info`` is free (the data's settings, the
    tokenizer's folder).
    """

    codes: Codes
    labels: Tensor
    codebook_size: int
    codebook_id: str
    class_names: tuple[str, ...]
    info: dict[str, Any]

    def __post_init__(self) -> None:
        if isinstance(self.codes, Tensor):
            self.codes = checked_integers(self.codes, "codes", 4, expected="integers (N, h, w, D)")
            parts = [self.codes]
        else:
            kind = "integers (N, h_k, w_k) each"
            self.codes = parts = [checked_integers(tokens, "codes", 3, expected=kind) for tokens in self.codes]
            if not parts:
                raise ValueError("codes: expected at least one token map, got none")
        self.labels = checked_integers(self.labels, "labels", 1, expected="integers (N,)")
        self.codebook_size = check_integer(self.codebook_size, "codebook_size", 1, 2**31)
        if not isinstance(self.codebook_id, str):
            raise TypeError(f"codebook_id: expected text, got {self.codebook_id!r}")
        _check_json(self.info, "info")
        if isinstance(self.class_names, str):
            raise ValueError(f"class_names: expected a list of names, got {self.class_names!r}")
        self.class_names = tuple(self.class_names)
        if not all(isinstance(name, str) for name in self.class_names) or len(set(self.class_names)) < len(
            self.class_names
        ):
            raise ValueError(f"class_names: expected texts that differ from each other, got {list(self.class_names)}")
        for tokens in parts:
            if self.labels.shape != tokens.shape[:1]:
                raise ValueError(f"labels: expected shape {tuple(tokens.shape[:1])}, got {tuple(self.labels.shape)}")
            check_within(tokens, "codes", "code", 0, self.codebook_size)
        check_within(self.labels, "labels", "label", -1, len(self.class_names) or None)

    @property
    def layout(self) -> CodeLayout:
        """The shape of an image's codes."""
        return CodeLayout.of(self.codes, self.codebook_size)

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these codes from others, see `ImageDataset.fingerprint`."""
        digest = hashlib.sha256()
        for tensor in (self.layout.flatten(self.codes), self.labels):
            digest.update(tensor.to("cpu", torch.int32).contiguous().numpy().tobytes())
        names = digest.hexdigest()[:16]
        return {"images": len(self.labels), "classes": len(self.class_names), "codes": names}

    def check_tokenizer(self, layout: CodeLayout, codebook_id: str) -> None:
        """Raise ValueError unless they are the codes of a tokenizer with this layout and `fingerprint`."""
        if (self.layout.kind, self.layout.shape) != (layout.kind, layout.shape):
            raise ValueError(f"codes: expected {layout.in_words()}, as the tokenizer has, got {self.layout.in_words()}")
        if self.codebook_id != codebook_id:
            raise ValueError("codes: they were written by another tokenizer than the given one")


def _check_json(value: Any, name: str) -> None:
    """Raise TypeError unless a value is an object that JSON holds."""
    if not isinstance(value, dict):
        raise TypeError(f"{name}: expected a mapping, got {shorten(value)}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{name}: expected what JSON holds, got {shorten(value)} ({error})") from error


def check_codes_name(path: str | Path, name: str = "path") -> None:
    """Raise ValueError for a file name that says another format than safetensors: before the work whose result the
    file would hold."""
    if Path(path).suffix.lower() not in ("", SUFFIX):
        raise ValueError(
            f"{name}: codes are written as safetensors: expected a name that ends in {SUFFIX}, got '{path}'"
        )


def write_codes(path: str | Path, encoded: EncodedImages) -> None:
    """Write tensors "codes" (int32 (N, L), see `CodeLayout.flatten`) and "labels" (int64) with one entry of metadata,
    which is JSON, and a checksum; whole or not at all. The same codes give the same bytes."""
    path = Path(path)
    check_codes_name(path)
    encoded = replace(encoded)  # checks again: a field may have been set since
    description = {
        "format_version": FORMAT_VERSION,
        "code_shape": encoded.layout.to_json(),
        "codebook_size": encoded.codebook_size,
        "codebook_id": encoded.codebook_id,
        "class_names": list(encoded.class_names),
        "info": encoded.info,
    }
    tensors = {
        "codes": encoded.layout.flatten(encoded.codes).to("cpu", torch.int32).contiguous(),
        "labels": encoded.labels.to("cpu").contiguous(),
    }
    with new_file(path) as written:
        save_file(tensors, written, {_ENTRY: json.dumps(description, sort_keys=True), CHECKSUM: UNSIGNED})
        sign_tensors(written)


def is_codes_file(path: Path) -> bool:
    """Recognise a file that `write_codes` of any version wrote, by its metadata."""
    try:
        with safe_open(path, "pt") as file:
            _description(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError):
        return False
    return True


def read_codes(path: str | Path) -> EncodedImages:
    """Read what `write_codes` wrote, in this version or in the first two, which had an entry of metadata for each
    thing; in the first one codes are (N, h, w, D). Raise FileNotFoundError, or ValueError for any other file."""
    path = Path(path)
    require_file(path, "codes")
    path.open("rb").close()  # the library says of a file without permission that it is missing
    try:
        with safe_open(path, framework="pt") as file:
            version, description = _description(file.metadata() or {})
            missing = sorted({"codes", "labels"} - set(file.keys()))
            if missing:
                raise ValueError(f"expected the tensors codes and labels, but it lacks {', '.join(missing)}")
            codes, labels = file.get_tensor("codes"), file.get_tensor("labels")
        if version != 1:
            codes = checked_integers(codes, "codes", 2, expected="integers (N, L)")
            codes = _unflattened(codes, description["code_shape"])
        encoded = EncodedImages(
            codes,
            labels,
            codebook_size=description["codebook_size"],
            codebook_id=description["codebook_id"],
            class_names=tuple(description["class_names"]),
            info=description["info"],
        )
    except (SafetensorError, OSError) as error:
        raise unreadable(path, "safetensors file", error) from error
    except KeyError as error:
        raise ValueError(f"{path}: its metadata lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    check_tensors(path)
    return encoded


def _description(metadata: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    """The format's version, and what the metadata says in whichever version."""
    known: tuple[int, ...] = (FORMAT_VERSION,)
    if _ENTRY in metadata:
        description = _parsed(metadata, _ENTRY, dict)
        version = description.get("format_version")
    elif metadata.get("format") == "rqgen-codes":
        shown = metadata.get("format_version", "")
        version, known = int(shown) if shown.isdecimal() else shown, (1, 2)
        description = {"codebook_id": metadata["codebook_id"]} if "codebook_id" in metadata else {}
        texts = ("codebook_size", "class_names", "info", *(["code_shape"] if version == 2 else []))
        if version in known:
            description |= {name: _parsed(metadata, name, object) for name in texts if name in metadata}
    else:
        raise ValueError("not a file of codes written by 'rqgen encode'")
    if version not in known:
        raise ValueError(f"expected format_version {' or '.join(map(str, known))}, got {version}")
    for name, kind, expected in (
        ("codebook_size", int, "an integer"),
        ("codebook_id", str, "a text"),
        ("class_names", list, "a list of names"),
        ("info", dict, "a mapping"),
    ):
        if type(description[name]) is not kind:
            raise ValueError(f"{name}: expected {expected}, got {shorten(description[name])}")
    return version, description


def _parsed(metadata: Mapping[str, str], name: str, kind: type) -> Any:
    try:
        value = json.loads(metadata[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected a JSON object, got {type(value).__name__}")
    return value


def _unflattened(codes_nl: Tensor, code_shape: Any) -> Codes:
    try:
        # Codes are checked against their codebook's size once they have their shape.
        return CodeLayout.from_json(code_shape, codebook_size=1).unflatten(codes_nl)
    except ValueError as error:
        fault = f"code_shape: {shorten(code_shape)} does not fit codes {tuple(codes_nl.shape)}"
        raise ValueError(fault) from error
