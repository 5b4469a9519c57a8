"""Benchmarks of sampling: images per second, next to the counted work and the machine's lower bound."""

from .sampling import SamplingBench, parse_shape, run_sampling_bench
from .systems import SystemsBench, run_systems_bench

__all__ = ["SamplingBench", "SystemsBench", "parse_shape", "run_sampling_bench", "run_systems_bench"]
