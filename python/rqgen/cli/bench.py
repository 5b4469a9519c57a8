"""`rqgen bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from rqgen.bench import SamplingBench, SystemsBench, run_sampling_bench, run_systems_bench
from rqgen.bench.settings import SamplingBenchSettings, SystemsBenchSettings
from rqgen.files import claim_folder

from .models import default_device
from .requests import BenchRequest


def bench_sampling(settings: SamplingBenchSettings, request: BenchRequest) -> list[Path]:
    """Measure the sampling speed of an RQ-Transformer. Return the files that were written."""
    bench, device = SamplingBench(**asdict(settings)), _prepare(request)
    with claim_folder(request.out):
        run_sampling_bench(bench, request.out, device=device, console=Console())
    return [request.out / "sampling.json", request.out / "sampling.png"]


def bench_systems(settings: SystemsBenchSettings, request: BenchRequest) -> list[Path]:
    """Measure the sampling speed of three systems. Return the files that were written."""
    bench, device = SystemsBench(**asdict(settings)), _prepare(request)
    with claim_folder(request.out):
        run_systems_bench(bench, request.out, device=device, console=Console())
    return [request.out / "systems.json", request.out / "systems.png"]


def _prepare(request: BenchRequest) -> torch.device:
    """Set the number of threads. Return the device to measure. ValueError for one that torch does not have here."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    device = request.device or default_device()
    allowed = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    allowed += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device not in allowed:
        raise ValueError(f"device: expected one of {', '.join(allowed)}, got '{device}'")
    return torch.device(device)
