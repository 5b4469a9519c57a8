"""The emulation itself: right kernels give right results, and each kind of bug is caught by the build it is meant for.

The kernels stand in csrc/emulation/self_test.cpp.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .build import ROOT
from .harness import Emulation, KernelError


def only(*builds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("emulation", builds, indirect=True)


IN = np.arange(1, 65, dtype=np.int32)


# --- right kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 95, 96, 200])
def test_block_barrier_and_dynamic_shared_memory(emulation: Emulation, n: int) -> None:
    (out,) = emulation.run("reverse_blocks", values=np.arange(n, dtype=np.int32))
    expected = np.concatenate([np.arange(i, min(i + 96, n))[::-1] for i in range(0, n, 96)])
    np.testing.assert_array_equal(out, expected)


def test_warp_barrier(emulation: Emulation) -> None:
    (out,) = emulation.run("reverse_warps", values=IN)
    np.testing.assert_array_equal(out.reshape(2, 32), IN.reshape(2, 32)[:, ::-1])


def test_collectives(emulation: Emulation) -> None:
    values = np.random.default_rng(0).integers(0, 1000, 64 * 20).astype(np.int32)
    (out,) = emulation.run("collectives", values=values)
    v = values[:64].reshape(2, 32)
    lane = np.arange(32)
    bits = (1 << lane).astype(np.uint64)

    def every_lane(per_warp: np.ndarray) -> np.ndarray:
        return np.repeat(per_warp.astype(np.int64), 32).reshape(2, 32)

    same = (v & 3)[:, :, None] == (v & 3)[:, None, :]
    expected = [
        every_lane(v[:, 5]),
        v[:, lane // 8 * 8 + 1],
        v[:, np.where(lane % 16 < 3, lane, lane - 3)],
        v[:, np.where(lane % 16 >= 13, lane, (lane + 3) % 32)],
        v[:, lane ^ 6],
        v[:, np.minimum(lane + 1, 31)],
        every_lane(((v & 1) * bits).sum(1)),
        every_lane((v == v[0, 0]).any(1)),
        every_lane(np.ones(2)),
        (same * bits).sum(2).astype(np.int64),
        every_lane(np.zeros(2)),  # 0xffffffff + 1
        every_lane(v.sum(1)),
        every_lane(v.min(1)),
        every_lane(v.max(1)),
        every_lane(np.bitwise_and.reduce(v | 8, axis=1)),
        every_lane(np.bitwise_or.reduce(v, axis=1)),
        every_lane(np.bitwise_xor.reduce(v, axis=1)),
        np.full((2, 32), (v & 1).sum()),
        np.ones((2, 32)),
        np.ones((2, 32)),
    ]
    for op, (got, want) in enumerate(zip(out.reshape(20, 64), expected, strict=True)):
        np.testing.assert_array_equal(got.view(np.uint32), want.reshape(64).astype(np.uint32), err_msg=f"op {op}")


def test_halves_of_a_warp_go_different_ways(emulation: Emulation) -> None:
    (out,) = emulation.run("half_warps", values=IN[:32])
    lane = np.arange(32)
    np.testing.assert_array_equal(out, IN[np.where(lane < 16, lane ^ 1, lane ^ 2)])


def test_threads_that_have_returned_hold_no_barrier_up(emulation: Emulation) -> None:
    (out,) = emulation.run("early_return", values=IN)
    assert (out == IN.sum()).all()


def test_atomics(emulation: Emulation) -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, 97).astype(np.int32)
    start, rest = values[0], values[1:]
    for schedule in range(4):  # which value is exchanged last depends on it
        (out,) = emulation.run("atomics", values=values, schedules=(schedule,))
        assert out[2] + out[9] == 2 * start + rest.sum() and out[9] in rest
        expected = {0: start + rest.sum(), 1: start - rest.sum(), 3: values.min(), 4: values.max()}
        expected |= {5: np.bitwise_and.reduce(values), 6: np.bitwise_or.reduce(values)}
        expected |= {7: np.bitwise_xor.reduce(values), 8: start + rest.sum()}
        assert {i: out[i] for i in expected} == expected


def test_grids_and_blocks_of_three_dimensions(emulation: Emulation) -> None:
    n = 2 * 3 * 4 * 4 * 5 * 2
    (out,) = emulation.run("three_dimensions", values=np.full(n, 7, np.int32))
    np.testing.assert_array_equal(out, np.arange(n) + 7)


# --- arguments -------------------------------------------------------------------------------------------

CODES = np.zeros((3, 2), np.int64)
DECODE: dict[str, Any] = {"codes": CODES, "codebooks": np.ones((1, 4, 5), np.float32), "depth": 2}
SAMPLE: dict[str, Any] = {
    "logits": np.zeros((2, 3), np.float32), "temperature": 1.0, "top_k": 3, "top_p": 1.0, "seed": 2**64 - 1,
    "offset": 0, "stream": 0, "streams": 1, "on_device": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("residual_decode", {"depth": None}, "residual_decode: depth: expected an integer below 2^63, got None"),
        ("residual_decode", {"depth": 2.0}, "depth: expected an integer below 2^63, got <f8 with 0 dimensions"),
        ("residual_decode", {"depth": 2**63}, "depth: expected an integer below 2^63, got <u8 with 0 dimensions"),
        ("residual_decode", {"depth": np.array([2])}, "depth: expected an integer .* got <i8 with 1 dimensions"),
        ("residual_decode", {"codes": CODES[0]}, "codes: expected <i8 with 2 dimensions, got <i8 with 1 dimensions"),
        ("residual_decode", {"codes": CODES.astype(np.int32)}, "codes: expected <i8 with 2 dimensions, got <i4 with 2"),
        ("residual_decode", {"code": CODES}, "residual_decode: unexpected argument code, expected codebooks, codes, d"),
        ("residual_decode", {"deep": None}, "residual_decode: unexpected argument deep, expected codebooks, codes, d"),
        ("sample_logits", {"seed": -1}, r"sample_logits: seed: expected an integer in \[0, 2\^64\), got -1"),
        ("sample_logits", {"seed": 1.0}, "seed: expected an integer"),
        ("sample_logits", {"top_p": "1"}, r"top_p: expected a number, got \|S1 with 0 dimensions"),
        ("sample_logits", {"on_device": 1}, "on_device: expected a bool, got <i8 with 0 dimensions"),
        ("sample_logits", {"mma_error": "much"}, "mma_error: expected a number"),
        ("sample_logits", {"shared_bytes": 0.5}, "shared_bytes: expected an integer"),
    ],
)
def test_a_wrong_argument_is_named(emulation: Emulation, case: str, change: dict[str, Any], message: str) -> None:
    valid = {"residual_decode": DECODE, "sample_logits": SAMPLE}[case]
    with pytest.raises(KernelError, match=message.replace("2^63", r"2\^63")):
        emulation.run(case, **{**valid, **change})


@pytest.mark.parametrize("name", DECODE)
def test_a_missing_argument_is_named(emulation: Emulation, name: str) -> None:
    others = {key: value for key, value in DECODE.items() if key != name}
    with pytest.raises(KernelError, match=f"residual_decode: {name} is missing, got {', '.join(sorted(others))}$"):
        emulation.run("residual_decode", **others)


def test_a_text_is_one_of_the_choices(emulation: Emulation) -> None:
    arrays = {name: np.zeros((1, 1, 1), np.float32) for name in ("logits", "x", "codebooks")}
    rest = {"tau": 1, "mask": np.ones((1, 1), np.uint8), "weight": None, "swapped": False}
    for gradient, got in (("packet", "packet"), ("", "")):
        expected = f"gradient: expected one of none, packed, in_place, got '{got}'"
        with pytest.raises(KernelError, match=expected):
            emulation.run("soft_label_cross_entropy", **arrays, **rest, gradient=gradient)
    with pytest.raises(KernelError, match="gradient: expected a string, got <i8 with 0 dimensions"):
        emulation.run("soft_label_cross_entropy", **arrays, **rest, gradient=1)
    assert emulation.run("soft_label_cross_entropy", **arrays, **rest, gradient="none")[0].shape == (1, 1)


def test_what_numpy_has_no_number_for_is_no_argument(emulation: Emulation) -> None:
    for value in ({}, 2**64, object(), [None]):
        with pytest.raises(TypeError, match="depth: expected an array, a number, a string or None, got"):
            emulation.run("residual_decode", **{**DECODE, "depth": value})


# --- the instructions of common/ptx.cuh ------------------------------------------------------------------

# Row and column of each element of a lane's registers, as the PTX ISA gives them, instruction by instruction
# ("Matrix Fragments for mma.m16n8k8 / k16 / k32").
LANE = np.arange(32)
GROUP, IN_GROUP = LANE >> 2, LANE % 4


def a_k8(i: int) -> tuple[np.ndarray, np.ndarray]:  # tf32
    return (GROUP if i in (0, 2) else GROUP + 8), (IN_GROUP if i < 2 else IN_GROUP + 4)


def b_k8(i: int) -> tuple[np.ndarray, np.ndarray]:
    return (IN_GROUP if i == 0 else IN_GROUP + 4), GROUP


def a_k16(i: int) -> tuple[np.ndarray, np.ndarray]:  # f16, bf16
    row = GROUP if 0 <= i < 2 or 4 <= i < 6 else GROUP + 8
    return row, (IN_GROUP * 2 + (i & 1) if i < 4 else IN_GROUP * 2 + (i & 1) + 8)


def b_k16(i: int) -> tuple[np.ndarray, np.ndarray]:
    return (IN_GROUP * 2 + (i & 1) if i < 2 else IN_GROUP * 2 + (i & 1) + 8), GROUP


def a_k32(i: int) -> tuple[np.ndarray, np.ndarray]:  # s8
    row = GROUP if 0 <= i < 4 or 8 <= i < 12 else GROUP + 8
    return row, (IN_GROUP * 4 + (i & 3) if i < 8 else IN_GROUP * 4 + (i & 3) + 16)


def b_k32(i: int) -> tuple[np.ndarray, np.ndarray]:
    return (IN_GROUP * 4 + (i & 3) if i < 4 else IN_GROUP * 4 + (i & 3) + 16), GROUP


def d_fragment(i: int) -> tuple[np.ndarray, np.ndarray]:  # the same for all
    return (GROUP if i < 2 else GROUP + 8), IN_GROUP * 2 + (i & 1)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Bits in bfloat16 of float32 values that bfloat16 can hold."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def fragment(matrix: np.ndarray, place, words: int) -> np.ndarray:
    """(32, words) registers of a matrix of element bits; the first element is the lowest part of its register."""
    per_word = 4 // matrix.itemsize
    elements = [matrix[place(i)] for i in range(words * per_word)]
    return np.stack(elements, axis=1).copy().view(np.int32)


def small(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Floats that every type here holds exactly, all different in rows and columns."""
    return (rng.integers(-128, 128, shape) / 16).astype(np.float32)


