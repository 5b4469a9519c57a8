"""Benchmarks of sampling: speed by code shape and batch size, beside the counted work and the machine's floor."""

from .sampling import SamplingBench, parse_shape, run_sampling_bench
from .systems import SystemsBench, run_systems_bench

__all__ = ["SamplingBench", "SystemsBench", "parse_shape", "run_sampling_bench", "run_systems_bench"]
