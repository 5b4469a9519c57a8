"""A stand-in for a GPU: what is asked of a CUDA device happens on the CPU, so that scripts take their ways for one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Event:
    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _Graph:
    def replay(self) -> None:
        pass


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        pass


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls, _on_the_cpu(device))


def _on_the_cpu(value: Any) -> Any:
    named = isinstance(value, (torch.device, str)) and str(value).startswith("cuda")
    return torch.device("cpu") if named else value


class _Redirect(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        redirected = {name: _on_the_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(_on_the_cpu, args), **redirected)


@contextlib.contextmanager
def fake_card() -> Iterator[torch.device]:
    """For the process: nothing is put back but the redirection."""
    torch.Generator = _Generator  # type: ignore[misc,assignment]
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda *_: "A Card"
    torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda *_: 0
    torch.cuda.mem_get_info = lambda *_: (1 << 30, 1 << 30)
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.CUDAGraph = _Event, _Stream, _Graph  # type: ignore
    torch.cuda.current_stream = _Stream  # type: ignore[assignment]
    torch.cuda.stream = torch.cuda.graph = lambda *_, **__: contextlib.nullcontext()  # type: ignore
    device = torch.device("cuda")
    with _Redirect():
        yield device