@pytest.mark.parametrize(
    ("case", "bits", "place_a", "place_b", "depth"),
    [
        ("mma_bf16", bf16_bits, a_k16, b_k16, 16),
        ("mma_f16", lambda v: v.astype(np.float16).view(np.uint16), a_k16, b_k16, 16),
        ("mma_tf32", lambda v: v.view(np.uint32), a_k8, b_k8, 8),
        ("mma_s8", lambda v: v.astype(np.int8), a_k32, b_k32, 32),
    ],
)
def test_mma(emulation: Emulation, case: str, bits, place_a, place_b, depth: int) -> None:
    rng = np.random.default_rng(0)
    if case == "mma_s8":
        a, b = (rng.integers(-128, 128, s).astype(np.int64) for s in ((16, depth), (depth, 8)))
        d = rng.integers(-(2**31), 2**31, (16, 8)).astype(np.int32)
        expected = (d + a @ b).astype(np.int32)  # wraps around
    else:
        a, b, d = small(rng, 16, depth), small(rng, depth, 8), small(rng, 16, 8)
        expected = d + a @ b
    registers = [fragment(bits(a), place_a, 4), fragment(bits(b), place_b, 2), fragment(d, d_fragment, 4)]
    (out,) = emulation.run(case, values=np.concatenate(registers, axis=1).reshape(-1))
    out = out.reshape(32, 10)
    for first in (0, 4):  # in place, and with the addend apart
        got = np.empty_like(d)
        for i in range(4):
            got[d_fragment(i)] = out[:, first + i].copy().view(d.dtype)
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(out[:, 8:], registers[2][:, :2])


