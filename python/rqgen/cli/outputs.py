"""Places to write to, tried before the work. What rqgen did not write is not replaced."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rqgen.files import claim, claim_file, claim_folder
from rqgen.models.pretrained import CONFIG_NAME, WEIGHTS_NAME, check_replaceable
from rqgen.reading import describe_file, read_json
from rqgen.training.checkpoint import INFO_FILE, STATE_FILE

from .errors import naming

# Folders that are whole: a file more and they are neither read nor replaced.
_WHOLE = {(CONFIG_NAME, WEIGHTS_NAME): "a model", (INFO_FILE, STATE_FILE): "a checkpoint"}


@contextlib.contextmanager
def output_file(
    path: Path, name: str, is_ours: Callable[[Path], bool], *, inputs: Mapping[str, Path] | None = None
) -> Iterator[None]:
    """Claim a file to write, as `claim_file`. ``name`` is the option that names it, ``inputs`` the files that the
    command reads, by their options.

    Raises:
        FileExistsError: the file is there, is not empty, and is not one of those that ``is_ours`` recognises.
        ValueError: it is one of the inputs, lies in the folder of a model or checkpoint, or its name is not UTF-8.
        OSError: as `claim_file`.
    """
    _check_place(path, name)
    for option, other in (inputs or {}).items():
        with contextlib.suppress(OSError):
            if path.samefile(other):
                raise ValueError(f"{name}: expected another file than that of {option}, got {path}")
    with claim_file(path):
        _check_ours(path, name, is_ours)
        yield


@contextlib.contextmanager
def output_folder(
    path: Path,
    name: str,
    *,
    files: Mapping[str, Callable[[Path], bool]] | None = None,
    folders: Sequence[str] = (),
    models: Sequence[str] = (),
    is_ours: bool = False,
) -> Iterator[None]:
    """Claim a folder to write into, as `claim_folder`, and try what will be written there.

    Args:
        name: the option that names it.
        files: file -> the function that recognises one that rqgen wrote.
        folders: folders that may be there.
        models: folders of models that may be replaced, see `check_replaceable`.
        is_ours: whether a description in the folder says that rqgen wrote its files.

    Raises:
        FileExistsError: one of the files is there and is not ours; a folder of ``models`` holds something else.
        ValueError, OSError: as `output_file`, for the folder and for everything in it.
    """
    _check_place(path, name)
    with claim_folder(path), contextlib.ExitStack() as claims:
        for folder in (*folders, *models):
            _check_folder(path / folder)
        for model in models:
            with naming({"folder": name}):
                check_replaceable(path / model)
            claims.enter_context(claim(path / model))
        for file, recognise in (files or {}).items():
            _check_file(path / file)
            if not is_ours:
                _check_ours(path / file, name, recognise)
        yield


@contextlib.contextmanager
def output_model(path: Path, name: str) -> Iterator[None]:
    """Claim the folder of a model to write, see `output_folder`."""
    _check_place(path.parent, name)
    with naming({"folder": name}):
        check_replaceable(path)
    with claim(path):
        yield


def json_with(*keys: str) -> Callable[[Path], bool]:
    """Return a function that recognises JSON files with an object that has these keys."""

    def recognise(path: Path) -> bool:
        try:
            return read_json(path).keys() >= set(keys)
        except (OSError, ValueError):
            return False

    return recognise


def csv_with(*columns: str) -> Callable[[Path], bool]:
    """Return a function that recognises CSV files that begin with these columns."""

    def recognise(path: Path) -> bool:
        head = ",".join(columns).encode()
        with open(path, "rb") as file:
            return file.read(len(head)) == head

    return recognise


def _check_place(path: Path, name: str) -> None:
    """Raise ValueError for a name that is not UTF-8, and for a place in the folder of a model or checkpoint."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected a name in UTF-8, got {os.fsencode(path)!r}") from error
    place = Path(os.path.realpath(path))
    for folder in (place, *place.parents):
        for names, kind in _WHOLE.items():
            if all((folder / one).is_file() for one in names):
                raise ValueError(f"{name}: expected a place outside of the folder of {kind}, {folder}, got {path}")


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise OSError(errno.ENOTDIR, "expected a folder, but this is a file", str(path))
    if path.exists() and not os.access(path, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise OSError(errno.EISDIR, "expected a file, but this is a folder", str(path))
    if path.exists() and not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, "write-protected, not replaced", str(path))


def _check_ours(path: Path, name: str, is_ours: Callable[[Path], bool]) -> None:
    if path.is_file() and path.stat().st_size > 0 and not is_ours(path):
        raise FileExistsError(
            f"{name}: {path} is {describe_file(path)} that rqgen did not write, not replaced: choose another {name}"
        )
