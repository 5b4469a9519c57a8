"""Codes sampled from logits equal the float64 definition for every batch, number of threads and machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rqkernels as rqk
from rqkernels.reference import OP_SAMPLE_LOGITS, philox_uniform

Sample = Callable[..., Tensor]
BOTH = pytest.mark.parametrize("sample", [rqk.sample_logits, rqk.reference.sample_logits], ids=["kernel", "reference"])

# With cuts and without, by number and by mass, hot and cold.
SETTINGS = [
    dict(),
    dict(temperature=0),
    dict(top_k=1, top_p=0.5),
    dict(top_k=100),
    dict(top_p=0.9),
    dict(top_k=300, top_p=0.7, temperature=1.3),
    dict(top_p=0.999, temperature=0.2),
    dict(top_k=7, top_p=1e-9),
    dict(top_p=1 - 1e-16, temperature=1e-320),
    dict(top_k=2, temperature=1e308),
    dict(top_p=0.3, temperature=1e10),
    dict(top_k=10**12, top_p=1.0, temperature=4.0),
]

KINDS = [
    "gaussian", "spread", "integers", "equal", "two-values", "both-zeros", "forbidden", "one-allowed", "huge",
    "denormal", "ascending", "descending", "outliers", "spikes", "exponents",
]  # fmt: skip


def draw_logits(kind: str, n: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """Logits (n, k) on which a sampler can go wrong."""
    x = torch.randn(n, k)
    if kind == "spread":
        x = 10 * x
    elif kind == "integers":  # full of ties
        x = x.round()
    elif kind == "equal":
        x = torch.full((n, k), -3.5)
    elif kind == "two-values":
        x = (x > 1).float()
    elif kind == "both-zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "forbidden":
        x = x.masked_fill(torch.rand(n, k) < 0.9, -torch.inf)
        x[:, k // 2] = 1.0
    elif kind == "one-allowed":
        x = torch.full((n, k), -torch.inf)
        x[:, -1] = -1e4
    elif kind == "huge":
        x = x * 1e37
    elif kind == "denormal":
        x = x * 1e-42
    elif kind == "ascending":
        x = torch.linspace(-9, 3, k).expand(n, k)
    elif kind == "descending":
        x = torch.linspace(3, -9, k).expand(n, k)
    elif kind in ("outliers", "spikes"):  # where evenly spaced samples look, and nowhere else
        x[:, (torch.arange(256) * k // 256).unique()] += 30 if kind == "spikes" else -30
    elif kind == "exponents":
        x = x.sign() * torch.exp2(torch.randint(-140, 127, (n, k)).float())
    return x.to(device)


def assert_equals_definition(logits: Tensor, **options: object) -> Tensor:
    ours = rqk.sample_logits(logits, **{"seed": 5, **options})
    assert ours.dtype == torch.int64 and ours.device == logits.device
    # Off only where u or top_p is within some 1e-10 of a boundary: not once in all these.
    assert torch.equal(ours.cpu(), rqk.reference.sample_logits(logits.cpu(), **{"seed": 5, **options}))
    return ours


def frequencies(sample: Sample, logits: Tensor, **options: object) -> Tensor:
    draws = sample(logits.expand(50_000, -1), seed=1, **options)
    return torch.bincount(draws, minlength=logits.numel()).double().cpu() / 50_000


# --- the definition, and that the kernels follow it ------------------------------------------------------


@BOTH
def test_plain_softmax(sample: Sample, device: torch.device) -> None:
    logits = torch.randn(12)
    observed = frequencies(sample, logits.to(device))
    torch.testing.assert_close(observed, logits.double().softmax(-1), atol=0.01, rtol=0)
    observed = frequencies(sample, logits.to(device), temperature=2.0)
    torch.testing.assert_close(observed, (logits.double() / 2).softmax(-1), atol=0.01, rtol=0)


@BOTH
def test_zero_temperature_and_top_1_are_argmax_with_the_lowest_index(sample: Sample, device: torch.device) -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]], device=device)
    assert sample(logits, temperature=0, seed=9).tolist() == [1, 0]
    assert sample(logits, top_k=1, seed=9).tolist() == [1, 0]


@BOTH
def test_top_k_keeps_exactly_k_and_prefers_the_lower_index(sample: Sample, device: torch.device) -> None:
    observed = frequencies(sample, torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0], device=device), top_k=3)
    torch.testing.assert_close(observed, torch.tensor([0, 1, 1, 1, 0]).double() / 3, atol=0.01, rtol=0)
    assert frequencies(sample, torch.zeros(4, device=device), top_k=100).min() > 0.2  # more than there are: all


@BOTH
def test_top_p_keeps_a_code_while_the_mass_before_it_is_below(sample: Sample, device: torch.device) -> None:
    logits = torch.tensor([0.2, 0.5, 0.3], device=device).log()
    torch.testing.assert_close(frequencies(sample, logits, top_p=0.49), torch.tensor([0, 1, 0]).double())
    observed = frequencies(sample, logits, top_p=0.51)
    torch.testing.assert_close(observed, torch.tensor([0, 0.625, 0.375]).double(), atol=0.01, rtol=0)
    observed = frequencies(sample, logits, top_p=1.0)
    torch.testing.assert_close(observed, logits.double().exp().cpu(), atol=0.01, rtol=0)


@BOTH
@pytest.mark.parametrize("k", [4, 10, 100])
def test_top_p_among_equal_logits_is_exact(sample: Sample, k: int, device: torch.device) -> None:
    for kept in (1, 3, k - 1):
        codes = sample(torch.full((3000, k), 2.0, device=device), seed=1, top_p=kept / k)
        assert codes.unique().tolist() == list(range(kept))


@BOTH
def test_top_k_comes_before_top_p(sample: Sample, device: torch.device) -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], device=device).log()
    # Of the two kept, the first has 4/7 of the mass: 0.5 < 4/7, so top_p keeps it alone.
    observed = frequencies(sample, logits, top_k=2, top_p=0.5)
    torch.testing.assert_close(observed, torch.tensor([1, 0, 0, 0]).double())


@BOTH
def test_forbidden_codes_are_never_drawn(sample: Sample, device: torch.device) -> None:
    logits = torch.full((1000, 5), -torch.inf, device=device)
    logits[:, 3] = -1e4
    for options in (dict(), dict(top_k=3), dict(top_p=0.9), dict(top_k=3, top_p=0.9), dict(temperature=0)):
        assert sample(logits, seed=0, **options).eq(3).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_what_the_definition_draws(settings: dict[str, float], device: torch.device) -> None:
    for kind in KINDS:
        for n, k in ((40, 257), (8, 3000)):
            assert_equals_definition(draw_logits(kind, n, k, device), offset=17, stream=3, **settings)


def test_ragged_sizes(device: torch.device) -> None:
    for k in (1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1025):
        for n in (0, 1, 29):
            for settings in (dict(), dict(top_k=(k + 1) // 2 + 1), dict(top_p=0.8), dict(top_k=k - 1 or 1, top_p=0.8)):
                assert_equals_definition(torch.randn(n, k, device=device), **settings)


def test_many_codes(device: torch.device) -> None:
    for kind in ("gaussian", "integers", "spread"):
        logits = draw_logits(kind, 2, 1 << 17, device)
        for settings in (dict(), dict(top_k=5000, top_p=0.95), dict(top_p=0.99)):
            assert_equals_definition(logits, **settings)


def assert_inverts_uniforms(logits: Tensor, draws: int, **settings: float) -> None:
    """Many samples from one row (K,), each against the definition's one set of weights."""
    top_k, top_p = settings.get("top_k", len(logits)), settings.get("top_p", 1.0)
    ordered, order = logits.cpu().double().sort(descending=True, stable=True)
    weights = (ordered - ordered[0]).exp()
    weights[top_k:] = 0
    before = torch.cat([torch.zeros(1, dtype=torch.float64), weights.cumsum(0)[:-1]])
    stays = weights.masked_fill(before >= top_p * weights.sum(), 0) if top_p < 1 else weights
    cumulative = torch.zeros_like(weights).scatter(0, order, stays).cumsum(0)
    u = philox_uniform(torch.arange(draws), seed=3, stream=0, op_id=OP_SAMPLE_LOGITS)
    codes = [rqk.sample_logits(logits, seed=3, offset=i, **settings) for i in range(draws)]
    assert torch.equal(torch.stack(codes).cpu(), torch.searchsorted(cumulative, u * cumulative[-1], right=True))


