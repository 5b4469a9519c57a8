"""Certified codes equal the float64 definition for every finite row, on every device and instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rqkernels as rqk

Draw = Callable[[str, int, int, int, torch.device], tuple[torch.Tensor, torch.Tensor]]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit in value; NaN equals NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_equals_definition(x: torch.Tensor, codebooks: torch.Tensor, depth: int | None) -> rqk.ResidualCodes:
    ours = rqk.residual_search(x, codebooks, depth, return_residuals=True)
    expected = rqk.reference.residual_search(x, codebooks, depth, return_residuals=True)
    assert torch.equal(ours.codes, expected.codes)
    assert same(ours.residuals, expected.residuals)
    assert same(ours.quantized, expected.quantized)
    assert same(ours.residual_sq_norms, expected.residual_sq_norms)
    return ours


@pytest.mark.parametrize(("n", "k", "c"), [(129, 1, 1), (129, 257, 17), (30, 257, 256), (129, 1000, 8)])
def test_equals_the_definition(draw: Draw, kind: str, n: int, k: int, c: int, device: torch.device) -> None:
    x, e = draw(kind, n, k, c, device)
    assert_equals_definition(x, e, 4)


@pytest.mark.parametrize("n", [0, 1, 129])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_ragged_sizes(n: int, depth: int, shared: bool, device: torch.device) -> None:
    for k in (1, 257):
        for c in (1, 17, 64):
            e = torch.randn(*(() if shared else (depth,)), k, c, device=device)
            assert_equals_definition(torch.randn(n, c, device=device), e, depth if shared else None)


def test_many_codes_and_depths(device: torch.device) -> None:
    assert_equals_definition(torch.randn(40, 32, device=device), torch.randn(5000, 32, device=device), 8)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 70),
    c=st.integers(1, 40),
    depth=st.integers(1, 5),
    scale=st.integers(-35, 35),
    spread=st.integers(-8, 3),
    seed=st.integers(0, 2**31),
)
def test_property_equals_the_definition(n: int, k: int, c: int, depth: int, scale: int, spread: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(c, generator=generator)
    x = (centre + 10.0**spread * torch.randn(n, c, generator=generator)) * 10.0**scale
    e = (centre + 10.0**spread * torch.randn(k, c, generator=generator)) * 10.0**scale
    assert_equals_definition(x, e, depth)


def test_ties_go_to_the_lowest_index(device: torch.device) -> None:
    # 0 lies halfway between -1 and 1, whichever comes first.
    x = torch.zeros(3, 5, device=device)
    e = torch.cat([torch.full((40, 5), 7.0), torch.ones(1, 5), -torch.ones(1, 5), torch.ones(1, 5)]).to(device)
    assert rqk.residual_search(x, e, 1).codes.eq(40).all()
    assert rqk.residual_search(x, e.flip(0), 1).codes.eq(0).all()


def test_more_near_ties_than_a_row_remembers(device: torch.device) -> None:
    # 300 codes within float32's rounding of each other: the row is decided in float64 throughout.
    base = torch.randn(1, 64, device=device) * 100
    e = base + 1e-7 * torch.randn(300, 64, device=device)
    assert_equals_definition(base + torch.randn(30, 64, device=device), e, 2)


def test_more_near_copies_than_a_row_remembers_next_to_large_codes(device: torch.device) -> None:
    # What restarts of dead codes make of a codebook: the large codes must not blur the bound of the small ones, and the
    # near copies outnumber what a scan remembers.
    x = torch.randn(1, 64, device=device) + 1e-3 * torch.randn(40, 64, device=device)
    near = x[torch.randint(0, 40, (400,))] + 1e-6 * torch.randn(400, 64, device=device)
    e = torch.cat([30 * torch.randn(100, 64, device=device), near])[torch.randperm(500)]
    assert_equals_definition(x, e, 2)


def test_shapes_and_dtypes_of_the_result(device: torch.device) -> None:
    x = torch.randn(2, 3, 5, 16, device=device)
    out = rqk.residual_search(x, torch.randn(32, 16, device=device), 3, return_residuals=True, return_statistics=True)
    assert out._fields == ("codes", "quantized", "residual_sq_norms", "residuals", "statistics")
    assert out.codes.shape == (2, 3, 5, 3) and out.codes.dtype == torch.int64
    assert out.quantized.shape == x.shape and out.quantized.dtype == torch.float32
    assert out.residual_sq_norms.shape == (2, 3, 5, 3) and out.residual_sq_norms.dtype == torch.float32
    assert out.residuals.shape == (2, 3, 5, 3, 16)
    assert torch.equal(out.residuals[..., 0, :], x)
    assert [t.shape for t in out.statistics] == [(32,), (32, 16)]
    plain = rqk.residual_search(x, torch.randn(32, 16, device=device), 3)
    assert plain.residuals is None and plain.statistics is None
    # A single vector has no leading shape.
    assert rqk.residual_search(x[0, 0, 0], torch.randn(32, 16, device=device), 3).codes.shape == (3,)


@pytest.mark.parametrize("shared", [True, False])
def test_statistics_are_those_of_the_residuals(shared: bool, device: torch.device) -> None:
    x = torch.randn(200, 8, device=device)
    x[3] = torch.nan
    e = torch.randn(*(() if shared else (3,)), 16, 8, device=device)
    counts, sums = rqk.residual_search(x, e, 3, return_statistics=True).statistics
    expected_counts, expected_sums = rqk.reference.residual_search(x, e, 3, return_statistics=True).statistics
    assert torch.equal(counts, expected_counts)
    assert torch.equal(sums, expected_sums)
    assert counts.sum() == 199 * 3


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_types(x_dtype: torch.dtype, codebook_dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(100, 24, device=device).to(x_dtype)
    e = torch.randn(50, 24, device=device).to(codebook_dtype)
    out = assert_equals_definition(x, e, 3)
    assert out.quantized.dtype == x_dtype
    # The sum is made in float32 and cast once, not at every depth.
    first, second, third = e.float()[out.codes].unbind(-2)
    assert torch.equal(out.quantized, ((first + second) + third).to(x_dtype))


def test_strided_input(device: torch.device) -> None:
    x = torch.randn(4, 16, 6, 6, device=device).permute(0, 2, 3, 1)  # channels-first features, as models have them
    e = torch.randn(16, 80, device=device).T[::2]
    assert not x.is_contiguous() and not e.is_contiguous()
    assert_equals_definition(x, e, 2)
    assert_equals_definition(torch.randn(1, 1, 16, device=device).expand(3, 7, 16), e, 2)


def test_rows_that_are_not_finite(device: torch.device) -> None:
    x = torch.randn(64, 16, device=device)
    clean = rqk.residual_search(x, x[:20], 3)
    broken = x.clone()
    broken[5, 3] = torch.nan
    broken[6, 0] = torch.inf
    broken[63, 15] = -torch.inf
    out = assert_equals_definition(broken, x[:20], 3)
    bad = torch.zeros(64, dtype=torch.bool, device=device)
    bad[[5, 6, 63]] = True
    assert out.codes[bad].eq(-1).all()
    assert out.quantized[bad].isnan().all() and out.residual_sq_norms[bad].isnan().all()
    # Their neighbours, which share registers with them, are untouched.
    assert torch.equal(out.codes[~bad], clean.codes[~bad])
    assert torch.equal(out.quantized[~bad], clean.quantized[~bad])


def test_a_residual_that_overflows_is_marked_from_there_on(device: torch.device) -> None:
    x = torch.full((1, 4), 3e38, device=device)
    e = torch.full((1, 4), -3e38, device=device)
    out = assert_equals_definition(x, e, 3)
    assert out.codes.tolist() == [[0, -1, -1]]
    assert out.quantized.isnan().all()
    assert out.residual_sq_norms[0, 0].isinf() and out.residual_sq_norms[0, 1:].isnan().all()


def test_codes_do_not_depend_on_batch_or_threads() -> None:
    x, e = torch.randn(1000, 48), torch.randn(700, 48)
    whole = rqk.residual_search(x, e, 3)
    for size in (1, 7, 96, 333):
        parts = [rqk.residual_search(part, e, 3) for part in x[: 3 * size].split(size)]
        assert torch.equal(torch.cat([p.codes for p in parts]), whole.codes[: 3 * size])
        assert torch.equal(torch.cat([p.quantized for p in parts]), whole.quantized[: 3 * size])
    order = torch.randperm(1000)
    assert torch.equal(rqk.residual_search(x[order], e, 3).codes, whole.codes[order])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = rqk.residual_search(x, e, 3)
            assert torch.equal(again.codes, whole.codes) and torch.equal(
                again.residual_sq_norms, whole.residual_sq_norms
            )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["normal", "near copies", "offset"])
def test_few_rows_whose_threads_share_the_codes(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    e = torch.randn(2, 4096, 256, generator=generator)
    if kind == "near copies":  # more candidates than there is room for, in every share
        e = e[:, :1] + 1e-6 * e
    x = e[0, :25] + 0.5 * torch.randn(25, 256, generator=generator)
    if kind == "offset":
        x, e = x + 100, e + 100
    x[3] = float("nan")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = rqk.residual_search(x, e, return_residuals=True)
        sample = slice(2, 5)
        assert torch.equal(expected.codes[sample], rqk.reference.residual_search(x[sample], e).codes)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            for rows in (1, 4, 12, 13, 25):
                found = rqk.residual_search(x[:rows], e, return_residuals=True)
                for name in ("codes", "quantized", "residual_sq_norms", "residuals"):
                    one, other = getattr(found, name), getattr(expected, name)[:rows]
                    assert torch.equal(one.nan_to_num(), other.nan_to_num()), (count, rows, name)
    finally:
        torch.set_num_threads(threads)


def test_flushing_of_denormals_changes_nothing(draw: Draw) -> None:
    x, e = draw("denormal", 50, 40, 8, torch.device("cpu"))
    expected = rqk.residual_search(x, e, 2).codes
    assert expected.unique().numel() > 5
    if not torch.set_flush_denormal(True):
        return  # a processor without the mode has nothing to get wrong
    try:
        assert torch.equal(rqk.residual_search(x, e, 2).codes, expected)
    finally:
        torch.set_flush_denormal(False)


_DIGEST = """
import hashlib, torch, rqkernels as rqk
torch.manual_seed(1)
digest = hashlib.sha256()
for n, k, c in ((129, 257, 17), (50, 1000, 64), (1, 5, 1), (333, 31, 256)):
    for offset in (0.0, 500.0):
        out = rqk.residual_search(torch.randn(n, c) + offset, torch.randn(k, c) + offset, 4, return_residuals=True)
        for tensor in out[:4]:
            digest.update(tensor.numpy().tobytes())
