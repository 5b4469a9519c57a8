"""Packed codebooks are kept from call to call on the CPU, and never serve another codebook than their own.

Each test takes sizes and a seed of its own: what others left in the cache is of the same process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable

import pytest
import torch

import rqkernels as rqk

Draw = Callable[[str, int, int, int, torch.device], tuple[torch.Tensor, torch.Tensor]]

CPU = torch.device("cpu")
MOST_ENTRIES, MOST_BYTES = 8, 96 << 20


@pytest.fixture(autouse=True)
def _seeded_apart(request: pytest.FixtureRequest, _seeded: None) -> None:
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


def state() -> tuple[int, int, int]:
    """Number of entries, their bytes, and number of hits."""
    return torch.ops.rqkernels.codebook_cache_state()


def finds(codebooks: torch.Tensor, depth: int | None = 1) -> bool:
    """Search once; return True if the packed codebooks came from the cache."""
    before = state()[2]
    rqk.residual_search(codebooks.reshape(-1, codebooks.shape[-1])[:1], codebooks, depth)
    return state()[2] > before


def keep(codebooks: torch.Tensor, depth: int | None = 1) -> None:
    """Search until the codebooks come from the cache."""
    assert [finds(codebooks, depth) for _ in range(3)] == [False, False, True]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit in value; NaN equals NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def through_a_view(e: torch.Tensor) -> None:
    e.t()[-1].neg_()


def through_data(e: torch.Tensor) -> None:
    e.data[-1] += 1


def through_numpy(e: torch.Tensor) -> None:
    e.numpy()[-1, -1] -= 1


def through_an_alias_without_version(e: torch.Tensor) -> None:
    torch.from_dlpack(e.detach())[-1, 0] += 0.5


def by_an_optimizer(e: torch.Tensor) -> None:
    parameter = torch.nn.Parameter(e)
    parameter.grad = torch.ones_like(e)
    torch.optim.SGD([parameter], lr=0.1).step()


def the_last_bit_of_the_last_element(e: torch.Tensor) -> None:
    e[-1, -1] = torch.nextafter(e[-1, -1], torch.tensor(torch.inf))


def the_sign_of_a_zero(e: torch.Tensor) -> None:
    assert e[-1, 1] == 0
    e[-1, 1] = -0.0


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.mul_(-1),
        through_a_view,
        through_data,
        through_numpy,
        through_an_alias_without_version,
        by_an_optimizer,
        the_last_bit_of_the_last_element,
        the_sign_of_a_zero,
    ],
)
@pytest.mark.parametrize(("k", "c"), [(40, 45), (3001, 70)])
def test_a_changed_codebook_is_a_new_one(change: Callable[[torch.Tensor], None], k: int, c: int) -> None:
    e = torch.randn(k, c)
    e[-1, 1] = 0
    keep(e)
    change(e)
    x = torch.cat([e[-20:], torch.randn(10, c)])
    before = state()[2]
    ours = rqk.residual_search(x, e, 3)
    assert state()[2] == before
    truth = rqk.reference.residual_search(x, e, 3)
    assert torch.equal(ours.codes, truth.codes) and torch.equal(ours.quantized, truth.quantized)
    assert ours.codes[19, 0] == k - 1  # the code that every change reaches


def test_every_place_is_compared() -> None:
    # Six parts of 2^16 numbers, which threads share: the ends of each, and places between.
    e = torch.randn(5001, 77)
    keep(e)
    ends = torch.arange(1, 6) * 65536
    for i in torch.cat([ends - 1, ends, ends + 7777, torch.tensor([0, e.numel() - 1])]).tolist():
        k, kept = i // 77, e.view(-1)[i].item()
        e.view(-1)[i] += 1e-3
        found = rqk.residual_search(e[k], e, 1)
        assert found.codes.item() == k and torch.equal(found.quantized, e[k])
        e.view(-1)[i] = kept
    assert finds(e)


def test_found_by_contents_wherever_they_lie() -> None:
    e = torch.randn(150, 34).half()
    keep(e.float())
    assert finds(e) and finds(e.float().t().contiguous().t()) and finds(torch.cat([e, e])[150:])
    assert finds(e, 7)  # the depth is no part of a shared codebook
    assert not finds(e[:-1])
    separate = torch.randn(3, 150, 34)
    keep(separate, None)
    assert not finds(separate[:2], None) and not finds(separate.reshape(450, 34))


def test_the_same_bits_kept_or_not(draw: Draw, kind: str) -> None:
    for k, c in ((131, 9), (517, 66)):
        x, e = draw(kind, 100, k, c, CPU)
        x[7, 3] = torch.nan
        separate = torch.stack([e, e.flip(0), 0.1 * e])
        for codebooks, depth in ((e, 4), (separate, None)):
            runs = [rqk.residual_search(x, codebooks, depth, return_residuals=True)[:4] for _ in range(2)]
            before = state()[2]
            for _ in range(600):
                runs[1] = rqk.residual_search(x, codebooks, depth, return_residuals=True)[:4]
                if state()[2] > before:
                    break
            else:
                pytest.fail("never kept")
            assert all(same(a, b) for a, b in zip(*runs, strict=True))


def test_a_codebook_that_changes_at_every_step_is_never_kept() -> None:
    before = state()
    e = torch.randn(211, 33)
    for _ in range(20):
        e += 0.01
        assert not finds(e)
    assert state() == before
    # Each comes twice: the first is kept; since it is never found again, no other is.
    states = []
    for _ in range(20):
        e += 0.01
        assert not finds(e) and not finds(e)
        states.append(state())
    assert states[0] != before and len(set(states)) == 1


def test_a_codebook_that_is_not_finite_is_refused_kept_or_not() -> None:
    e = torch.randn(160, 35)
    keep(e)
    clean = rqk.residual_search(e, e, 2).codes
    value = e[150, 20].item()
    for bad in (torch.nan, torch.inf):
        e[150, 20] = bad
        for rows in (5, 0):
            for _ in range(4):
                with pytest.raises(ValueError, match=f"codebooks must be finite, got {bad} in code 150$"):
                    rqk.residual_search(torch.zeros(rows, 35), e, 2)
    e[150, 20] = value
    assert finds(e)
    assert torch.equal(rqk.residual_search(e, e, 2).codes, clean)


def test_no_more_is_kept_than_allowed() -> None:
    for i in range(3 * MOST_ENTRIES):
        keep(torch.randn(300 + i, 36))
        assert state()[0] <= MOST_ENTRIES
    assert state()[0] == MOST_ENTRIES
    for i in range(8):
        keep(torch.randn(8000 + i, 300))  # 9.2 MiB each, and with all that belongs to them about 20
        assert state()[1] <= MOST_BYTES
    assert state()[1] > MOST_BYTES // 2
    # What is used goes on being kept.
    often = torch.randn(333, 37)
    keep(often)
    for i in range(2 * MOST_ENTRIES):
        keep(torch.randn(100 + i, 38))
        assert finds(often)


def test_what_is_larger_than_allowed_is_not_kept() -> None:
    before = state()
    e = torch.randn(16384, 1024)
    assert not any(finds(e) for _ in range(4))
    assert state() == before


_RESIDENT = """
import pathlib, re, torch, rqkernels as rqk

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

