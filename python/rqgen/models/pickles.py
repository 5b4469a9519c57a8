"""Torch checkpoints of others: pickles of tensors, of which nothing is executed and nothing damaged is taken."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from rqgen.reading import PICKLE, TORCH_CHECKPOINT, describe_file, name_some, shorten, unreadable

_SAFE_GLOBALS = re.compile(r"collections\.OrderedDict|torch\.\w+|torch\._utils\._\w+|torch\.storage\.\w+")


def unpickle(path: Path) -> Any:
    """Return the content of a torch checkpoint: tensors and plain values. Raise ValueError for anything else.

    Its checksums are compared, where it has them: torch itself reads damaged weights without a word.
    """
    found = describe_file(path)
    if found == PICKLE or not found.startswith(TORCH_CHECKPOINT):
        raise _refusal(path) or unreadable(path, "torch checkpoint")
    try:
        # Mapped into memory where it can be: not a file of the older layout, nor one that was zipped anew.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_stored_whole(path))
    except pickle.UnpicklingError:
        # Not chained: torch's text tells how to have the code in a file executed.
        raise _refusal(path) or unreadable(path, "torch checkpoint", "its pickle is damaged") from None
    except Exception as error:  # torch.load raises whatever the damage makes of the file
        raise unreadable(path, "torch checkpoint", str(error).strip().partition("\n")[0]) from error


def check_state_dict(content: Any, path: Path, key: str = "", *, infinite: Collection[str] = ()) -> dict[str, Tensor]:
    """`content`, once it is a state dict: finite, dense tensors by name, none larger than the file it came from.
    Those named by `infinite` need not be finite.

    Raises:
        ValueError: it is anything else; starts with `path` and `key`.
    """
    where = f"{path}: {key!r}" if key else str(path)
    if not isinstance(content, Mapping) or not content:
        found = "nothing" if content == {} else type(content).__name__
        raise ValueError(f"{where}: expected tensors by name, got {found}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            found = name_some(map(shorten, content))
            raise ValueError(f"{where}: expected tensors by name, got {type(tensor).__name__} among {found}")
        if fault := _fault_of(tensor, path.stat().st_size, finite=name not in infinite):
            raise ValueError(f"{where}: {name[:100]}: {fault}")
    return dict(content)


def _refusal(path: Path) -> ValueError | None:
    """The error for a pickle of more than tensors and plain values, which names its classes; None where it has none."""
    if not (classes := sorted(set(_pickled_globals(path)))):
        return None
    return ValueError(
        f"{path}: refused: it holds objects of {name_some(classes)}, and reading those could execute code; only "
        "tensors and plain values are read: ask for the state dict alone"
    )


def _pickled_globals(path: Path) -> Iterator[str]:
    """Dotted names of the classes and functions that a pickle, of torch or not, asks for beyond those of tensors.
    Nothing is executed."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                (name,) = (name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
                stream: IO[bytes] = io.BytesIO(archive.read(name))
        else:
            stream = path.open("rb")
        with stream:
            for _ in range(5):  # pickles one after another in the older layout
                texts: list[str] = []
                for opcode, argument, _ in pickletools.genops(stream):
                    name = ""
                    if opcode.name in ("GLOBAL", "INST"):
                        name = str(argument).replace(" ", ".")
                    elif opcode.name == "STACK_GLOBAL":
                        name = ".".join(texts[-2:])
                    elif isinstance(argument, str):
                        texts.append(argument)
                    if name and not _SAFE_GLOBALS.fullmatch(name):
                        yield name
    except (ValueError, LookupError, ArithmeticError, OSError, zipfile.BadZipFile):
        return  # its end, or where it is damaged


def _is_stored_whole(path: Path) -> bool:
    """Return True if nothing in a checkpoint is compressed; False for one that is no zip archive. Raise ValueError if
    a checksum differs."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.CRC == 0:  # written without, by choice
                continue
            try:
                with archive.open(entry) as file:
                    while file.read(1 << 22):
                        pass
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise ValueError(f"{entry.filename} is damaged: {error}") from error
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _fault_of(tensor: Tensor, file_size: int, *, finite: bool) -> str | None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return f"expected a dense tensor, got {tensor.layout} {tensor.dtype} on {tensor.device.type}"
    # A tensor may be a view that repeats a few numbers endlessly.
    if tensor.numel() * tensor.element_size() > file_size:
        return f"shape {tuple(tensor.shape)} is more than the whole file holds"
    if finite and tensor.is_floating_point() and not tensor.float().isfinite().all():
        return "NaN or infinity among its numbers"
    return None
