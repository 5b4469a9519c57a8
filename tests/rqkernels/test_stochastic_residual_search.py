"""Codes sampled by distance equal the float64 definition for every batch, number of threads and machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rqkernels as rqk
from rqkernels.reference import OP_STOCHASTIC_RESIDUAL_SEARCH, philox_uniform
from rqkernels.reference.residual_search import lane_sum

Draw = Callable[[str, int, int, int, torch.device], tuple[torch.Tensor, torch.Tensor]]
BOTH = pytest.mark.parametrize("search", [rqk.stochastic_residual_search, rqk.reference.stochastic_residual_search])

# What float32 sums of spread weights may be off by: a uniform so near a boundary may fall to the neighbour.
FLOAT32 = 1e-5


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit in value; NaN equals NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def squared_distances(r_nc: torch.Tensor, e_kc: torch.Tensor) -> torch.Tensor:
    return torch.cat([lane_sum((r.double()[:, None] - e_kc.double()) ** 2) for r in r_nc.split(64)])


def distance_from_interval(
    out: rqk.ResidualCodes, codebooks: torch.Tensor, tau: float, seed: int, offset: int = 0
) -> torch.Tensor:
    """Distance of each uniform from the interval of the code it sampled, in cumulative mass; 0: inside."""
    depth, off = out.codes.shape[-1], []
    for d in range(depth):
        e = codebooks if codebooks.dim() == 2 else codebooks[d]
        squared = squared_distances(out.residuals[:, d], e)
        mass = torch.exp(-(squared - squared.min(-1, keepdim=True).values) / tau).cumsum(-1)
        mass = mass / mass[:, -1:]
        rows = torch.arange(offset, offset + len(squared), device=mass.device)
        u = philox_uniform(rows, seed=seed, stream=d, op_id=OP_STOCHASTIC_RESIDUAL_SEARCH)
        code = out.codes[:, d, None]
        upper = mass.gather(-1, code)[:, 0]
        lower = torch.where(code > 0, mass.gather(-1, (code - 1).clamp_min(0)), 0.0)[:, 0]
        off.append(torch.maximum(lower - u, u - upper).clamp_min(0))
    return torch.stack(off, -1)


def assert_follows_its_codes(out: rqk.ResidualCodes, x: torch.Tensor, codebooks: torch.Tensor) -> None:
    """Check residuals, norms and quantized against the codes, in the definition's arithmetic."""
    residual, total = x.float(), torch.zeros_like(x, dtype=torch.float32)
    for d in range(out.codes.shape[-1]):
        assert same(out.residuals[..., d, :], residual)
        chosen = (codebooks if codebooks.dim() == 2 else codebooks[d]).float()[out.codes[..., d]]
        residual, total = residual - chosen, total + chosen
        assert same(out.residual_sq_norms[..., d], lane_sum(residual.double() ** 2).float())
    assert same(out.quantized, total.to(x.dtype))


def assert_equals_definition(
    x: torch.Tensor, codebooks: torch.Tensor, depth: int | None, tau: float, seed: int = 5, offset: int = 0
) -> rqk.ResidualCodes:
    options = dict(tau=tau, seed=seed, offset=offset, return_residuals=True)
    ours = rqk.stochastic_residual_search(x, codebooks, depth, **options)
    expected = rqk.reference.stochastic_residual_search(x, codebooks, depth, **options)
    for one, other in zip(ours[:4], expected[:4], strict=True):
        assert same(one, other)
    assert ours.statistics is None
    return ours


@pytest.mark.parametrize(("n", "k", "c"), [(200, 300, 17), (30, 600, 256)])
def test_draws_what_the_definition_draws(draw: Draw, kind: str, n: int, k: int, c: int, device: torch.device) -> None:
    x, e = draw(kind, n, k, c, device)
    mean = squared_distances(x, e).mean().item()
    # tau from far below float32's resolution of the distances to far above them.
    for times in (1e-12, 1e-4, 0.02, 1.0, 100.0):
        tau = times * mean + 1e-90
        out = rqk.stochastic_residual_search(x, e, 2, tau=tau, seed=3, offset=17, return_residuals=True)
        assert_follows_its_codes(out, x, e)
        off = distance_from_interval(out, e, tau, 3, 17)
        assert off.max() < FLOAT32, times
        assert (off > 1e-12).float().mean() < 0.02, times


