"""Files on disk: written whole or not at all, by one process at a time, and checked when they are read.

A new file is made in a temporary folder next to its place, flushed to the disk, and renamed: at each instant the
old or the new one is there. The temporary folder is locked while its process lives, so that whoever writes there
next can tell what a killed process left behind, and removes it. Links stay: what they point to is replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import socket
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

CHECKSUM = "checksum"
# A checksum covers the file that holds it, with this in its own place.
UNSIGNED = "sha256:" + "0" * 64

_SCRATCH = re.compile(r"\.rqgen-\d+-[0-9a-f]{8}\.tmp")
_OURS = re.compile(r"/\.rqgen[^/]*\.(tmp|lock)")
_LOCK_NAME = ".rqgen.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# Between two attempts another process may remove a folder or a lock; not that often.
_TRIES = 1000
# Errors of a write, which the system reports without the file's name.
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


# --- writing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield where to write a file, which becomes ``path`` when the block ends without an error.

    Its mode is what the umask says, not what the writer made of it. Raise OSError that names ``path``, also for a
    disk that is full.
    """
    target = _resolved(path)
    with errors_name(path), _scratch(target.parent) as (scratch, mode):
        _refuse_no_file(path)
        written = scratch / target.name
        yield written
        _finish(written, mode)
        os.replace(written, target)
        _flush(target.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes ``path`` when the block ends without an error; as `new_file`.

    An existing folder is replaced in one step where the file system can exchange two folders. Elsewhere it has another
    name for an instant, where `existing_folder` finds it.
    """
    target = _resolved(path)
    with errors_name(path), _scratch(target.parent) as (scratch, mode):
        written = scratch / target.name
        written.mkdir()
        yield written
        for file in written.iterdir():
            if not file.is_dir():  # folders inside were written by this function
                _finish(file, mode)
        _flush(written)
        _put(written, target)
        _flush(target.parent)


def existing_folder(path: Path) -> Path:
    """Return the folder to read for ``path``: itself, or the previous one if a process was killed between the two
    renames of `new_folder`."""
    previous = _previous(_resolved(path))
    if not path.exists() and previous.is_dir():
        logger.warning("%s: a process was killed while replacing it; reading the previous one, %s", path, previous)
        return previous
    return path


def remove_folder(path: Path) -> None:
    """Remove a folder in one step: nobody finds half of it."""
    with errors_name(path), _scratch(path.parent) as (scratch, _):
        path.rename(scratch / path.name)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with new_file(path) as written:
        written.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as a JSON file, whole or not at all."""
    write_text(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def is_temporary(path: Path) -> bool:
    """Recognize this module's own files and folders: locks, and leftovers of killed processes."""
    return path.name.startswith(".rqgen")


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _refuse_no_file(path: Path) -> None:
    target = _resolved(path)
    with contextlib.suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise _error(errno.EISDIR, "expected a file, but this is a folder", path)
        if not stat.S_ISREG(mode):
            raise _error(errno.EINVAL, "expected a regular file, but this is a device or pipe", path)
        if not os.access(target, os.W_OK):
            raise _error(errno.EACCES, "write-protected, not replaced", path)


def _finish(path: Path, mode: int) -> None:
    """Give the mode of a file that was simply opened, and flush the file to the disk."""
    path.chmod(mode)
    _flush(path)


def _flush(path: Path) -> None:
    # A rename may reach the disk before the data does: after a power cut the name would stand for an empty file.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a file system that cannot flush folders
            raise
    finally:
        os.close(descriptor)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _put(written: Path, target: Path) -> None:
    """Rename a folder to ``target``. The old ``target`` is then at ``written``, or removed."""
    previous = _previous(target)
    if not target.exists() or not any(target.iterdir()):
        os.rename(written, target)
    elif not _exchange(written, target):
        shutil.rmtree(previous, ignore_errors=True)  # of a process that was killed after its second rename
        os.rename(target, previous)
        try:
            os.rename(written, target)
        except BaseException:
            os.rename(previous, target)
            raise
    shutil.rmtree(previous, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step. False where the system cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(other))


@functools.cache
def _renameat2() -> Any:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        rename.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return rename


# --- temporary folders ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[tuple[Path, int]]:
    """A temporary folder in ``parent`` (made where it is missing), and the mode that the umask gives a file.

    A lock in it says that its process lives. Those of dead processes are removed.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    for _ in range(_TRIES):
        scratch = parent / f".rqgen-{os.getpid()}-{secrets.token_hex(4)}.tmp"
        scratch.mkdir()
        try:
            lock = _lock(scratch / _LOCK_NAME)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        if lock is not None:
            break
        # Another process took the folder, still without its lock, for a dead one's.
    else:
        raise _error(errno.ENOENT, "no file can be made in its folder", parent)
    try:
        yield scratch, stat.S_IMODE(os.fstat(lock).st_mode)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _unlock(lock)


def _sweep(parent: Path) -> None:
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for name in [entry.name for entry in entries if _SCRATCH.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                lock = _lock(parent / name / _LOCK_NAME)
                if lock is not None:
                    shutil.rmtree(parent / name, ignore_errors=True)
                    _unlock(lock)


def check_json_name(path: Path, name: str) -> None:
    """Raise ValueError for a file name that says another format than JSON: before the work whose result the file would
    hold."""
    if path.suffix.lower() not in ("", ".json"):
        raise ValueError(f"{name}: expected a name that ends in .json, got '{path}'")


# --- one process at a time -------------------------------------------------------------------------------

_held: set[int] = set()


def _lock(path: Path) -> int | None:
    """Lock the file ``path``, made where it is missing. Return its descriptor; None where another process has it."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None  # the folder is gone
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        logger.warning("%s: this file system has no locks: two processes could write here at once", path.parent)
    with contextlib.suppress(FileNotFoundError):
        # Its last owner may have removed the file between the two calls: the lock is then of no use.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            _held.add(descriptor)
            return descriptor
    os.close(descriptor)
    return None


def _unlock(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _forget() -> None:
    # Worker processes outlive a killed parent by seconds and would keep its locks.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def claim_folder(path: Path) -> Iterator[None]:
    """Lock ``path`` for this process, and check that it can be written, before any work is done.

    Missing folders are created, and removed again if nothing is written. Raise OSError that names ``path`` if it
    cannot be written, and BlockingIOError that names the other process if it is locked.
    """
    with errors_name(path):
        target = _resolved(path)
        if target.exists() and not target.is_dir():
            raise _error(errno.ENOTDIR, "expected a folder, but this is a file", path)
    with _claimed(path, target, _LOCK_NAME):
        yield


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Same as `claim_folder`, for a file or for a folder that is replaced as a whole."""
    with errors_name(path):
        target = _resolved(path)
        if not target.is_dir():
            _refuse_no_file(path)
            with contextlib.suppress(FileNotFoundError):
                os.lstat(target)  # a name that is too long
    name = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
    with _claimed(path, target.parent, f".rqgen-{name}.lock"):
        yield


@contextlib.contextmanager
def claim_file(path: Path) -> Iterator[None]:
    """Same as `claim`, but refuses a folder."""
    with errors_name(path):
        _refuse_no_file(path)
    with claim(path):
        yield


@contextlib.contextmanager
def _claimed(path: Path, folder: Path, name: str) -> Iterator[None]:
    made = [missing for missing in (folder, *folder.parents) if not missing.exists()]
    try:
        with errors_name(path):
            lock = _lock_of(path, folder, name)
        try:
            with errors_name(path):
                host, command = socket.gethostname(), shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
                os.ftruncate(lock, 0)
                os.write(lock, f"process {os.getpid()} on {host} ({command[:200]})".encode(errors="replace"))
            yield
        finally:
            (folder / name).unlink(missing_ok=True)
            _unlock(lock)
    finally:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


def _lock_of(path: Path, folder: Path, name: str) -> int:
    """Descriptor of the lock ``name`` in ``folder``, made where it is missing, for whoever writes ``path``."""
    for _ in range(_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder / name)
        if lock is not None:
            return lock
        if other := _owner(folder / name):
            raise _error(errno.EWOULDBLOCK, f"in use by {other}: wait for it, or write elsewhere", path)
    # Some file systems have folders without new files, such as /proc.
    raise _error(errno.ENOENT, "no file can be made in its folder", path)


def _owner(lock: Path) -> str:
    """The holder of a lock; "" if it was released in the meantime."""
    try:
        return lock.read_text(encoding="utf-8", errors="replace") or "another process"
    except FileNotFoundError:
        return ""


# --- errors ----------------------------------------------------------------------------------------------


def _error(number: int, reason: str, path: Path) -> OSError:
    return OSError(number, reason, str(path))  # of the subclass that belongs to the number


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Make errors name ``path`` where they would name a temporary file, or, as those of a write do, none."""
    try:
        yield
    except OSError as error:
        if error.filename is None or _OURS.search(str(error.filename)):
            raise _error(error.errno or errno.EIO, error.strerror or str(error), path) from error
        raise
    except Exception as error:
        # torch and safetensors wrap them.
        number = next((one for one in _numbers(error) if one in _WRITE_ERRORS), None)
        if number is None:
            raise
        raise _error(number, os.strerror(number), path) from error


def _numbers(error: BaseException) -> Iterator[int]:
    chained: BaseException | None = error
    while chained is not None:
        if isinstance(chained, OSError) and chained.errno is not None:
            yield chained.errno
        for number in re.findall(r"\(os error (\d+)\)", str(chained)):
            yield int(number)
        chained = chained.__cause__ or chained.__context__


# --- checksums -------------------------------------------------------------------------------------------


def write_signed_json(path: Path, content: Mapping[str, Any], *others: Path) -> None:
    """Write ``content`` with a checksum over itself and the files ``others``. Not on its own whole or not at all:
    for files in a `new_folder`."""
    text = json_text({**content, CHECKSUM: UNSIGNED}).encode()
    path.write_bytes(_signed(text, _digest(text, others)))


def check_json(path: Path, content: Mapping[str, Any], *others: Path) -> None:
    """Raise ValueError unless ``path``, which holds ``content``, and the files ``others`` are as
    `write_signed_json` left them. Files without a checksum, of older versions, pass."""
    found = _checksum(content, path)
    if found is not None and _digest(_unsigned(path.read_bytes(), found), others) != found:
        raise _damaged(path, others)


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, in hex, as `sha256sum` prints it."""
    return _digest(b"", [path]).removeprefix("sha256:")


def sign_tensors(path: Path, *others: Path) -> None:
    """Fill in the checksum of a safetensors file whose metadata holds `CHECKSUM`: `UNSIGNED`, over the file itself and
    the files ``others``. Also sort its metadata, which the library writes in random order."""
    with open(path, "r+b") as file:
        head, header = _tensor_header(file, path)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        head = head[:8] + ordered.ljust(len(head) - 8)
        head = _signed(head, _digest(head, others, file))
        file.seek(0)
        file.write(head)


def check_tensors(path: Path, *others: Path) -> None:
    """Raise ValueError unless a safetensors file and the files ``others`` are as `sign_tensors` left them. Files
    without a checksum, of older versions, pass."""
    with open(path, "rb") as file:
        head, header = _tensor_header(file, path)
        found = _checksum(header.get("__metadata__", {}), path)
        if found is not None and _digest(_unsigned(head, found), others, file) != found:
            raise _damaged(path, others)


def _tensor_header(file: BinaryIO, path: Path) -> tuple[bytes, dict[str, Any]]:
    """The first bytes of a safetensors file, which are the length of its header and the header, and what it says."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    try:
        if len(length) < 8 or size > os.fstat(file.fileno()).st_size:
            raise ValueError("its header is not whole")
        head = length + file.read(size)
        header = json.loads(head[8:])
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
            raise ValueError("its header is no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    return head, header


def _digest(head: bytes, others: Iterable[Path], rest: BinaryIO | None = None) -> str:
    sha = hashlib.sha256(head)
    with contextlib.ExitStack() as opened:
        for file in [*([] if rest is None else [rest]), *(opened.enter_context(open(path, "rb")) for path in others)]:
            while block := file.read(1 << 22):
                sha.update(block)
    return f"sha256:{sha.hexdigest()}"


def _signed(head: bytes, checksum: str) -> bytes:
    return head.replace(UNSIGNED.encode(), checksum.encode(), 1)


def _unsigned(head: bytes, checksum: str) -> bytes:
    return head.replace(checksum.encode(), UNSIGNED.encode(), 1)


def _checksum(entries: Mapping[str, Any], path: Path) -> str | None:
    found = entries.get(CHECKSUM)
    if found is not None and not (isinstance(found, str) and re.fullmatch(r"sha256:[0-9a-f]{64}", found)):
        raise ValueError(f"{path}: damaged: expected a checksum, got {str(found)[:80]!r}")
    # One wrong letter in the key must not make the file one without a checksum.
    if found is None and any(isinstance(value, str) and value.startswith("sha256:") for value in entries.values()):
        raise ValueError(f"{path}: damaged: its checksum is not called '{CHECKSUM}'")
    return found


def _damaged(path: Path, others: Iterable[Path]) -> ValueError:
    names = " and ".join([str(path), *(other.name for other in others)])
    return ValueError(f"{names}: damaged, or changed since they were written: the checksum differs")