def test_mma_tf32_ignores_the_lower_bits(emulation: Emulation) -> None:
    one_and_a_bit = np.uint32(0x3F801FFF)  # 1, and all the 13 bits that tf32 has not
    a, b = np.full((16, 8), one_and_a_bit), np.full((8, 8), one_and_a_bit)
    registers = [fragment(a, a_k8, 4), fragment(b, b_k8, 2), np.zeros((32, 4), np.int32)]
    (out,) = emulation.run("mma_tf32", values=np.concatenate(registers, axis=1).reshape(-1))
    assert (out.reshape(32, 10)[:, :4].copy().view(np.float32) == 8).all()


@pytest.mark.parametrize("value", [2.0**-24, 6.1e-5, 65504.0, np.inf])
def test_mma_f16_at_the_ends_of_its_range(emulation: Emulation, value: float) -> None:
    a, b = np.zeros((16, 16), np.float16), np.zeros((16, 8), np.float16)
    a[3, 5], b[5, 2] = -value, 1
    registers = [fragment(a.view(np.uint16), a_k16, 4), fragment(b.view(np.uint16), b_k16, 2)]
    with np.errstate(invalid="ignore"):
        expected = a.astype(np.float32) @ b.astype(np.float32)  # infinity times zero is NaN in all its row
    (out,) = emulation.run(
        "mma_f16", values=np.concatenate([*registers, np.zeros((32, 4), np.int32)], axis=1).reshape(-1)
    )
    got = np.empty((16, 8), np.float32)
    for i in range(4):
        got[d_fragment(i)] = out.reshape(32, 10)[:, i].copy().view(np.float32)
    np.testing.assert_array_equal(got, expected)


