"""Tests of the two checks of .ci/run that read sources and reports: they find what they look for."""

from __future__ import annotations

import importlib.util

from .build import ROOT
from .mutation import mutated

KERNEL = """
  // __syncthreads() in a comment stays
  __syncthreads();
  if (d + 1 == p.depth) __syncthreads();
  const int own = __syncthreads_count(f(a, b) == k);
  __syncwarp(mask);
  rqk::ptx::cp_async_wait<kStages - 1>();
"""

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 62 registers, used 1 barriers, 528 bytes smem, 440 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 48 registers, used 0 barriers
"""


def test_every_synchronisation_can_be_passed_over() -> None:
    text, barriers = mutated(KERNEL, 7)
    assert barriers == [
        (3, "__syncthreads()"),
        (4, "__syncthreads()"),
        (5, "__syncthreads_count(f(a, b) == k)"),
        (6, "__syncwarp(mask)"),
        (7, "rqk::ptx::cp_async_wait<kStages - 1>()"),
    ]
    assert text.splitlines()[2:] == [
        "  (::rqk::chosen_mutant == 7 ? static_cast<void>(0) : __syncthreads());",
        "  if (d + 1 == p.depth) (::rqk::chosen_mutant == 8 ? static_cast<void>(0) : __syncthreads());",
        "  const int own = (::rqk::chosen_mutant == 9 ? int((f(a, b) == k) != 0) : __syncthreads_count(f(a, b) == k));",
        "  (::rqk::chosen_mutant == 10 ? static_cast<void>(0) : __syncwarp(mask));",
        "  (::rqk::chosen_mutant == 11 ? static_cast<void>(0) : rqk::ptx::cp_async_wait<kStages - 1>());",
    ]
    assert text.splitlines()[1] == "  // __syncthreads() in a comment stays"


def test_spills_and_stack_frames_are_trouble() -> None:
    spec = importlib.util.spec_from_file_location("registers", ROOT / ".ci" / "registers.py")
    registers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(registers)
    good, bad = registers.kernels_in(REPORT)
    assert good == ("_Z1fv", "80", 62, 0, 0, 528) and good.trouble == ""
    assert bad == ("_Z1fv", "90", 48, 8, 36, 0) and bad.trouble == "spills 36 bytes, 8 bytes of stack"
    assert "shared memory" in good._replace(shared=50_000).trouble