@pytest.mark.parametrize("settings", [dict(), dict(top_p=0.8), dict(top_k=100_000, top_p=0.9)], ids=str)
def test_weights_off_by_their_rounding_decide_nothing(settings: dict[str, float], device: torch.device) -> None:
    # Half of the mass in logits whose float32 weights are all off by the same: one draw in a hundred would be another.
    for smaller in (-7.203, -7.235, -7.405, -7.511, -7.607):
        logits = torch.full((1 << 17,), smaller, device=device)
        logits[::1500] = 0.1
        assert_inverts_uniforms(logits, 80, **settings)


def test_cuts_at_a_code_s_very_end(device: torch.device) -> None:
    logits = torch.linspace(0, -3, 30, device=device)
    weights = logits.cpu().double().exp()
    for last in range(1, 29):
        for off in (-1e-9, 1e-9):
            top_p = (weights[:last].sum() / weights.sum()).item() + off
            assert_equals_definition(logits.expand(150, 30), top_p=top_p)


def test_published_settings_over_many_rows(device: torch.device) -> None:
    logits = 2 * torch.randn(300, 4096, device=device)
    codes = assert_equals_definition(logits, top_k=512, top_p=0.95, seed=1)
    assert codes.unique().numel() > 200
    assert_equals_definition(logits, seed=2)


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells of fewer than 10 expected are taken together."""
    expected = probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0
    rare = (expected < 10) & (expected > 0)
    counts = torch.cat([counts[expected >= 10].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[expected >= 10], expected[rare].sum()[None]])
    used = expected > 0
    return ((counts - expected).square() / expected)[used].sum().item(), int(used.sum()) - 1


@pytest.mark.parametrize("settings", [dict(), dict(top_k=200), dict(top_p=0.8), dict(top_k=300, top_p=0.9)], ids=str)
def test_draws_follow_the_distribution(settings: dict[str, float], device: torch.device) -> None:
    draws, k = 20_000, 1000
    logits = torch.randn(k, generator=torch.Generator().manual_seed(k))
    ordered, order = logits.double().sort(descending=True)
    mass = ordered[: settings.get("top_k", k)].softmax(0)
    mass = mass[mass.cumsum(0) - mass < settings.get("top_p", 1.0)]
    expected = torch.zeros(k, dtype=torch.float64).index_copy(0, order[: len(mass)], mass / mass.sum())
    codes = rqk.sample_logits(logits.to(device).expand(draws, k), seed=1, **settings)
    statistic, freedom = chi_square(codes.bincount(minlength=k).cpu(), expected)
    # About the 1e-6 tail of chi-square (Wilson and Hilferty).
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3


# --- what a draw depends on ------------------------------------------------------------------------------


@BOTH
def test_draws_depend_on_row_stream_and_seed_alone(sample: Sample, device: torch.device) -> None:
    logits = torch.randn(64, 20, device=device)
    whole = sample(logits, seed=4, offset=10, stream=3)
    parts = [sample(logits[i : i + 5], seed=4, offset=10 + i, stream=3) for i in range(0, 64, 5)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(sample(logits.view(8, 8, 20), seed=4, offset=10, stream=3), whole.view(8, 8))
    for other in ({"seed": 5}, {"offset": 11}, {"stream": 4}):
        assert not torch.equal(sample(logits, **{"seed": 4, "offset": 10, "stream": 3, **other}), whole)


def test_equal_logits_invert_the_uniform_alone(device: torch.device) -> None:
    for seed, offset, stream in ((11, 0, 0), (2**64 - 1, 2**32 - 10, 1), (2**63, 2**63 - 5000, 2**32 - 1)):
        u = philox_uniform(torch.arange(4000) + offset, seed=seed, stream=stream, op_id=OP_SAMPLE_LOGITS)
        for k in (1, 7, 1000):
            codes = rqk.sample_logits(
                torch.zeros(4000, k, device=device), seed=seed, offset=offset, stream=stream, top_p=0.9
            )
            kept = max(1, -(-9 * k // 10))
            assert torch.equal(codes.cpu(), (u * kept).long())


@BOTH
@pytest.mark.parametrize("shape", [(), (1,)])
def test_counters_may_be_tensors(sample: Sample, shape: tuple[int, ...], device: torch.device) -> None:
    logits = torch.randn(50, 300, device=device)
    offset, stream = (torch.full(shape, v, dtype=torch.int64, device=device) for v in (2**32 - 20, 7))
    for step in range(3):
        expected = sample(logits, seed=3, offset=2**32 - 20 + step, stream=7 + step, top_k=50)
        assert torch.equal(sample(logits, seed=3, offset=offset, stream=stream, top_k=50), expected)
        assert torch.equal(sample(logits, seed=3, offset=2**32 - 20 + step, stream=stream, top_k=50), expected)
        offset += 1
        stream += 1


@BOTH
def test_innermost_rows_may_be_streams(sample: Sample, device: torch.device) -> None:
    logits, settings = torch.randn(6, 5, 40, device=device), dict(seed=4, offset=2**32 - 3, top_k=30)
    whole = sample(logits, stream=9, streams=5, **settings)
    apart = [sample(logits[:, i], stream=9 + i, **settings) for i in range(5)]
    assert torch.equal(whole, torch.stack(apart, dim=1))
    assert not torch.equal(whole, sample(logits, stream=9, **settings))
    counters = {name: torch.tensor(value, device=device) for name, value in (("offset", 2**32 - 3), ("stream", 9))}
    assert torch.equal(sample(logits, streams=5, **{**settings, **counters}), whole)
    last = 2**32 - 5
    assert torch.equal(
        sample(logits, stream=last, streams=5, **settings)[:, 4], sample(logits[:, 4], stream=2**32 - 1, **settings)
    )
    for wrong in (0, 4, 31):
        with pytest.raises(
            ValueError, match=rf"streams must be >= 1 and divide the number of rows \(30\), got {wrong}"
        ):
            sample(logits, streams=wrong, **settings)


def test_draws_do_not_depend_on_threads() -> None:
    logits = torch.randn(70, 900)
    threads = torch.get_num_threads()
    for settings in SETTINGS:
        try:
            found = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                found.append(rqk.sample_logits(logits, seed=5, **settings))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(found[0], other) for other in found[1:])


_AT_A_LEVEL = """
import sys, torch, rqkernels as rqk
sys.path.insert(0, sys.argv[1])
from test_sample_logits import KINDS, SETTINGS, draw_logits
torch.manual_seed(1)
found = []
for kind in KINDS:
    logits = draw_logits(kind, 8, 700)
    found.append((logits, [rqk.sample_logits(logits, seed=3, **settings) for settings in SETTINGS]))