e, sizes = torch.empty(0), []
for i in range(60):
    e.resize_(2000 + i, 256).normal_()
    for _ in range(3):
        rqk.residual_search(e[:2], e, 1)
    if i >= 19:
        sizes.append(resident())
assert torch.ops.rqkernels.codebook_cache_state()[2] == 60
print(max(sizes) - sizes[0])
"""


def test_the_process_does_not_grow_with_the_codebooks_it_searched() -> None:
    result = subprocess.run([sys.executable, "-c", _RESIDENT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 24 * 1024  # 40 more codebooks of 2 MiB, and as much again with their packed forms


def test_threads_with_codebooks_of_their_own(draw: Draw) -> None:
    # "near-duplicates" sends rows to the float scan, whose panels an entry makes when they are first asked for.
    jobs = [(*draw(kind, 60, 261, 39, CPU), depth) for kind in ("near-duplicates", "gaussian") for depth in (1, 3)]
    truths = [rqk.reference.residual_search(*job).codes for job in jobs]
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(first, first + 40):
            if not torch.equal(rqk.residual_search(*jobs[i % 4]).codes, truths[i % 4]):
                wrong.append(i % 4)

    before = state()[2]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert state()[2] - before > 80


def test_a_codebook_written_while_it_is_searched_spoils_no_later_search() -> None:
    e, other = torch.randn(2, 2000, 40)
    x = torch.randn(50, 40)
    truths = [rqk.residual_search(x, rqk.PackedCodebook(contents), 2).codes for contents in (e, other)]
    shared, stop = e.clone(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            shared.copy_(e)
            shared.copy_(other)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(200):
        rqk.residual_search(x, shared, 2)
    stop.set()
    writer.join()
    for _ in range(4):
        for contents, truth in zip((e, other), truths, strict=True):
            shared.copy_(contents)
            assert torch.equal(rqk.residual_search(x, shared, 2).codes, truth)


_FORK = """
import os, threading, torch, rqkernels as rqk

torch.set_num_threads(1)
x, e = torch.randn(64, 40), torch.randn(2000, 40)
truth = rqk.residual_search(x, e, 2).codes
stop = threading.Event()

def search():
    while not stop.is_set():
        rqk.residual_search(x, e, 2)

thread = threading.Thread(target=search)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        empty = torch.ops.rqkernels.codebook_cache_state()[0] == 0
        right = all(torch.equal(rqk.residual_search(x, e, 2).codes, truth) for _ in range(4))
        os._exit(0 if empty and right else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
assert torch.ops.rqkernels.codebook_cache_state()[0] == 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_starts_with_an_empty_cache() -> None:
    result = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