def test_ldmatrix(emulation: Emulation) -> None:
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    (out,) = emulation.run("load_matrices", values=np.concatenate([matrices.reshape(-1).view(np.int32)] * 2))
    for transposed, tile in ((0, matrices), (1, matrices.transpose(0, 2, 1))):
        # "Each thread holds a fragment of a row": row lane / 4, elements 2 (lane % 4) and the next.
        pairs = tile[:, GROUP[:, None], IN_GROUP[:, None] * 2 + np.arange(2)]
        expected = np.ascontiguousarray(pairs.transpose(1, 0, 2)).view(np.int32)[..., 0]
        np.testing.assert_array_equal(out.reshape(2, 32, 4)[transposed], expected)


def reversed_tiles(values: np.ndarray) -> np.ndarray:
    """Tiles of 64 vectors of four, each in reverse; zeros where the last one is short."""
    vectors = values.reshape(-1, 4)
    full = np.zeros((-(-len(vectors) // 64) * 64, 4), values.dtype)
    full[: len(vectors)] = vectors
    return full.reshape(-1, 64, 4)[:, ::-1].reshape(-1, 4)[: len(vectors)].reshape(-1)


@pytest.mark.parametrize("n", [4, 256, 700])
def test_cp_async(emulation: Emulation, n: int) -> None:
    values = np.arange(1, n + 1, dtype=np.int32)
    (out,) = emulation.run("pipeline", values=values)
    np.testing.assert_array_equal(out, reversed_tiles(values))


@pytest.mark.parametrize("mistake", ["no_commit", "waits_too_little", "no_barrier", "no_second_barrier"])
def test_a_broken_pipeline_fails(emulation: Emulation, mistake: str) -> None:
    values = np.arange(1, 701, dtype=np.int32)
    try:
        (out,) = emulation.run(f"pipeline_{mistake}", values=values)
    except KernelError:
        return
    assert emulation.build != "race", "the race build takes no broken pipeline for a right one"
    assert (out != reversed_tiles(values)).any()


# --- wrong kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "divergent_barrier",
            r"divergent barrier: thread \d+ arrives in __syncthreads at self_test.cpp:(\d+):\d+ while"
            r"\n  threads [-\d, ]+ wait in __syncthreads at self_test.cpp:(?!\1)\d+",
        ),
        (
            "deadlock",
            r"deadlock:\n  threads 0-2, 4-31 wait in __syncwarp of mask 0xffffffff at self_test.cpp:\d+:\d+"
            r"\n  threads 3 wait in __syncthreads at self_test.cpp:\d+:\d+\n  threads 32-63 have returned",
        ),
        ("inactive_source", r"lane 0 reads lane 20, which is not in the mask 0x0000ffff"),
        ("returned_lane", r"thread 7 (of the mask has )?returned"),
        ("caller_outside_mask", r"thread \d+ in __shfl_xor_sync of mask 0x0000ffff .* is not in the mask itself"),
        ("different_masks", r"divergent collective:\n  threads 0-15 .* 0xffffffff .*\n  threads 16-31 .* 0xfffffff0"),
        ("different_collectives", r"threads 0-15 wait in __any_sync .*\n  threads 16-31 wait in __all_sync"),
        ("missing_lanes", r"thread 48 of the mask is beyond the block"),
        ("bad_width", r"shuffle width must be a power of two up to 32, got 12 at self_test.cpp"),
        ("too_much_static_shared", r"limited to 49152 bytes; with large the kernel declares 49156"),
        ("too_much_default_shared", r"at most 49152 bytes of shared memory; with large the kernel uses 51200"),
        ("too_much_dynamic_shared", r"at most 232448 bytes of shared memory; the launch asks for 232449"),
        ("too_many_threads", r"1 to 1024 threads, at most 64 in z; got \(1025, 1, 1\)"),
        ("copy_never_awaited", r"thread 0 returned without waiting for its cp.async at self_test.cpp:\d+"),
        ("copy_misaligned", r"both addresses must be aligned to 16 bytes"),
        ("copy_past_shared", r"the destination is not within one shared variable"),
        ("matrices_misaligned", r"ldmatrix at self_test.cpp:\d+:\d+: rows must be aligned to 16 bytes"),
        ("matrices_of_global_memory", r"ldmatrix at .*: a row is not within one shared variable"),
        ("no_such_case", r"no case is called 'no_such_case'; there are code_statistics, depth_attention, "),
    ],
)
@pytest.mark.parametrize("schedule", [0, 1])
def test_broken_rules_end_the_launch(emulation: Emulation, case: str, message: str, schedule: int) -> None:
    with pytest.raises(KernelError, match=message):
        emulation.run(case, values=IN, schedules=(schedule,))