@pytest.mark.parametrize("n", [0, 1, 129])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_ragged_sizes(n: int, depth: int, shared: bool, device: torch.device) -> None:
    for k in (1, 257):
        for c in (1, 17, 64):
            e = torch.randn(*(() if shared else (depth,)), k, c, device=device)
            assert_equals_definition(torch.randn(n, c, device=device), e, depth if shared else None, tau=0.3 * c)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 1, 2**32 - 10, 2**63 - 200])
def test_seeds_and_offsets(seed: int, offset: int, device: torch.device) -> None:
    x, e = torch.randn(150, 8, device=device), torch.randn(60, 8, device=device)
    assert_equals_definition(x, e, 3, tau=2.0, seed=seed, offset=offset)


@pytest.mark.parametrize(("k", "c", "tau"), [(4096, 32, 0.5), (4096, 32, 2.0), (512, 256, 1.0), (512, 256, 4.0)])
def test_few_likely_codes_are_decided_in_float64(k: int, c: int, tau: float, device: torch.device) -> None:
    # Rows next to codes: the mass lies in a few, whose boundaries some of the uniforms come near to.
    e = torch.randn(k, c, device=device) * (0.2 + 0.8 * torch.rand(k, 1, device=device))
    assert_equals_definition(e[torch.randint(k, (250,))] + 0.1 * torch.randn(250, c, device=device), e, 2, tau=tau)


@pytest.mark.parametrize("copies", [30, 100])
def test_near_copies_that_float32_confuses_are_decided_in_float64(copies: int, device: torch.device) -> None:
    # Ten clusters of codes, as far apart as a row is long, in each of which distances differ by little more than
    # float32 scores are off: such weights would draw dozens of these codes wrongly.
    centres = torch.randn(10, 256, device=device).repeat(copies, 1)
    e = centres + 5e-3 * torch.randn(10 * copies, 256, device=device)
    x = centres[torch.randint(10, (600,))] + 5e-3 * torch.randn(600, 256, device=device)
    out = assert_equals_definition(x, e, 1, tau=7e-3)
    assert out.codes.unique().numel() > 200


def test_spread_mass_is_off_by_float32s_rounding_at_most(device: torch.device) -> None:
    x, e = torch.randn(150, 256, device=device), 0.3 * torch.randn(1000, 256, device=device)
    for tau in (5.0, 30.0, 1000.0):
        out = rqk.stochastic_residual_search(x, e, 1, tau=tau, seed=1, return_residuals=True)
        assert out.codes.unique().numel() > 100
        off = distance_from_interval(out, e, tau, 1)
        assert off.max() < FLOAT32 and (off > 1e-12).float().mean() < 0.02


def test_an_infinite_temperature_inverts_the_uniform_alone(device: torch.device) -> None:
    x = torch.randn(5000, 3, device=device)
    for k in (1, 7, 1000):
        codes = rqk.stochastic_residual_search(x, torch.randn(k, 3, device=device), 2, tau=torch.inf, seed=11).codes
        for d in (0, 1):
            u = philox_uniform(torch.arange(5000), seed=11, stream=d, op_id=OP_STOCHASTIC_RESIDUAL_SEARCH)
            assert torch.equal(codes[:, d].cpu(), (u * k).long())


def test_no_temperature_gives_the_certified_code(draw: Draw, kind: str, device: torch.device) -> None:
    x, e = draw(kind, 129, 257, 17, device)
    drawn = rqk.stochastic_residual_search(x, e, 1, tau=1e-300, seed=1).codes
    # Equal distances share the mass, so it is the distance that is certified.
    squared = squared_distances(x, e)
    assert torch.equal(squared.gather(-1, drawn)[:, 0], squared.min(-1).values)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_no_temperature_gives_the_certified_codes_of_all_depths(offset: float, device: torch.device) -> None:
    x, e = torch.randn(200, 40, device=device) + offset, torch.randn(3, 500, 40, device=device)
    e[0] += offset
    out = rqk.stochastic_residual_search(x, e, tau=1e-12, seed=1, return_residuals=True)
    nearest = rqk.residual_search(x, e, return_residuals=True)
    for drawn, expected in zip(out[:4], nearest[:4], strict=True):
        assert torch.equal(drawn, expected)


