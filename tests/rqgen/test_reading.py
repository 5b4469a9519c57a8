"""Files are named for what they are, and text that would hang or fill memory is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rqgen.reading import describe_file, name_some, read_json, require_file, shorten, unreadable


def image(kind: str) -> Callable[[Path], None]:
    return lambda path: Image.new("RGB", (4, 4)).save(path, kind)


def torchscript(path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.jit.script(Module()).save(str(path))


def zipped(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "content")

    return write


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"), io.BytesIO())


def cut_short(write: Callable[[Path], None], length: int) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[:length])

    return cut


def tensors(path: Path) -> None:
    save_file({"a": torch.zeros(10)}, path)


def checkpoint(path: Path) -> None:
    torch.save({"a": torch.zeros(10)}, path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
KINDS: dict[str, bytes | Callable[[Path], None]] = {
    "an empty file": b"",
    "a file of 1 byte": b"{",
    "a file of 7 bytes": b"PK\x03\x04abc",
    "nothing but zeros": bytes(5000),
    "an HTML page": b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>Sign in</body></html>",
    "an XML document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a JSON file": b'{"error": "Repository not found"}',
    "a Git LFS pointer": LFS,
    "a git-annex pointer": b"/annex/objects/SHA256E-s12--4d7a.pt\n",
    "a gzip archive": gzip.compress(b"weights"),
    "an xz archive": lzma.compress(b"weights"),
    "a bzip2 archive": bz2.compress(b"weights"),
    "a tar archive": tarred,
    "a text file": "Ihre Gewichte: größer".encode(),
    "binary data": bytes(range(200, 256)) + bytes(range(100)),
    "a torch checkpoint": checkpoint,
    "a torch checkpoint of the older layout": lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
    "a zip archive that is cut short": cut_short(checkpoint, 400),
    "a TorchScript archive": torchscript,
    "an archive of NumPy arrays": lambda path: np.savez(path.open("wb"), a=np.zeros(3)),
    "a NumPy array": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "a zip archive, but no torch checkpoint (it holds a.txt, b.txt)": zipped("a.txt", "b.txt"),
    "a safetensors file": tensors,
    "a safetensors file that is cut short": cut_short(tensors, 40),
    "a Python pickle": pickle.dumps({"a": [1, 2, 3]}),
    "an ONNX model": b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x80\x01",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(20),
    "a GGUF model": b"GGUF\x03\0\0\0" + bytes(20),
    "a PNG image": image("PNG"),
    "a JPEG image": image("JPEG"),
    "a WebP image": image("WEBP"),
    "a script": b"#!/bin/sh\necho hello\n",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    content, path = KINDS[kind], tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    found = describe_file(path)
    assert kind in found
    # Not another kind that merely contains these words.
    longer = [other for other in KINDS if kind in other and other != kind]
    assert not any(other in found for other in longer)


def test_what_is_no_file(tmp_path: Path) -> None:
    assert describe_file(tmp_path) == "a folder"
    assert describe_file(tmp_path / "nothing") == "no file"
    (tmp_path / "link").symlink_to("gone.pt")
    assert describe_file(tmp_path / "link") == "a link to gone.pt, which is missing"
    os.mkfifo(tmp_path / "pipe")
    assert describe_file(tmp_path / "pipe") == "a device or pipe"
    assert describe_file("a\0b").startswith("a file that cannot be opened")
    assert describe_file(tmp_path / ("long" * 100)).startswith("a file that cannot be opened (File name too long")
    for name in ("nothing", "link", "pipe", "."):
        with pytest.raises(FileNotFoundError, match="weights: no file "):
            require_file(tmp_path / name, "weights")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a").write_text("x")
    monkeypatch.setattr(Path, "open", refuse)
    assert describe_file(tmp_path / "a") == "a file that cannot be opened (Permission denied)"


def test_the_readers_reason_is_given_where_it_matters(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a.pt")
    assert str(unreadable(tmp_path / "a.pt", "torch checkpoint", "bad\n record")).endswith(
        "a.pt: not a readable torch checkpoint: it is a torch checkpoint (bad record)"
    )
    assert str(unreadable(tmp_path / "a.pt", "safetensors file", "header too large")).endswith(
        "a.pt: not a readable safetensors file: it is a torch checkpoint"
    )


# --- JSON and YAML


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON: it is an empty file"),
        (b"<html></html>", "not valid JSON: it is an HTML page"),
        (LFS, "not valid JSON: it is a Git LFS pointer"),
        (b'{"a": 1,}', "not valid JSON: it is a JSON file .*line 1"),
        (b'{"a": "\xff\xfe\xfd"}', "not valid JSON: it is "),
        (b"[" * 100_000, "nested more than 100 levels deep"),
        (b'{"a":' * 150 + b"1" + b"}" * 150, "nested more than 100 levels deep"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b" " * (17 * 2**20) + b"{}", "larger than 16 MiB"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read_json(tmp_path / "config.json")


def test_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": [1]}).encode())
    assert read_json(tmp_path / "config.json") == {"a": [1]}


# --- values in messages


def test_values_are_shortened() -> None:
    nested: list[object] = []
    for _ in range(50):
        nested = [nested, nested]  # 2^50 values when written out
    assert len(shorten(nested)) < 1000
    assert len(shorten("x" * 10**6)) < 100 and len(shorten(10**1000)) < 100
    assert shorten([8, 16]) == "[8, 16]"
    assert name_some(["a", "b"]) == "a, b" and name_some("abcdefgh", 2) == "a, b and 6 more"
