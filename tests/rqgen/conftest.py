"""Fixtures that all tests of the models share: one thread, and published checkpoints for tests of conversion."""

from __future__ import annotations

import lzma
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DATA = Path(__file__).parent.parent / "data"
PUBLISHED = DATA / "kakaobrain"


@pytest.fixture(scope="session")
def kakaobrain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published fixtures side by side, unpacked: NAME/{config.yaml,model.pt,...}."""
    root = tmp_path_factory.mktemp("kakaobrain")
    for source in sorted(path for path in PUBLISHED.iterdir() if path.is_dir()):
        target = root / source.name
        target.mkdir()
        for name in ("config.yaml", "expected.safetensors"):
            shutil.copyfile(source / name, target / name)
        (target / "model.pt").write_bytes(lzma.decompress((source / "model.pt.xz").read_bytes()))
    return root


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[bool | None]:
    """One thread, the fastest for models this small, around every test of this folder and the fixtures it is the first
    to need: runs that are compared bit for bit must have had as many threads."""
    if Path(__file__).parent not in item.path.parents:
        return (yield)  # this hook is called for every test of the session
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def published_var(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published VAR's fixture, unpacked: vae.pth, var.pth, config.json, expected.safetensors."""
    root = tmp_path_factory.mktemp("var")
    for name in ("config.json", "expected.safetensors"):
        shutil.copyfile(DATA / "var" / name, root / name)
    for name in ("vae.pth", "var.pth"):
        (root / name).write_bytes(lzma.decompress((DATA / "var" / f"{name}.xz").read_bytes()))
    return root


@pytest.fixture
def two_processes(tmp_path: Path) -> Callable[[str], list[Any]]:
    """Runs a test file as a script in both processes of a group, with the group's store, the rank and a file for its
    result as arguments; gives what the two saved there."""

    def run(script: str) -> list[Any]:
        outs = [tmp_path / "0.pt", tmp_path / "1.pt"]
        workers = [
            subprocess.Popen([sys.executable, script, str(tmp_path / "store"), str(rank), str(out)])
            for rank, out in enumerate(outs)
        ]
        try:
            assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
        finally:
            for worker in workers:
                worker.kill()
        return [torch.load(out, weights_only=True) for out in outs]

    return run


@pytest.fixture
def rqgen(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """Runs a command in this process: ``(exit code, standard output, standard error)``."""
    from rqgen.cli.app import main

    def run(*arguments: object) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return run


FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "os.scandir")


@pytest.fixture
def in_child() -> Callable[[Callable[[], None]], int]:
    """Runs a function in a forked process, where it must not fail; gives the signal that ended it (0: none)."""

    def run(work: Callable[[], None]) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

    return run


@pytest.fixture
def killed_at_every_step(
    in_child: Callable[[Callable[[], None]], int],
) -> Callable[[Callable[[], None], Callable[[], None]], int]:
    """Kills a process that runs a function before its first file operation, in another one before its second, and so
    on; calls a check after each. Gives how many operations there are."""

    def run(work: Callable[[], None], check: Callable[[], None]) -> int:
        for number in range(1000):
            count = 0

            def watch(event: str, arguments: Any, number: int = number) -> None:
                nonlocal count
                if event in FILE_EVENTS:
                    if count == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count += 1

            def watched(watch: Any = watch) -> None:
                sys.addaudithook(watch)
                work()

            if in_child(watched) == 0:
                return number
            check()
        raise AssertionError("it never ends")

    return run