def test_equal_codes_share_the_mass(device: torch.device) -> None:
    e = torch.tensor([[1.0, 0.0], [5.0, 5.0], [1.0, 0.0], [0.0, 1.0]], device=device)
    x = torch.tensor([[1.0, 0.0]], device=device).expand(30_000, 2)
    counts = rqk.stochastic_residual_search(x, e, 1, tau=1e-9, seed=4).codes[:, 0].bincount(minlength=4).tolist()
    assert counts[1] == counts[3] == 0 and abs(counts[0] - 15_000) < 5 * 30_000**0.5 / 2


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells of fewer than 10 expected are taken together."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    rare = expected < 10
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 1e-3
    assert counts[~kept].sum() == 0
    statistic = ((counts - expected).square() / expected)[kept].sum().item()
    return statistic, int(kept.sum()) - 1


def one_in_a_million(freedom: int) -> float:
    """About the 1e-6 tail of chi-square (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize(("k", "tau"), [(2, 1.0), (17, 0.3), (17, 3.0), (17, 50.0), (1000, 0.5), (1000, 20.0)])
def test_a_million_draws_follow_the_distribution(k: int, tau: float, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(k)
    x, e = (torch.randn(rows, 4, generator=generator).to(device) for rows in (1, k))
    draws = 1_000_000
    codes = rqk.stochastic_residual_search(x.expand(draws, 4), e, 1, tau=tau, seed=1).codes
    expected = draws * torch.softmax(-squared_distances(x, e)[0] / tau, -1)
    statistic, freedom = chi_square(codes[:, 0].bincount(minlength=k).cpu(), expected.cpu())
    assert statistic < one_in_a_million(freedom)


@BOTH
def test_rows_depths_and_seeds_are_independent(search: Callable[..., rqk.ResidualCodes], device: torch.device) -> None:
    x, e = torch.zeros(100_000, 1, device=device), torch.zeros(2, 8, 1, device=device)
    codes = search(x, e, tau=1.0, seed=9).codes
    other_seed = search(x, e, tau=1.0, seed=10).codes
    pairs = {
        "depths": (codes[:, 0], codes[:, 1]),
        "rows": (codes[:-1, 0], codes[1:, 0]),
        "rows and depths": (codes[:-1, 0], codes[1:, 1]),
        "seeds": (codes[:, 0], other_seed[:, 0]),
    }
    for name, (one, other) in pairs.items():
        counts = (8 * one + other).bincount(minlength=64).cpu()
        statistic, freedom = chi_square(counts, torch.full((64,), len(one) / 64))
        assert statistic < one_in_a_million(freedom), name


@BOTH
def test_draws_do_not_depend_on_the_batch(search: Callable[..., rqk.ResidualCodes], device: torch.device) -> None:
    for c, tau in ((48, 20.0), (8, 1.0)):
        x, e = torch.randn(350, c, device=device), torch.randn(200, c, device=device)
        whole = search(x, e, 3, tau=tau, seed=5, offset=100)
        for size in (1, 7, 40, 200):
            rows = min(350, 20 * size)
            parts = [
                search(x[i : min(i + size, rows)], e, 3, tau=tau, seed=5, offset=100 + i) for i in range(0, rows, size)
            ]
            assert torch.equal(torch.cat([p.codes for p in parts]), whole.codes[:rows])
            assert torch.equal(torch.cat([p.quantized for p in parts]), whole.quantized[:rows])
        # Neighbours of other size do not matter either.
        x[::2] *= 100
        assert torch.equal(search(x, e, 3, tau=tau, seed=5, offset=100).codes[1::2], whole.codes[1::2])


def test_draws_do_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    # The last: few rows and many numbers of codes, of which threads take a share each.
    for n, k, c, depth in ((700, 900, 24, 3), (700, 900, 24, None), (40, 6151, 128, 2)):
        x, e = torch.randn(n, c), torch.randn(k, c) if depth else torch.randn(3, k, c)
        for tau in (0.01, 2.0, 200.0):
            try:
                found = []
                for count in (1, 2, 3, 7):
                    torch.set_num_threads(count)
                    found.append(rqk.stochastic_residual_search(x, e, depth, tau=tau, seed=5, return_residuals=True))
            finally:
                torch.set_num_threads(threads)
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0][:4], other[:4], strict=True))


_AT_A_LEVEL = """
import sys, torch, rqkernels as rqk
torch.manual_seed(1)
found = [rqk.info()["cpu_capability"]]
for k, c, tau in ((257, 17, 1.0), (2000, 32, 0.5), (300, 256, 1.0), (2000, 32, 30.0), (300, 256, 2000.0)):
    x, e = torch.randn(200, c), torch.randn(k, c)
    out = rqk.stochastic_residual_search(x, e, 2, tau=tau, seed=3, return_residuals=True)
    found.append((e, tau, out.codes, out.residuals, out.quantized, out.residual_sq_norms))
