"""Ctrl-C and SIGTERM: one line and the exit code of the signal, whenever they come.

Imports little: it must stand before the first second of a command, which goes to imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

_came: list[int] | None = None
"""Signals that came since the outermost `interruptions` began; None outside of it."""


@contextlib.contextmanager
def interruptions() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt for Ctrl-C and SIGTERM; yield the list of signals that came, which an inner call shares.

    Code that swallows a KeyboardInterrupt, or makes another error of it, as imports do, leaves its trace in that list.
    Where the caller ignores a signal (nohup) or has a handler, and outside of the main thread, nothing changes. Errors
    in other threads, and interrupts in callbacks that nobody waits for, are not printed.
    """
    global _came
    if _came is not None:
        yield _came
        return
    came = _came = []

    def interrupt(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    replaced = {}
    if threading.current_thread() is threading.main_thread():
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == usual:
                replaced[number] = signal.signal(number, interrupt)
    threads, threading.excepthook = threading.excepthook, _thread_failed
    callbacks, sys.unraisablehook = sys.unraisablehook, _callback_failed
    try:
        yield came
    finally:
        _came = None
        threading.excepthook, sys.unraisablehook = threads, callbacks
        for number, before in replaced.items():
            signal.signal(number, before)


def stop(number: int, hint: str = "") -> NoReturn:
    """Print the line about a signal and exit. ``hint`` says how to resume."""
    what = "terminated" if number == signal.SIGTERM else "interrupted"
    print(f"{what}: {hint or 'the same command starts over'}", file=sys.stderr)
    sys.exit(128 + number)


def _thread_failed(arguments: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread hands its error on, and this thread reports it.
    if os.environ.get("RQGEN_DEBUG"):
        threading.__excepthook__(arguments)


def _callback_failed(arguments: sys.UnraisableHookArgs) -> None:
    if arguments.exc_type is not KeyboardInterrupt or os.environ.get("RQGEN_DEBUG"):
        sys.__unraisablehook__(arguments)
