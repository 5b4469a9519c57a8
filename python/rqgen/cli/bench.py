"""`rqgen bench`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from rqgen.bench import SamplingBench, SystemsBench, run_sampling_bench, run_systems_bench
from rqgen.bench.settings import SamplingBenchSettings, SystemsBenchSettings
from rqgen.config import one_of
from rqgen.data.grid import is_saved_image

from .models import default_device
from .outputs import json_with, output_folder
from .requests import BenchRequest

_is_result = json_with("environment", "settings", "peaks")


def bench_sampling(settings: SamplingBenchSettings, request: BenchRequest) -> list[Path]:
    """Measure the sampling speed of an RQ-Transformer. Return the files that were written."""
    bench, device = SamplingBench(**asdict(settings)), _prepare(request)
    with _outputs(request.out, "sampling") as written:
        run_sampling_bench(bench, request.out, device=device, console=Console())
    return written


def bench_systems(settings: SystemsBenchSettings, request: BenchRequest) -> list[Path]:
    """Measure the sampling speed of three systems. Return the files that were written."""
    bench, device = SystemsBench(**asdict(settings)), _prepare(request)
    with _outputs(request.out, "systems") as written:
        run_systems_bench(bench, request.out, device=device, console=Console())
    return written


@contextlib.contextmanager
def _outputs(out: Path, name: str) -> Iterator[list[Path]]:
    result, figure = f"{name}.json", f"{name}.png"
    files = {result: _is_result, figure: is_saved_image}
    with output_folder(out, "--out", files=files, is_ours=_is_result(out / result)):
        yield [out / result, out / figure]


def _prepare(request: BenchRequest) -> torch.device:
    """Set the number of threads. Return the device to measure. ValueError for one that torch does not have here."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    device = default_device() if request.device is None else request.device
    allowed = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    allowed += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device not in allowed:
        raise ValueError(f"device: {one_of(allowed, device)}")
    return torch.device(device)
