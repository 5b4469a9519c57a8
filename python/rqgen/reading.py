"""Reading files that others wrote: a file that cannot be read is named for what it is."""

from __future__ import annotations

import codecs
import json
import os
import re
import reprlib
import stat
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_HEAD_BYTES = 4096
# A configuration is smaller by far; what is larger is another file under its name.
_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_NESTING = 100

# The first bytes of a file, at an offset, and its kind. The first that fits counts.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer (git lfs pull fetches the file itself)"),
    (0, b"/annex/objects/", "a git-annex pointer (git annex get fetches the file itself)"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\xfd7zXZ\0", "an xz archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (0, b"\x04\x22\x4d\x18", "an lz4 archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a rar archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"GGUF", "a GGUF model"),
    (0, b"\x93NUMPY", "a NumPy array (.npy)"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"PAR1", "a Parquet table"),
    (0, b"ARROW1", "an Arrow table"),
    (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (4, b"ftyp", "a video or image of the MP4 family"),
    (0, b"\x7fELF", "a compiled library or program"),
    (0, b"#!", "a script"),
)
# The pickled number that torch's files of the older layout begin with.
_TORCH_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
TORCH_CHECKPOINT = "a torch checkpoint"
PICKLE = "a Python pickle that torch.save did not write"
SAFETENSORS = "a safetensors file"
JSON = "a JSON file"
TEXT = "a text file"
BINARY = "binary data of no known kind"


def describe_file(path: str | os.PathLike[str]) -> str:
    """Return what lies at a path, as a noun phrase: "an HTML page", "an empty file", "a folder", "a torch checkpoint".

    Judged by its first bytes, and an archive by the names in it: nothing is unpacked or executed.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return "a folder"
        if not stat.S_ISREG(mode):
            return "a device or pipe"
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        size = path.stat().st_size
    except FileNotFoundError:
        return f"a link to {os.readlink(path)}, which is missing" if path.is_symlink() else "no file"
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        return f"a file that cannot be opened ({getattr(error, 'strerror', None) or error})"
    if size == 0:
        return "an empty file"
    if size < 8:
        return f"a file of {size} byte{'s' if size > 1 else ''}"
    if not head.strip(b"\0"):
        return "a file that begins with nothing but zeros (an interrupted download?)"
    for offset, signature, kind in _SIGNATURES:
        if head.startswith(signature, offset):
            return kind
    if head.startswith(b"PK\x03\x04"):
        return _describe_zip(path)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return f"{TORCH_CHECKPOINT} of the older layout" if _TORCH_MAGIC in head[:32] else PICKLE
    if (length := struct.unpack_from("<Q", head)[0]) < 2**32 and head[8:9] == b"{":
        return SAFETENSORS if length + 8 <= size else f"{SAFETENSORS} that is cut short"
    if head[0] == 8 and 3 <= head[1] < 32 and head[2] in b"\x12\x1a\x22\x28\x32\x3a\x42":
        return "an ONNX model"
    return _describe_text(head)


def unreadable(path: Path, expected: str, reason: object = "") -> ValueError:
    """The error for a file that is not what it should be, or damaged: says what was expected and what lies there.

    Args:
        expected: without an article, "torch checkpoint".
        reason: what the reader said. Left out where the file is plainly of another kind.
    """
    found = describe_file(path)
    told = " ".join(str(reason).split())[:200]
    if told and (expected in found or found in (TEXT, BINARY, JSON) or found.startswith("a file of ")):
        found = f"{found} ({told})"
    fault = "not valid JSON" if expected == "JSON" else f"not a readable {expected}"
    return ValueError(f"{path}: {fault}: it is {found}")


def shorten(value: object) -> str:
    """A value as an error message shows it, however long or deep it is."""
    return _SHORT.repr(value)


def name_some(names: Iterable[object], count: int = 5) -> str:
    """The first names of many: "a, b, c and 7 more"."""
    listed = [str(name)[:100] for name in names]
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


def require_file(path: Path, name: str) -> None:
    """Raise FileNotFoundError unless there is a file; `name` says in the message what it was for."""
    if not path.is_file():
        found = describe_file(path)
        raise FileNotFoundError(f"{name}: no file {path}{'' if found == 'no file' else f': it is {found}'}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raise ValueError for anything else."""
    text = _read_text(path, "JSON")
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
        if _depth(content) > _MAX_NESTING:
            raise RecursionError
    except RecursionError as error:
        raise unreadable(path, "JSON", f"nested more than {_MAX_NESTING} levels deep") from error
    except ValueError as error:
        raise unreadable(path, "JSON", error) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


def _describe_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a zip archive that is cut short or damaged (torch checkpoints are zip archives)"
    within = {name.partition("/")[2] for name in names}
    if "constants.pkl" in within and any(name.startswith("code/") for name in within):
        return "a TorchScript archive (a program, no state dict)"
    if "archive_format" in within or "serialized_exported_program.json" in names:
        return "an archive of torch.export (a program, no state dict)"
    if "data.pkl" in within:
        return TORCH_CHECKPOINT
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)"
    if "model.weights.h5" in names:
        return "a Keras model"
    return f"a zip archive, but no torch checkpoint (it holds {name_some(names, 3) or 'nothing'})"


def _describe_text(head: bytes) -> str:
    try:
        # Not final: the head may end in the middle of a character.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).lstrip()
    except UnicodeDecodeError:
        return BINARY
    if re.search(r"[\0-\x08\x0e-\x1a]", text):
        return BINARY
    if re.match(r"(<!--.*?-->\s*)*<(!doctype html|html|head|body|title|script)\b", text, re.IGNORECASE | re.DOTALL):
        return "an HTML page"
    if re.match(r"<(\?xml|[a-z][\w:-]*[\s>])", text, re.IGNORECASE):
        return "an XML document"
    return JSON if text[:1] in ("{", "[") else TEXT


def _read_text(path: Path, kind: str) -> str:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise unreadable(path, kind, f"larger than {_MAX_CONFIG_BYTES // 2**20} MiB")
        return path.read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise unreadable(path, kind, error) from error


def _depth(content: Any) -> int:
    """Return the depth of nesting of dictionaries and lists."""
    depth, level = 0, [content]
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
    return depth
