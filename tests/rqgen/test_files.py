"""Files: whole or not at all wherever the process is killed, one writer at a time, errors that name the file."""

import errno
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rqgen import files
from rqgen.data import save_image
from rqgen.data.codes import EncodedImages, read_codes, write_codes
from rqgen.models import PretrainedModel
from rqgen.reading import read_json
from rqgen.training.checkpoint import save_checkpoint


@dataclass
class SizedConfig:
    width: int = 3


class Sized(PretrainedModel):
    model_type = "sized"
    config_class = SizedConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(config.width))


def folder_text(path):
    return {file.name: file.read_text() for file in files.existing_folder(path).iterdir()}


def write_folder(path, text):
    with files.new_folder(path) as written:
        (written / "a").write_text(text)
        (written / "b").write_text(text)


def test_a_file_is_the_old_or_the_new_one_when_killed(tmp_path, killed_at_every_step):
    path = tmp_path / "file"
    files.write_text(path, "old")
    seen = set()
    steps = killed_at_every_step(lambda: files.write_text(path, "new"), lambda: seen.add(path.read_text()))
    assert steps > 8 and seen == {"old", "new"}
    files.write_text(path, "last")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_text() == "last"


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_a_folder_is_the_old_or_the_new_one_when_killed(tmp_path, monkeypatch, killed_at_every_step, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_renameat2", lambda: None)
    path = tmp_path / "folder"
    write_folder(path, "old")
    seen, missing = set(), 0

    def check():
        nonlocal missing
        missing += not path.exists()
        texts = folder_text(path)
        assert texts in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
        seen.add(texts["a"])

    assert killed_at_every_step(lambda: write_folder(path, "new"), check) > 10
    assert seen == {"old", "new"} and (missing > 0) != exchange
    write_folder(path, "last")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"] and folder_text(path)["b"] == "last"


def test_reading_what_an_interrupted_replacement_left_is_said(tmp_path, caplog):
    write_folder(tmp_path / "folder", "old")
    (tmp_path / "folder").rename(tmp_path / ".folder.previous")
    assert folder_text(tmp_path / "folder") == {"a": "old", "b": "old"}
    assert "a process was killed while replacing it" in caplog.text


def test_links_stay_and_what_they_point_to_is_replaced(tmp_path):
    store = tmp_path / "store"
    write_folder(store / "model", "old")
    files.write_text(store / "file", "old")
    for name in ("model", "file", "missing"):
        (tmp_path / name).symlink_to(store / name)
    write_folder(tmp_path / "model", "new")
    files.write_text(tmp_path / "file", "new")
    files.write_text(tmp_path / "missing", "new")
    for name in ("model", "file", "missing"):
        assert (tmp_path / name).is_symlink()
    assert folder_text(store / "model")["a"] == (store / "file").read_text() == (store / "missing").read_text() == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "missing", "model", "store"]
    assert sorted(entry.name for entry in store.iterdir()) == ["file", "missing", "model"]


def written_files(folder):
    """Every kind of file this package writes."""
    encoded = EncodedImages(torch.zeros(1, 2, 2, 1, dtype=torch.int64), torch.zeros(1).long(), 4, "id", ("a",), {})
    files.write_text(folder / "text", "text")
    files.write_json(folder / "json", {})
    save_image(torch.zeros(3, 2, 2, dtype=torch.uint8), folder / "sheet.png")
    write_codes(folder / "codes", encoded)
    save_checkpoint(folder, 1, {"w": torch.zeros(3)}, {}, keep=1)
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_the_umask_decides_the_mode(tmp_path, umask):
    before = os.umask(umask)
    try:
        written = written_files(tmp_path / "folder")
    finally:
        os.umask(before)
    assert len(written) == 6
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    for folder in (tmp_path / "folder", tmp_path / "folder" / "step-00000001"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


def test_data_and_names_reach_the_disk_before_the_rename(tmp_path, monkeypatch):
    order = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def name(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", lambda d: (order.append(f"flush {name(d)}"), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("rename"), rename(a, b)))
    files.write_text(tmp_path / "file", "text")
    assert order == ["flush file", "rename", f"flush {tmp_path.name}"]
    order.clear()
    write_folder(tmp_path / "folder", "text")
    assert sorted(order[:2]) == ["flush a", "flush b"]
    assert order[2:] == ["flush folder", "rename", f"flush {tmp_path.name}"]


def test_what_living_processes_write_is_not_swept(tmp_path):
    with files.new_file(tmp_path / "slow") as slow:
        slow.write_text("half")
        files.write_text(tmp_path / "quick", "text")
        assert slow.read_text() == "half"
        slow.write_text("whole")
    assert (tmp_path / "slow").read_text() == "whole"
    (tmp_path / ".rqgen-1-0123abcd.tmp").mkdir()
    (tmp_path / ".rqgen-mine").mkdir()
    files.write_text(tmp_path / "quick", "text")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".rqgen-mine", "quick", "slow"]


@pytest.mark.parametrize("kind", ["text", "sheet.png", "codes", "step-00000001"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, in_child, kind):
    """No file may grow beyond some bytes, which fails as a full disk does."""
    sheet = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    codes = torch.zeros(2000, 2, 2, 1, dtype=torch.int64)
    encoded = EncodedImages(codes, torch.zeros(2000).long(), 4, "id", ("a",), {})
    write = {
        "text": lambda: files.write_text(tmp_path / "text", "text" * 1000),
        "sheet.png": lambda: save_image(sheet, tmp_path / "sheet.png"),
        "codes": lambda: write_codes(tmp_path / "codes", encoded),
        "step-00000001": lambda: save_checkpoint(tmp_path, 1, {"w": torch.zeros(3000)}, {}, keep=1),
    }[kind]

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match="File too large") as caught:
            write()
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(tmp_path / kind)

    assert in_child(work) == 0
    assert list(tmp_path.iterdir()) == []
    write()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert in_child(work) == 0
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_errors_of_wrapped_libraries_become_errors_of_the_system(tmp_path):
    with pytest.raises(OSError) as caught, files.new_file(tmp_path / "x"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))
    with pytest.raises(RuntimeError, match="something else"), files.new_file(tmp_path / "x"):
        raise RuntimeError("something else")