torch.save(found, sys.argv[1])
"""


def test_instruction_sets_differ_at_boundaries_alone(tmp_path: Path) -> None:
    levels = ["default", "avx2", "avx512"]
    available = levels[: levels.index(rqk.info()["cpu_capability"]) + 1]
    by_level = []
    for level in available:
        path = tmp_path / f"{level}.pt"
        environment = {**os.environ, "RQK_CPU_CAPABILITY": level}
        subprocess.run([sys.executable, "-c", _AT_A_LEVEL, path], env=environment, check=True)
        used, *cases = torch.load(path)
        assert used == level
        by_level.append(cases)
        for e, tau, codes, residuals, quantized, norms in cases:
            off = distance_from_interval(rqk.ResidualCodes(codes, quantized, norms, residuals, None), e, tau, 3)
            assert off.max() < FLOAT32
    for cases in by_level[1:]:
        # Where few codes are likely all are the definition's, bit for bit.
        for one, other in zip(by_level[0][:3], cases[:3], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[2:], other[2:], strict=True))


def test_shapes_and_dtypes_of_the_result(device: torch.device) -> None:
    x, e = torch.randn(2, 3, 5, 16, device=device), torch.randn(32, 16, device=device)
    out = rqk.stochastic_residual_search(x, e, 3, tau=1.0, seed=0, return_residuals=True)
    assert isinstance(out, rqk.ResidualCodes)
    assert out.codes.shape == (2, 3, 5, 3) and out.codes.dtype == torch.int64
    assert out.quantized.shape == x.shape and out.quantized.dtype == torch.float32
    assert out.residual_sq_norms.shape == (2, 3, 5, 3) and out.residual_sq_norms.dtype == torch.float32
    assert out.residuals.shape == (2, 3, 5, 3, 16) and out.residuals.dtype == torch.float32
    assert out.statistics is None
    assert rqk.stochastic_residual_search(x, e, 3, tau=1.0, seed=0).residuals is None
    # A row's counter is its flattened index.
    flat = rqk.stochastic_residual_search(x.view(-1, 16), e, 3, tau=1.0, seed=0)
    assert torch.equal(out.codes.view(-1, 3), flat.codes)
    assert rqk.stochastic_residual_search(x[0, 0, 0], e, 3, tau=1.0, seed=0).codes.shape == (3,)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_types(x_dtype: torch.dtype, codebook_dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(100, 24, device=device).to(x_dtype)
    out = assert_equals_definition(x, torch.randn(50, 24, device=device).to(codebook_dtype), 3, tau=5.0)
    assert out.quantized.dtype == x_dtype


def test_strided_input(device: torch.device) -> None:
    x = torch.randn(4, 16, 6, 6, device=device).permute(0, 2, 3, 1)
    e = torch.randn(16, 80, device=device).T[::2]
    assert not x.is_contiguous() and not e.is_contiguous()
    assert_equals_definition(x, e, 2, tau=3.0)
    assert_equals_definition(torch.randn(1, 1, 16, device=device).expand(3, 7, 16), e, 2, tau=3.0)


@BOTH
def test_rows_that_are_not_finite(search: Callable[..., rqk.ResidualCodes], device: torch.device) -> None:
    x = torch.randn(64, 16, device=device)
    clean = search(x, x[:20], 3, tau=4.0, seed=1)
    broken = x.clone()
    broken[5, 3], broken[6, 0], broken[63, 15] = torch.nan, torch.inf, -torch.inf
    out = search(broken, x[:20], 3, tau=4.0, seed=1)
    bad = torch.zeros(64, dtype=torch.bool, device=device)
    bad[[5, 6, 63]] = True
    assert out.codes[bad].eq(-1).all()
    assert out.quantized[bad].isnan().all() and out.residual_sq_norms[bad].isnan().all()
    # Their neighbours, which share registers with them, are untouched.
    assert torch.equal(out.codes[~bad], clean.codes[~bad])
    assert torch.equal(out.quantized[~bad], clean.quantized[~bad])


def test_a_residual_that_overflows_is_marked_from_there_on(device: torch.device) -> None:
    x, e = torch.full((1, 4), 3e38, device=device), torch.full((1, 4), -3e38, device=device)
    out = assert_equals_definition(x, e, 3, tau=1.0)
    assert out.codes.tolist() == [[0, -1, -1]]
    assert out.quantized.isnan().all()


def test_flushing_of_denormals_changes_nothing(draw: Draw) -> None:
    x, e = draw("denormal", 50, 40, 8, torch.device("cpu"))
    expected = rqk.stochastic_residual_search(x, e, 2, tau=1e-84, seed=1).codes
    assert expected.unique().numel() > 5
    if not torch.set_flush_denormal(True):
        return  # a processor without the mode has nothing to get wrong
    try:
        assert torch.equal(rqk.stochastic_residual_search(x, e, 2, tau=1e-84, seed=1).codes, expected)
    finally:
        torch.set_flush_denormal(False)


_PEAK = """
import resource, torch, rqkernels as rqk
x, e = torch.randn(65536, 4), torch.randn(16384, 4)
rqk.stochastic_residual_search(x[:64], e, 1, tau=1.0, seed=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rqk.stochastic_residual_search(x, e, 1, tau=1.0, seed=0)
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
        out = rqk.stochastic_residual_search(x, e, 2, tau=1.0, seed=3, return_residuals=True)
    assert not any(t.requires_grad for t in out[:4])
    assert out.quantized.dtype == torch.float32
    assert torch.equal(out.codes, rqk.reference.stochastic_residual_search(x, e, 2, tau=1.0, seed=3).codes)


def test_opcheck(device: torch.device) -> None:
    op = torch.ops.rqkernels.stochastic_residual_search.default
    x = torch.randn(3, 7, 8, device=device)
    torch.library.opcheck(op, (x, torch.randn(16, 8, device=device), 2, 1.0, 5, 0, True))
    torch.library.opcheck(op, (x.half(), torch.randn(4, 16, 8, device=device), None, 0.5, -1, 9, False))
    torch.library.opcheck(op, (x[:0], torch.randn(16, 8, device=device), 2, 1.0, 5, 0, False))


def test_compiles_as_one_graph_for_all_counters(device: torch.device) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def quantize(x: torch.Tensor, e: torch.Tensor, seed: int, offset: int) -> tuple[torch.Tensor, ...]:
        out = rqk.stochastic_residual_search(x * 2, e, 3, tau=2.0, seed=seed, offset=offset, return_residuals=True)
        return out.codes, out.quantized + out.residuals[..., -1, :]

    x, e = torch.randn(50, 8, device=device), torch.randn(16, 8, device=device)
    torch.compiler.reset()
    compiled = torch.compile(quantize, fullgraph=True, backend=count)
    for step in range(12):  # more than Dynamo would recompile
        for one, other in zip(compiled(x, e, 3 + step, 50 * step), quantize(x, e, 3 + step, 50 * step), strict=True):
            assert torch.equal(one, other)
    assert graphs <= 4
    torch.compiler.reset()
    inductor = torch.compile(quantize, fullgraph=True)
    torch.testing.assert_close(inductor(x, e, 3, 7), quantize(x, e, 3, 7))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.zeros(2, 4, dtype=torch.float64)), TypeError, "x must be float32, float16, bfloat16, got float"),
        (dict(x=[[1.0]]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(codebooks=torch.zeros(8, 4, dtype=torch.int64)), TypeError, "codebooks must be .* got int64"),
        (dict(codebooks=rqk.PackedCodebook(torch.zeros(8, 4))), TypeError, r"PackedCodebook.*pass its \.codebook"),
        (dict(x=torch.zeros(())), ValueError, "x must be .*, got a scalar"),
        (dict(x=torch.zeros(2, 5)), ValueError, r"x \(2, 5\) has 5 channels, codebooks \(8, 4\) have 4"),
        (dict(codebooks=torch.zeros(4)), ValueError, r"codebooks must be \(K, C\).*; got \(4\)"),
        (dict(codebooks=torch.zeros(0, 4)), ValueError, r"codebooks must not be empty, got \(0, 4\)"),
        (dict(depth=None), ValueError, "depth is required with a shared codebook"),
        (dict(depth=0), ValueError, "depth must be >= 1, got 0"),
        (dict(depth=2.0), TypeError, "depth must be an integer or None, got float"),
        (dict(codebooks=torch.zeros(3, 8, 4)), ValueError, r"depth is 2, but codebooks \(3, 8, 4\) hold 3 depths"),
        (dict(codebooks=torch.full((8, 4), torch.nan)), ValueError, "codebooks must be finite, got nan in code 0"),
        (dict(x=torch.zeros(0, 4), codebooks=torch.full((8, 4), torch.nan)), ValueError, "codebooks must be finite"),
        (dict(tau=0), ValueError, "tau must be > 0, got 0"),
        (dict(tau=-1.0), ValueError, "tau must be > 0, got -1"),
        (dict(tau=torch.nan), ValueError, "tau must be > 0, got nan"),
        (dict(tau="1"), TypeError, "tau must be a number, got str"),
        (dict(tau=torch.tensor(1.0)), TypeError, "tau must be a number, got Tensor"),
        (dict(seed=-1), ValueError, r"seed must be in \[0, 2\^64\), got -1"),
        (dict(seed=2**64), ValueError, r"seed must be in \[0, 2\^64\), got 18446744073709551616"),
        (dict(seed=1.0), TypeError, "seed must be an integer, got float"),
        (dict(offset=-1), ValueError, r"offset must be in \[0, 2\^63\), got -1"),
        (dict(offset=2**63), ValueError, r"offset must be in \[0, 2\^63\)"),
        (dict(offset=2**63 - 1), ValueError, r"offset \+ rows below 2\^63; got 9223372036854775807 with 2 rows"),
        (dict(offset=True), TypeError, "offset must be an integer, got bool"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(2, 4), "codebooks": torch.zeros(8, 4), "depth": 2, "tau": 1.0, "seed": 0, "offset": 0}
    with pytest.raises(error, match=message):
        rqk.stochastic_residual_search(**{**good, **arguments})


@pytest.mark.parametrize(("name", "value"), [("tau", 0.0), ("tau", torch.nan), ("offset", -1), ("seed", -1)])
def test_the_definition_refuses_them_too(name: str, value: float) -> None:
    good = {"tau": 1.0, "seed": 0, "offset": 0}
    with pytest.raises(ValueError, match=name):
        rqk.reference.stochastic_residual_search(torch.zeros(2, 4), torch.zeros(8, 4), 2, **{**good, name: value})


def test_a_code_that_is_not_finite_is_located() -> None:
    e = torch.zeros(3, 8, 4)
    e[2, 5, 1] = torch.inf
    with pytest.raises(ValueError, match="got inf in code 5 of depth 2"):
        rqk.stochastic_residual_search(torch.zeros(2, 4), e, tau=1.0, seed=0)


@pytest.mark.gpu
def test_devices_agree_but_at_boundaries() -> None:
    x, e = torch.randn(300, 40), torch.randn(500, 40)
    for tau in (1e-6, 2.0, 100.0):
        options = dict(tau=tau, seed=6, return_residuals=True)
        on_cpu = rqk.stochastic_residual_search(x, e, 1, **options)
        on_gpu = rqk.stochastic_residual_search(x.cuda(), e.cuda(), 1, **options)
        assert (on_cpu.codes != on_gpu.codes.cpu()).float().mean() < 0.01
        assert distance_from_interval(on_gpu, e.cuda(), tau, 6).max() < 1e-12
    with pytest.raises(ValueError, match="x and codebooks must be on the same device"):
        rqk.stochastic_residual_search(x.cuda(), e, 1, tau=1.0, seed=0)


@pytest.mark.gpu
def test_captures_into_a_cuda_graph() -> None:
    x, e = torch.randn(64, 16, device="cuda"), torch.randn(100, 16, device="cuda")
    rqk.stochastic_residual_search(x, e, 3, tau=1.0, seed=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rqk.stochastic_residual_search(x, e, 3, tau=1.0, seed=1)
    x.copy_(torch.randn(64, 16))
    graph.replay()
    assert torch.equal(out.codes, rqk.stochastic_residual_search(x, e, 3, tau=1.0, seed=1).codes)