@only("plain")
def test_a_failed_launch_leaves_nothing_behind(emulation: Emulation) -> None:
    for _ in range(3):
        with pytest.raises(KernelError):
            emulation.run("deadlock", values=IN)
        np.testing.assert_array_equal(emulation.run("reverse_warps", values=IN)[0][:32], IN[:32][::-1])


@only("plain")
@pytest.mark.parametrize("case", ["missing_block_barrier", "missing_warp_barrier"])
def test_a_shuffled_schedule_shows_a_missing_barrier(emulation: Emulation, case: str) -> None:
    with pytest.raises(KernelError, match=r"result 0 differs between the schedules 0 and [123]"):
        emulation.run(case, values=IN)


@only("asan")
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("read_past_global", "heap-buffer-overflow.*READ of size 4"),
        ("write_past_global", "heap-buffer-overflow.*WRITE of size 4"),
        ("read_before_global", "heap-buffer-overflow.*READ of size 4"),
        ("write_past_shared", "heap-buffer-overflow.*WRITE of size 4"),
        ("write_past_dynamic", "heap-buffer-overflow.*WRITE of size 4"),
        ("past_inner_dimension", "index 8 out of bounds for type 'int"),
        ("misaligned_vector", "misaligned address .* requires 16 byte alignment"),
        ("misaligned_shared_vector", "misaligned address .* requires 16 byte alignment"),
    ],
)
def test_the_address_build_finds(emulation: Emulation, case: str, message: str) -> None:
    with pytest.raises(KernelError) as error:
        emulation.run(case, values=IN, schedules=(0,))
    assert re.search(message, str(error.value), re.DOTALL) and "self_test.cpp" in str(error.value)


@only("race")
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing_block_barrier", "uninitialised shared dynamic shared memory .* a read by thread 0 "),
        ("missing_warp_barrier", "uninitialised shared tile .* a read by thread 0 "),
        ("same_value_writes", "race on shared flag .* a write by thread .* a write by thread"),
        ("write_after_read", "race on shared value .* a write by thread 63 .* a read by thread"),
        ("shuffle_as_barrier", "race on shared tile .* a read by thread .* a write by thread"),
        ("half_warp_barrier", "race on shared tile"),
        ("uninitialised_shared", r"uninitialised shared tile \(256 bytes\) at byte 28: a read by thread 7 "),
        ("uninitialised_global", "uninitialised global memory .* a read by thread 0 "),
        ("blocks_share_an_output", "race on global memory .* of block 1 .* of block 0"),
        ("plain_next_to_atomic", "race on global memory .* an atomic by thread 0 of block 1 .* a write .* of block 0"),
    ],
)
def test_the_race_build_finds_in_order(emulation: Emulation, case: str, message: str) -> None:
    with pytest.raises(KernelError, match=message) as error:
        emulation.run(case, values=IN, schedules=(0,))
    # The lines of the source, not addresses.
    assert re.search(r" at self_test.cpp:\d+", str(error.value)), str(error.value)


def test_bare_shared_memory_does_not_compile(tmp_path: Path) -> None:
    """g++ alone would take `__shared__` for nothing, and give each thread a variable of its own."""
    for declaration, ok in (("CU_SHARED(float, tile, [8])", True), ("__shared__ float tile[8]", False)):
        source = tmp_path / "kernel.cpp"
        source.write_text(f'#include "common/device.h"\n__global__ void f() {{ {declaration}; tile[0] = 0; }}\n')
        command = ["g++", "-std=c++20", "-DRQK_EMULATION=1", "-I", ROOT / "csrc", "-fsyntax-only", source]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode == 0) is ok, done.stderr
        assert ok or "declare shared memory with CU_SHARED" in done.stderr