print(rqk.info()["cpu_capability"], digest.hexdigest())
"""


def _at_level(level: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RQK_CPU_CAPABILITY": level},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_instruction_set_gives_the_same_bits() -> None:
    levels = ["default", "avx2", "avx512"]
    available = levels[: levels.index(rqk.info()["cpu_capability"]) + 1]
    digests = set()
    for level in available:
        result = _at_level(level, _DIGEST)
        assert result.returncode == 0, result.stderr
        used, digest = result.stdout.split()
        assert used == level
        digests.add(digest)
    assert len(digests) == 1


@pytest.mark.parametrize("level", ["AVX2", "avx1024", "best"])
def test_an_unknown_instruction_set_fails_at_import(level: str) -> None:
    result = _at_level(level, "import rqkernels")
    assert result.returncode != 0
    assert f"RQK_CPU_CAPABILITY must be default, avx2 or avx512, got '{level}'" in result.stderr


_PEAK = """
import resource, torch, rqkernels as rqk
x, e = torch.randn(65536, 4), torch.randn(16384, 4)
rqk.residual_search(x[:64], e, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rqk.residual_search(x, e, 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_nothing_of_rows_times_codes_is_allocated() -> None:
    result = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    extra_kib = int(result.stdout)
    assert extra_kib < 64 * 1024  # rows x codes would be a GiB even at one byte each


def test_not_differentiable_and_blind_to_autocast(device: torch.device) -> None:
    x = torch.randn(20, 8, device=device, requires_grad=True)
    e = torch.randn(16, 8, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = rqk.residual_search(x, e, 2, return_residuals=True)
    assert not any(t.requires_grad for t in out[:4])
    assert out.quantized.dtype == torch.float32
    assert torch.equal(out.codes, rqk.reference.residual_search(x, e, 2).codes)


def test_opcheck(device: torch.device) -> None:
    op = torch.ops.rqkernels.residual_search.default
    x = torch.randn(3, 7, 8, device=device)
    torch.library.opcheck(op, (x, torch.randn(16, 8, device=device), 2, True))
    torch.library.opcheck(op, (x.half(), torch.randn(4, 16, 8, device=device), None, False))
    torch.library.opcheck(op, (x[:0], torch.randn(16, 8, device=device), 2, False))


def test_compiles_as_one_graph(device: torch.device) -> None:
    def quantize(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        out = rqk.residual_search(x * 2, e, 3, return_residuals=True, return_statistics=True)
        counts, sums = out.statistics
        decoded = rqk.residual_decode(out.codes, e)
        return decoded + sums.mean() + counts.sum() + out.residuals[..., -1, :]

    x, e = torch.randn(50, 8, device=device), torch.randn(16, 8, device=device)
    compiled = torch.compile(quantize, fullgraph=True)
    torch.testing.assert_close(compiled(x, e), quantize(x, e))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.zeros(2, 4, dtype=torch.float64)), TypeError, "x must be float32, float16, bfloat16, got float"),
        (dict(x=[[1.0]]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(codebooks=torch.zeros(8, 4, dtype=torch.int64)), TypeError, "codebooks must be .* got int64"),
        (dict(x=torch.zeros(())), ValueError, "x must be .*, got a scalar"),
        (dict(x=torch.zeros(2, 5)), ValueError, r"x \(2, 5\) has 5 channels, codebooks \(8, 4\) have 4"),
        (dict(codebooks=torch.zeros(4)), ValueError, r"codebooks must be \(K, C\).*; got \(4\)"),
        (dict(codebooks=torch.zeros(1, 1, 8, 4)), ValueError, "codebooks must be"),
        (dict(codebooks=torch.zeros(0, 4)), ValueError, r"codebooks must not be empty, got \(0, 4\)"),
        (dict(x=torch.zeros(2, 0), codebooks=torch.zeros(8, 0)), ValueError, "codebooks must not be empty"),
        (dict(depth=None), ValueError, "depth is required with a shared codebook"),
        (dict(depth=0), ValueError, "depth must be >= 1, got 0"),
        (dict(depth=2.0), TypeError, "depth must be an integer or None, got float"),
        (dict(depth=True), TypeError, "depth must be an integer or None, got bool"),
        (dict(codebooks=torch.zeros(3, 8, 4)), ValueError, r"depth is 2, but codebooks \(3, 8, 4\) hold 3 depths"),
        (dict(codebooks=torch.full((8, 4), torch.nan)), ValueError, "codebooks must be finite, got nan in code 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(2, 4), "codebooks": torch.zeros(8, 4), "depth": 2}
    with pytest.raises(error, match=message):
        rqk.residual_search(**{**good, **arguments})


def test_a_code_that_is_not_finite_is_located() -> None:
    e = torch.zeros(3, 8, 4)
    e[2, 5, 1] = torch.inf
    with pytest.raises(ValueError, match="got inf in code 5 of depth 2"):
        rqk.residual_search(torch.zeros(2, 4), e)


@pytest.mark.gpu
def test_devices_agree_and_must_agree() -> None:
    x, e = torch.randn(300, 40), torch.randn(500, 40)
    on_cpu, on_gpu = rqk.residual_search(x, e, 4), rqk.residual_search(x.cuda(), e.cuda(), 4)
    for ours, theirs in zip(on_cpu[:3], on_gpu[:3], strict=True):
        assert torch.equal(ours, theirs.cpu())
    with pytest.raises(ValueError, match="x and codebooks must be on the same device"):
        rqk.residual_search(x.cuda(), e, 4)


@pytest.mark.gpu
def test_captures_into_a_cuda_graph() -> None:
    x, e = torch.randn(64, 16, device="cuda"), torch.randn(100, 16, device="cuda")
    rqk.residual_search(x, e, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rqk.residual_search(x, e, 3)
    x.copy_(torch.randn(64, 16))
    graph.replay()
    assert torch.equal(out.codes, rqk.residual_search(x, e, 3).codes)


@pytest.mark.gpu
def test_bad_codes_are_never_chosen_on_a_gpu() -> None:
    x, e = torch.randn(50, 8, device="cuda"), torch.randn(20, 8, device="cuda")
    e[::2] = torch.nan
    assert torch.equal(rqk.residual_search(x, e, 1).codes // 2, rqk.residual_search(x, e[1::2], 1).codes)