# --- claims ----------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_the_first_one_named(tmp_path):
    code = (
        "import sys; from pathlib import Path; from rqgen import files\n"
        "with files.claim_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError) as caught, files.claim_folder(tmp_path / "out"):
            pass
        message = str(caught.value)
        for part in (f"process {holder.pid} on {socket.gethostname()}", "-c", str(tmp_path / "out")):
            assert part in message
        # A killed process holds nothing.
        holder.kill()
        holder.wait()
        with files.claim_folder(tmp_path / "out"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("claim", [files.claim_folder, files.claim, files.claim_file])
def test_claims_exclude_one_another_and_leave_nothing(tmp_path, claim):
    path = tmp_path / "deep" / "deeper" / "out"
    with claim(path):
        with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()}"), claim(path):
            pass
        with claim(tmp_path / "deep" / "other"):
            pass
    assert list(tmp_path.iterdir()) == []
    with claim(path):
        files.write_text(path / "x" if claim is files.claim_folder else path, "text")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["x" if claim is files.claim_folder else "out"]


def test_a_claim_outlives_no_process_by_its_workers(tmp_path, in_child):
    """A forked worker has the descriptors of its parent, and with them its locks."""

    def work():
        with files.claim_folder(tmp_path):
            if os.fork() == 0:
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == signal.SIGKILL
    with files.claim_folder(tmp_path):
        pass


def test_places_that_cannot_be_written_are_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for claim, path, error, words in (
        (files.claim_folder, tmp_path / "file", NotADirectoryError, "expected a folder"),
        (files.claim_folder, tmp_path / "file" / "out", NotADirectoryError, "Not a directory"),
        (files.claim_file, tmp_path / "file" / "out", NotADirectoryError, "Not a directory"),
        (files.claim_file, tmp_path / "folder", IsADirectoryError, "expected a file"),
        (files.claim_file, tmp_path / ("x" * 300), OSError, "File name too long"),
        (files.claim, tmp_path / ("x" * 300), OSError, "File name too long"),
        (files.claim_folder, tmp_path / ("x" * 300) / "y", OSError, "File name too long"),
        (files.claim_file, tmp_path / "null", OSError, "device or pipe"),
        (files.claim_file, tmp_path / "pipe", OSError, "device or pipe"),
    ):
        if path.name == "null":
            path.symlink_to("/dev/null")
        if path.name == "pipe":
            os.mkfifo(path)
        with pytest.raises(error, match=words) as caught, claim(path):
            pass
        assert str(tmp_path) in str(caught.value.filename)
    assert (tmp_path / "file").read_text() == "mine" and list((tmp_path / "folder").iterdir()) == []


@pytest.fixture
def reachable():
    """A folder that every user may enter and write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_places_without_permission_are_refused_by_name(reachable, in_child):
    """As a user whom permissions bind."""
    (reachable / "closed").mkdir(mode=0o555)
    (reachable / "protected").write_text("mine")
    (reachable / "protected").chmod(0o444)

    def work():
        if os.getuid() == 0:
            os.setuid(65534)
        for claim, name in (
            (files.claim_folder, "closed"),
            (files.claim_folder, "closed/out"),
            (files.claim_file, "closed/out"),
            (files.claim_file, "protected"),
        ):
            with pytest.raises(PermissionError) as caught, claim(reachable / name):
                pass
            assert str(reachable / name) in caught.value.filename or caught.value.filename in str(reachable / name)
        with pytest.raises(PermissionError, match="protected"):
            files.write_text(reachable / "protected", "new")

    assert in_child(work) == 0
    assert (reachable / "protected").read_text() == "mine"


def test_files_that_may_not_be_read_are_not_called_missing(reachable, in_child):
    """As a user whom permissions bind."""
    Sized(SizedConfig()).save_pretrained(reachable / "model")
    codes = EncodedImages(torch.zeros(1, 2, 2, 1, dtype=torch.int64), torch.zeros(1).long(), 4, "id", ("a",), {})
    write_codes(reachable / "codes", codes)
    Sized.from_pretrained(reachable / "model")  # imports now what the other user may not
    unreadable = [reachable / "model" / "model.safetensors", reachable / "codes"]
    for path in unreadable:
        path.chmod(0)

    def work():
        if os.getuid() == 0:
            os.setuid(65534)
        reads = (lambda: Sized.from_pretrained(reachable / "model"), lambda: read_codes(reachable / "codes"))
        for path, read in zip(unreadable, reads, strict=True):
            with pytest.raises(PermissionError) as caught:
                read()
            assert caught.value.filename == str(path)

    assert in_child(work) == 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system without new files")
@pytest.mark.parametrize("write", [files.claim, files.claim_file, files.claim_folder, files.new_file, files.new_folder])
def test_a_file_system_without_new_files_is_refused(write):
    with pytest.raises(OSError, match="/proc/"), write(Path("/proc/rqgen-test")):
        pytest.fail("claimed")


@pytest.mark.parametrize("claim", [files.claim, files.claim_file, files.claim_folder])
def test_a_claim_that_the_disk_has_no_room_for_leaves_nothing(tmp_path, monkeypatch, claim):
    descriptors = len(os.listdir("/proc/self/fd"))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match=f"No space left.*{tmp_path / 'new'}"), claim(tmp_path / "new"):
            pytest.fail("claimed")
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with claim(tmp_path / "new"):
        pass


def test_a_long_name_that_the_system_takes_is_written(tmp_path):
    path = tmp_path / ("x" * 255)
    with files.claim_file(path):
        files.write_text(path, "text")
    assert path.read_text() == "text" and list(tmp_path.iterdir()) == [path]


# --- checksums -------------------------------------------------------------------------------------------


def flips(data, step=1):
    for position in range(0, len(data), step):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        yield position, bytes(changed)


def test_every_wrong_bit_of_signed_files_is_found(tmp_path):
    info, beside = tmp_path / "info.json", tmp_path / "beside"
    beside.write_bytes(b"some bytes")
    files.write_signed_json(info, {"step": 3, "names": ["a", "b"]}, beside)
    files.check_json(info, read_json(info), beside)
    for path in (info, beside):
        whole = path.read_bytes()
        for position, changed in flips(whole):
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"info\.json"):
                files.check_json(info, read_json(info), beside)
            assert path.read_bytes() == changed, position
        path.write_bytes(whole)
    files.check_json(info, read_json(info), beside)


def test_every_wrong_bit_of_signed_tensors_is_found(tmp_path):
    path, beside = tmp_path / "x.safetensors", tmp_path / "beside"
    beside.write_bytes(b"some bytes")
    metadata = {"zz": 'quotes " and ü', "aa": "1", files.CHECKSUM: files.UNSIGNED}
    save_file({"a": torch.arange(5.0), "b": torch.arange(3)}, path, metadata)
    files.sign_tensors(path, beside)
    files.check_tensors(path, beside)
    assert torch.equal(load_file(path)["b"], torch.arange(3))
    for changing in (path, beside):
        whole = changing.read_bytes()
        for _, changed in flips(whole):
            changing.write_bytes(changed)
            with pytest.raises((SafetensorError, ValueError)):
                load_file(path)  # what it refuses need not be found
                files.check_tensors(path, beside)
        changing.write_bytes(whole)
    first = path.read_bytes()
    for _ in range(5):  # the library writes metadata in random order
        save_file({"a": torch.arange(5.0), "b": torch.arange(3)}, path, metadata)
        files.sign_tensors(path, beside)
        assert path.read_bytes() == first


def test_files_of_versions_without_checksums_pass(tmp_path):
    files.write_json(tmp_path / "info.json", {"step": 3})
    files.check_json(tmp_path / "info.json", {"step": 3})
    save_file({"a": torch.zeros(1)}, tmp_path / "x", {"format": "pt"})
    files.check_tensors(tmp_path / "x")
    save_file({"a": torch.zeros(1)}, tmp_path / "y")
    files.check_tensors(tmp_path / "y")


def test_wrong_codes_are_found(tmp_path):
    path = tmp_path / "codes"
    codes = torch.arange(8).reshape(2, 2, 2, 1)
    write_codes(path, EncodedImages(codes, torch.tensor([0, 1]), 16, "id", ("a", "b"), {"x": 1}))
    whole = path.read_bytes()
    assert torch.equal(read_codes(path).codes, codes)
    for _, changed in flips(whole, step=3):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="codes: "):
            read_codes(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": NaN}', "[" * 100_000, '"\\ud800', "\xff"])
def test_what_is_no_object_is_named(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.json: (not valid JSON|expected a JSON object)"):
        read_json(tmp_path / "x.json")
