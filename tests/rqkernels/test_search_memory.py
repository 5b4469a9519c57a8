"""Memory that a large search adds to its arguments: the scan's tiles and the results, never rows x codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20

# 8192 x 16384 scores would be 128 MiB at a byte each. The high-water mark is the process's: one of its own.
_MEASURE = """
import json, torch
import rqkernels as rqk
from rqkernels._measure import peak_memory

cpu, found = torch.device("cpu"), {}
x, e = torch.randn(8192, 256), torch.randn(16384, 256) * (0.2 + 0.8 * torch.rand(16384, 1))
# The second search of a codebook needs most: it copies and packs it, to keep.
rqk.residual_search(x[:64], e, 2)
found["plain"] = peak_memory(lambda: rqk.residual_search(x, e, 16), cpu)
assert torch.ops.rqkernels.codebook_cache_state()[0] == 1
def pack():
    global packed
    packed = rqk.PackedCodebook(e)
found["packing"] = peak_memory(pack, cpu)
found["held"] = packed.nbytes
found["packed"] = peak_memory(lambda: rqk.residual_search(x, packed, 16), cpu)
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the high-water mark")
def test_of_8192_rows_in_16384_codes_of_256_channels_and_16_depths() -> None:
    run = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["plain"] < 64 * MIB, found  # the packed codebook, its copy and 9.5 MiB of results included
    assert found["packed"] < 64 * MIB, found
    assert found["held"] < 320 * MIB, found
    assert found["packing"] < 384 * MIB, found