torch.save((rqk.info()["cpu_capability"], found), sys.argv[2])
"""


def test_instruction_sets_draw_the_same(tmp_path: Path) -> None:
    levels = ["default", "avx2", "avx512"]
    here, expected = Path(__file__).parent, None
    for level in levels[: levels.index(rqk.info()["cpu_capability"]) + 1]:
        path = tmp_path / f"{level}.pt"
        environment = {**os.environ, "RQK_CPU_CAPABILITY": level}
        subprocess.run([sys.executable, "-c", _AT_A_LEVEL, here, path], env=environment, check=True)
        used, found = torch.load(path)
        assert used == level
        if expected is None:
            expected = [
                [rqk.reference.sample_logits(logits, seed=3, **settings) for settings in SETTINGS]
                for logits, _ in found
            ]
        for (_, drawn), right in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(drawn, right, strict=True))


def test_flushing_of_denormals_changes_nothing() -> None:
    logits = draw_logits("denormal", 50, 300)
    settings = dict(temperature=1e-42, top_k=40, top_p=0.9, seed=1)
    expected = rqk.sample_logits(logits, **settings)
    assert expected.unique().numel() > 5
    if not torch.set_flush_denormal(True):
        return  # a processor without the mode has nothing to get wrong
    try:
        assert torch.equal(rqk.sample_logits(logits, **settings), expected)
    finally:
        torch.set_flush_denormal(False)


# --- what comes in, and what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype, device: torch.device) -> None:
    logits = (3 * torch.randn(60, 300, device=device)).to(dtype)
    for settings in (dict(), dict(top_k=40, top_p=0.9)):
        assert_equals_definition(logits, **settings)


def test_strided_input(device: torch.device) -> None:
    logits = torch.randn(90, 4, 30, device=device).permute(1, 2, 0)
    assert assert_equals_definition(logits, top_k=20).shape == (4, 30)
    assert_equals_definition(torch.randn(8, 3, 40, device=device)[:, 1], top_p=0.8)
    assert_equals_definition(torch.randn(1, 16, device=device).expand(200, 16))
    assert rqk.sample_logits(torch.randn(16, device=device), seed=0).shape == ()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "nothing"])
def test_rows_that_nothing_can_be_drawn_from(bad: float | str, device: torch.device) -> None:
    for k in (5, 33, 3000):
        logits = torch.randn(9, k, device=device)
        for settings in (dict(), dict(top_k=3, top_p=0.5), dict(top_p=0.9), dict(temperature=0)):
            clean = rqk.sample_logits(logits, seed=1, **settings)
            for place in (0, k // 2, k - 1):
                broken = logits.clone()
                if bad == "nothing":
                    broken[6] = -torch.inf
                else:
                    broken[6, place] = bad
                if device.type == "cpu":
                    with pytest.raises(ValueError, match=r"sample_logits: logits: row 6 has NaN, \+inf, or nothing"):
                        rqk.sample_logits(broken, seed=1, **settings)
                else:
                    codes = rqk.sample_logits(broken, seed=1, **settings)
                    assert codes[6] == -1
                    assert torch.equal(codes[:6], clean[:6]) and torch.equal(codes[7:], clean[7:])


@BOTH
def test_no_rows(sample: Sample, device: torch.device) -> None:
    for settings in (dict(), dict(top_k=2, top_p=0.5), dict(temperature=0)):
        assert sample(torch.zeros(0, 5, device=device), seed=0, **settings).shape == (0,)


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(temperature=-1.0), "temperature must be a finite number >= 0, got -1"),
        (dict(temperature=float("nan")), "temperature must be a finite number >= 0, got nan"),
        (dict(temperature=float("inf")), "temperature must be a finite number >= 0, got inf"),
        (dict(top_k=0), "top_k must be >= 1, got 0"),
        (dict(top_p=0.0), "top_p must be in"),
        (dict(top_p=1.5), "top_p must be in"),
        (dict(top_p=float("nan")), "top_p must be in"),
        (dict(logits=torch.tensor([[0.0, torch.nan]])), "has NaN"),
        (dict(logits=torch.tensor([[0.0, torch.inf]])), r"\+inf"),
        (dict(logits=torch.full((1, 2), -torch.inf)), "nothing but -inf"),
        (dict(seed=2**64), "seed must be in"),
        (dict(stream=2**32), "stream must be in"),
    ],
)
def test_bad_arguments_are_named(sample: Sample, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(**{"logits": torch.zeros(1, 2), "seed": 0, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(logits=torch.zeros(1, 2).double()), TypeError, "logits must be float32, float16, bfloat16, got float64"),
        (dict(logits=[0.0]), TypeError, "logits must be a torch.Tensor, got list"),
        (dict(logits=torch.zeros(())), ValueError, r"logits must be \(..., K\), got a scalar"),
        (dict(logits=torch.zeros(3, 0)), ValueError, r"at least one code, got \(3, 0\)"),
        (dict(temperature="1"), TypeError, "temperature must be a number, got str"),
        (dict(top_k=2.0), TypeError, "top_k must be an integer or None, got float"),
        (dict(top_k=True), TypeError, "top_k must be an integer or None, got bool"),
        (dict(top_p="0.5"), TypeError, "top_p must be a number, got str"),
        (dict(seed=1.0), TypeError, "seed must be an integer, got float"),
        (dict(seed=-1), ValueError, r"seed must be in \[0, 2\^64\), got -1"),
        (dict(offset=-1), ValueError, r"offset must be in \[0, 2\^63\), got -1"),
        (dict(offset=2**63 - 1), ValueError, r"offset \+ rows below 2\^63"),
        (dict(offset=0.0), TypeError, "offset must be an integer, got float"),
        (dict(stream=-1), ValueError, r"stream must be in \[0, 2\^32\), got -1"),
        (
            dict(stream=2**32 - 1, logits=torch.zeros(2, 2), streams=2),
            ValueError,
            r"stream \+ streams must be <= 2\^32",
        ),
        (dict(streams=1.0), TypeError, "streams must be an integer, got float"),
        (dict(stream=torch.tensor(1.0)), TypeError, "stream must be int64, got float32"),
        (dict(stream=torch.tensor([1, 2])), ValueError, r"stream must be one number, got a tensor \(2\)"),
        (dict(offset=torch.tensor([], dtype=torch.int64)), ValueError, "offset must be one number"),
    ],
)
def test_what_the_kernel_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"sample_logits: .*{message}"):
        rqk.sample_logits(**{"logits": torch.zeros(1, 2), "seed": 0, **change})


def test_counters_in_tensors_are_checked_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"stream must be in \[0, 2\^32\), got 4294967296"):
        rqk.sample_logits(torch.zeros(1, 2), seed=0, stream=torch.tensor(2**32))
    with pytest.raises(ValueError, match=r"offset must be >= 0.*got -1"):
        rqk.sample_logits(torch.zeros(1, 2), seed=0, offset=torch.tensor(-1))


@pytest.mark.gpu
def test_counters_on_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="logits and stream must be on the same device"):
        rqk.sample_logits(torch.zeros(1, 2, device="cuda"), seed=0, stream=torch.tensor(0))


def test_not_differentiable_and_blind_to_autocast(device: torch.device) -> None:
    logits = torch.randn(20, 50, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        codes = rqk.sample_logits(logits, top_k=9, seed=3)
    assert not codes.requires_grad
    assert torch.equal(codes, rqk.reference.sample_logits(logits, top_k=9, seed=3))


def test_opcheck(device: torch.device) -> None:
    op = torch.ops.rqkernels.sample_logits.default
    logits, counter = torch.randn(3, 7, 30, device=device), torch.tensor(3, device=device)
    torch.library.opcheck(op, (logits, 1.0, None, None, 5, 0, 2))
    torch.library.opcheck(op, (logits.half(), 0.5, 9, 0.9, -1, 0, 0, counter, counter))
    torch.library.opcheck(op, (logits[:0], 0.0, None, 0.5, 5, 7, 0, None, counter, 7))


def test_compiles_as_one_graph_for_all_counters(device: torch.device) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def draw(x: Tensor, seed: int, offset: int, stream: Tensor) -> Tensor:
        return rqk.sample_logits(x * 2, seed=seed, offset=offset, stream=stream, top_k=20, top_p=0.9) + 1

    logits = torch.randn(50, 80, device=device)
    torch.compiler.reset()
    compiled = torch.compile(draw, fullgraph=True, backend=count)
    for step in range(12):  # more than Dynamo would recompile
        given = (logits, 3 + step, 50 * step, torch.tensor(step, device=device))
        assert torch.equal(compiled(*given), draw(*given))
    assert graphs <= 4
    torch.compiler.reset()
