from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import rqkernels
from rqgen.config import from_dict, to_dict
from rqgen.quantizers import QuantizerConfig, ResidualQuantizer, residual

LAYOUTS = [
    pytest.param({"depth": 1}, id="vq"),
    pytest.param({"depth": 3}, id="shared"),
    pytest.param({"depth": 3, "shared_codebook": False}, id="separate"),
]
MODES = ["after_all_depths", "per_depth"]


def make(code_dim: int = 4, **settings: Any) -> ResidualQuantizer:
    settings = {"codebook_size": 16, "depth": 3, "restart_dead_codes": False, **settings}
    return ResidualQuantizer(QuantizerConfig(**settings), code_dim)


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def naive_partial_sums(z: Tensor, quantizer: ResidualQuantizer) -> list[Tensor]:
    """Z^(1)..Z^(D) by full distance matrices in float64."""
    total, sums = torch.zeros_like(z), []
    for d in range(quantizer.config.depth):
        book = quantizer.codebook if quantizer.codebook.ndim == 2 else quantizer.codebook[d]
        nearest = torch.cdist((z - total).detach().double(), book.double()).argmin(dim=-1)
        total = total + book[nearest]
        sums.append(total)
    return sums


# --- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codebook_size", 0),
        ("depth", 0),
        ("usage_window", 0),
        ("kmeans_iterations", 0),
        ("decay", 1.5),
        ("decay", -0.1),
        ("epsilon", -1.0),
        ("epsilon", float("inf")),
        ("dead_code_threshold", float("nan")),
        ("dead_code_threshold", float("inf")),
        ("unused", "forget"),
        ("ema_update", "sometimes"),
        ("init", "guess"),
    ],
)
def test_wrong_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: .*{value}"):
        QuantizerConfig(**{name: value})


def test_wrong_code_dim() -> None:
    with pytest.raises(ValueError, match="code_dim"):
        ResidualQuantizer(QuantizerConfig(), 0)


# --- codes, values, gradients


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_naive_definition(layout: dict[str, Any], device: torch.device) -> None:
    quantizer = make(**layout).to(device).eval()
    z = torch.randn(2, 5, 4, device=device, requires_grad=True)
    sums = naive_partial_sums(z, quantizer)
    output = quantizer(z)
    torch.testing.assert_close(output.quantized, sums[-1])
    expected = torch.stack([(z - partial.detach()).square().mean() for partial in sums]).mean()
    torch.testing.assert_close(output.commitment_loss, expected)
    (gradient,) = torch.autograd.grad(output.commitment_loss, z)
    (expected_gradient,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("mode", MODES)
def test_commitment_gradient_in_training_too(mode: str) -> None:
    quantizer = make(init="random", ema_update=mode, shared_codebook=False)
    z = torch.randn(20, 4, requires_grad=True)
    expected = torch.stack([(z - s.detach()).square().mean() for s in naive_partial_sums(z, quantizer)]).mean()
    (expected_gradient,) = torch.autograd.grad(expected, z)
    loss = quantizer(z).commitment_loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected_gradient)


@pytest.mark.parametrize("kind", ["commitment", "straight-through"])
def test_derivatives_of_every_kind_and_order(kind: str) -> None:
    """With fixed codes, |z - Z^(d)|^2 is curved in z, and forward mode asks for no gradient beforehand."""
    quantizer, z, along = make().eval(), torch.randn(6, 4), torch.randn(6, 4)
    sums = naive_partial_sums(z, quantizer)

    def ours(z: Tensor) -> Tensor:
        output = quantizer(z)
        return output.commitment_loss.sin() if kind == "commitment" else output.quantized.pow(3).sum()

    def expected(z: Tensor) -> Tensor:
        if kind == "commitment":
            return torch.stack([(z - s).square().mean() for s in sums]).mean().sin()
        return (sums[-1] + z - z.detach()).pow(3).sum()

    def second_by_graph(function: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.autograd.grad((gradient * along).sum(), leaf)[0]

    def tangent(function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(z, along))).tangent

    for derivative in (
        second_by_graph,
        tangent,
        lambda function: torch.func.grad(function)(z),
        lambda function: torch.func.jvp(function, (z,), (along,))[1],
        lambda function: torch.func.hessian(function)(z),
    ):
        true = derivative(expected)
        assert true.abs().max() > 1e-3
        torch.testing.assert_close(derivative(ours), true)


def test_straight_through_gradient_is_the_identity() -> None:
    quantizer = make().eval()
    z = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(6, 4)
    (gradient,) = torch.autograd.grad((quantizer(z).quantized * weight).sum(), z)
    assert torch.equal(gradient, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_vectors_round_trip_exactly(layout: dict[str, Any]) -> None:
    quantizer = make(**layout).eval()
    z = torch.randn(2, 3, 5, 4)
    output = quantizer(z)
    codes = quantizer.encode(z)
    depth = quantizer.config.depth
    assert codes.shape == (2, 3, 5, depth)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, output.codes)
    assert torch.equal(quantizer.decode(codes), output.quantized)
    assert torch.equal(quantizer.decode(codes, depth), output.quantized)
    vectors = quantizer.embed(codes)
    assert vectors.shape == (2, 3, 5, depth, 4)
    for d in range(1, depth + 1):
        torch.testing.assert_close(quantizer.decode(codes, d), vectors[..., :d, :].sum(-2))


def test_a_separate_codebook_per_depth_is_used_per_depth() -> None:
    quantizer = make(depth=2, shared_codebook=False)
    codes = torch.tensor([[3, 3]])
    expected = torch.stack([quantizer.codebook[0, 3], quantizer.codebook[1, 3]])
    assert torch.equal(quantizer.embed(codes)[0], expected)


def test_wrong_input_is_named() -> None:
    quantizer = make()
    for call in (quantizer, quantizer.encode, quantizer.initialize):
        with pytest.raises(ValueError, match=r"z: expected \(..., 4\), got shape \(2, 5\)"):
            call(torch.randn(2, 5))
    with pytest.raises(TypeError, match="z: expected a floating-point"):
        quantizer(torch.zeros(2, 4, dtype=torch.int64))
    for call in (quantizer.decode, quantizer.embed):
        with pytest.raises(ValueError, match=r"codes: expected \(..., 3\), got shape \(2, 2\)"):
            call(torch.zeros(2, 2, dtype=torch.int64))
        for bad in (16, -1):
            with pytest.raises(IndexError, match="codes"):
                call(torch.full((2, 3), bad))
    for depth in (0, 4):
        with pytest.raises(ValueError, match=f"depth: .*got {depth}"):
            quantizer.decode(torch.zeros(2, 3, dtype=torch.int64), depth)
    with pytest.raises(ValueError, match=r"found: .*return_statistics"):
        quantizer.update_codebook(rqkernels.residual_search(torch.randn(2, 4), quantizer.codebook, 3))


# --- state


@pytest.mark.parametrize("initialized", [False, True])
def test_eval_mode_and_encoding_change_no_state(initialized: bool) -> None:
    quantizer = make(restart_dead_codes=True)
    if initialized:
        quantizer(torch.randn(64, 4))
    before = state(quantizer)
    quantizer.encode(torch.randn(9, 4))
    quantizer.eval()
    output = quantizer(torch.randn(9, 4, requires_grad=True))
    output.commitment_loss.backward()
    quantizer.encode(torch.randn(9, 4))
    quantizer.decode(output.codes)
    assert_same_state(before, state(quantizer))


def test_one_update_after_all_depths() -> None:
    quantizer = make(init="random", decay=0.9, epsilon=0.01)
    z = torch.randn(50, 4)
    before = state(quantizer)
    found = rqkernels.residual_search(z, before["codebook"], 3, return_residuals=True)
    output = quantizer(z)
    assert torch.equal(output.codes, found.codes)
    counts, sums = torch.zeros(16), torch.zeros(16, 4)
    for vector, code in zip(found.residuals.reshape(-1, 4), found.codes.reshape(-1), strict=True):
        counts[code] += 1
        sums[code] += vector
    ema_count = 0.9 * before["ema_count"] + 0.1 * counts
    ema_sum = 0.9 * before["ema_sum"] + 0.1 * sums
    smoothed = (ema_count + 0.01) * ema_count.sum() / (ema_count.sum() + 16 * 0.01)
    torch.testing.assert_close(quantizer.ema_count, ema_count)
    torch.testing.assert_close(quantizer.ema_sum, ema_sum)
    torch.testing.assert_close(quantizer.codebook, ema_sum / smoothed[:, None])
    assert quantizer.usage.counts().sum() == 150


def test_per_depth_mode_searches_what_the_depth_before_moved() -> None:
    z = torch.randn(50, 4)
    quantizers = [make(init="random", decay=0.5, ema_update=mode) for mode in MODES]
    quantizers[1].load_state_dict(quantizers[0].state_dict())
    codes = [quantizer(z).codes for quantizer in quantizers]
    assert torch.equal(codes[0][:, 0], codes[1][:, 0])
    assert not torch.equal(codes[0], codes[1])


def test_the_modes_agree_where_depths_share_nothing(device: torch.device) -> None:
    z = torch.randn(50, 4, device=device)
    quantizers = [make(init="random", shared_codebook=False, ema_update=m).to(device) for m in MODES]
    quantizers[1].load_state_dict(quantizers[0].state_dict())
    outputs = [quantizer(z) for quantizer in quantizers]
    for left, right in zip(*outputs, strict=True):
        torch.testing.assert_close(left, right)
    for name, tensor in quantizers[0].state_dict().items():
        torch.testing.assert_close(tensor, quantizers[1].state_dict()[name])


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_training_resumes_bit_for_bit(mode: str) -> None:
    batches = [torch.randn(40, 4) for _ in range(6)]
    settings = {"restart_dead_codes": True, "init": "data", "usage_window": 60, "ema_update": mode}

    def run(quantizer: ResidualQuantizer, part: list[Tensor]) -> None:
        for batch in part:
            quantizer(batch)

    whole, first, second = make(**settings), make(**settings), make(**settings)
    first.load_state_dict(whole.state_dict())
    torch.manual_seed(3)
    run(whole, batches)
    torch.manual_seed(3)
    run(first, batches[:3])
    generator = torch.get_rng_state()
    torch.randn(100)
    second.load_state_dict(first.state_dict())
    torch.set_rng_state(generator)
    run(second, batches[3:])
    assert_same_state(state(whole), state(second))


# --- dead codes


def with_dead_codes(**settings: Any) -> ResidualQuantizer:
    """Codes 0..3 where the data is, the others far away with large, long-standing sums."""
    quantizer = make(depth=1, init="random", restart_dead_codes=True, **settings)
    quantizer.codebook.copy_(torch.full((16, 4), 1e6))
    quantizer.codebook[:4] = torch.randn(4, 4)
    quantizer.ema_count.fill_(1.0)
    quantizer.ema_count[:4] = 50.0
    quantizer.ema_sum.copy_(quantizer.codebook * quantizer.ema_count[:, None])
    return quantizer


@pytest.mark.parametrize("mode", MODES)
def test_dead_codes_restart_on_the_batch_with_fresh_averages(mode: str) -> None:
    quantizer = with_dead_codes(ema_update=mode)
    z = torch.randn(400, 4)
    quantizer(z)
    assert torch.equal(quantizer.ema_count[4:], torch.ones(12))
    fresh = quantizer.ema_sum[4:]
    assert (fresh[:, None] == z[None]).all(-1).any(1).all()
    assert fresh.unique(dim=0).shape[0] == 12
    torch.testing.assert_close(quantizer.codebook[4:], fresh, rtol=1e-3, atol=1e-4)
    # Alive codes went on by the ordinary average.
    assert (quantizer.ema_count[:4] > 20).all()
    # The restarted codes are in use at once, and nothing pulls them back.
    quantizer(z)
    assert quantizer.codebook.abs().max() < 10
    quantizer.eval()
    assert quantizer.encode(z).unique().numel() == 16


def test_restarts_can_be_switched_off() -> None:
    quantizer = with_dead_codes()
    quantizer.config = dataclasses.replace(quantizer.config, restart_dead_codes=False)
    quantizer(torch.randn(400, 4))
    torch.testing.assert_close(quantizer.ema_count[4:], torch.full((12,), 0.99))
    assert (quantizer.codebook[4:] > 1e5).all()


def test_restarts_with_a_codebook_per_depth_take_that_depths_residuals() -> None:
    quantizer = make(depth=2, init="random", shared_codebook=False, restart_dead_codes=True)
    z = torch.randn(400, 4)
    quantizer.codebook[:, 1:] = 1e6
    quantizer.codebook[0, 0], quantizer.codebook[1, 0] = 0.5, 0.0
    quantizer.ema_sum.copy_(quantizer.codebook)
    quantizer.ema_count[:, 0] = 50.0
    quantizer(z)
    for d, vectors in enumerate((z, z - 0.5)):
        fresh = quantizer.ema_sum[d, 1:]
        assert (fresh[:, None] == vectors[None]).all(-1).any(1).all()


@pytest.mark.parametrize(("threshold", "vectors", "needed"), [(1.0, 15, 16), (2.5, 39, 40)])
def test_a_threshold_that_no_batch_can_meet_is_told(
    threshold: float, vectors: int, needed: int, recwarn: pytest.WarningsRecorder
) -> None:
    quantizer = make(init="random", restart_dead_codes=True, dead_code_threshold=threshold, depth=1)
    expected = (
        rf"{vectors} vectors per step cannot keep 16 codes at dead_code_threshold={threshold} \(that takes {needed}\)"
    )
    with pytest.warns(UserWarning, match=expected):
        quantizer(torch.randn(vectors, 4))
    recwarn.clear()
    quantizer(torch.randn(needed, 4))
    assert not recwarn.list


class Restarts:
    """Counts how many codes are drawn by restarts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn = 0
        draw = residual.sample_vectors

        def counted(vectors_nc: Tensor, count: int) -> Tensor:
            self.drawn += count
            return draw(vectors_nc, count)

        monkeypatch.setattr(residual, "sample_vectors", counted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_higher_threshold_restarts_few_codes_and_costs_no_error(
    layout: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 vectors for each of 64 codes: thresholds of 2 and 4, usual elsewhere, are far from what codes in use have."""
    errors: dict[float, float] = {}
    for threshold in (0.0, 0.5, 1.0, 2.0, 4.0):
        errors[threshold] = 0.0
        for seed in (0, 1):
            torch.manual_seed(seed)
            quantizer = make(
                8,
                codebook_size=64,
                restart_dead_codes=True,
                dead_code_threshold=threshold,
                decay=0.95,
                ema_update=mode,
                **layout,
            )
            clusters = torch.randn(64, 8)

            def batch(clusters: Tensor = clusters) -> Tensor:
                return clusters[torch.randint(64, (1024,))] + 0.3 * torch.randn(1024, 8)

            quantizer.initialize(batch())
            found = []
            with monkeypatch.context() as patch:
                for step in range(60):
                    if step == 30:
                        restarts = Restarts(patch)
                    z = batch()
                    found.append((z - quantizer(z).quantized).square().mean().item())
            assert restarts.drawn <= 30 * quantizer.config.depth  # of 64 in each of 30 steps and each update
            assert sum(found[-10:]) < sum(found[:10])
            errors[threshold] += sum(found[-10:])
    for threshold, error in errors.items():
        assert error < 1.1 * errors[0.0], (threshold, errors)


@pytest.mark.parametrize("threshold", [0.25, 1, 2, 7.5])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("mode", MODES)
def test_a_restarted_code_is_the_vector_and_as_alive_as_the_threshold_asks(
    mode: str, epsilon: float, threshold: float
) -> None:
    quantizer = make(
        depth=1,
        init="random",
        restart_dead_codes=True,
        dead_code_threshold=threshold,
        epsilon=epsilon,
        ema_update=mode,
    )
    quantizer.codebook[4:] = 1e6
    quantizer.ema_count[:4], quantizer.ema_count[4:] = 50.0, 0.5 * threshold
    quantizer.ema_sum.copy_(quantizer.codebook * quantizer.ema_count[:, None])
    before, z = quantizer.codebook.clone(), torch.randn(400, 4)
    quantizer(z)
    fresh = quantizer.codebook[4:]
    assert (fresh[:, None] == z[None]).all(-1).any(1).all()  # whatever smoothing makes of other codes
    count = max(1.0, threshold)
    assert torch.equal(quantizer.ema_count[4:], torch.full((12,), count))
    assert torch.equal(quantizer.ema_sum[4:], fresh * count)
    assert (quantizer.ema_count[:4] > 20).all() and (before[:4] - quantizer.codebook[:4]).abs().max() < 1


@pytest.mark.parametrize("init", ["data", "kmeans", "random"])
@pytest.mark.parametrize(("restarts", "threshold", "count"), [(True, 3, 3.0), (True, 0.5, 1.0), (False, 3, 1.0)])
def test_first_counts(init: str, restarts: bool, threshold: float, count: float) -> None:
    quantizer = make(init=init, restart_dead_codes=restarts, dead_code_threshold=threshold, shared_codebook=False)
    if init != "random":
        quantizer.initialize(torch.randn(100, 4))
    assert torch.equal(quantizer.ema_count, torch.full((3, 16), count))
    assert torch.equal(quantizer.ema_sum, quantizer.codebook * count)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("threshold", [1.0, 3.0, 7.0])
def test_codes_at_the_threshold_are_not_dead(threshold: float, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by rounding either: 0.9 * 3 + 0.1 * 3 is less than 3 in float32."""
    quantizer = make(depth=1, init="random", restart_dead_codes=True, dead_code_threshold=threshold, decay=decay)
    z = quantizer.codebook.repeat(int(threshold), 1)
    restarts = Restarts(monkeypatch)
    for _ in range(50):
        quantizer(z)
    assert restarts.drawn == 0


@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unused_code(layout: dict[str, Any], mode: str, epsilon: float) -> None:
    """Shrinks towards zero by the paper's formula, or stays where it is until it is used again."""
    quantizers = {
        unused: make(init="random", unused=unused, decay=0.5, epsilon=epsilon, ema_update=mode, **layout)
        for unused in ("shrink", "keep")
    }
    z = torch.randn(200, 4)
    for quantizer in quantizers.values():
        quantizer.codebook[..., 8:, :] = 100.0 + torch.arange(8.0)[:, None]
        quantizer.ema_sum.copy_(quantizer.codebook)
    start = quantizers["keep"].codebook.clone()
    for _ in range(200):  # the averaged counts are zero by then
        for quantizer in quantizers.values():
            quantizer(z)
    kept, shrunk = (quantizers[unused].codebook[..., 8:, :] for unused in ("keep", "shrink"))
    assert torch.equal(kept, start[..., 8:, :])
    if epsilon:
        assert shrunk.abs().max() < 10
    else:
        torch.testing.assert_close(shrunk, start[..., 8:, :])  # and not 0 / 0
    for quantizer in quantizers.values():
        assert quantizer.codebook.isfinite().all()
    # Used again it moves to its vectors at once.
    quantizer = quantizers["keep"]
    quantizer(torch.full((50, 4), 110.0))
    moved = quantizer.codebook[..., 15, :] if quantizer.codebook.ndim == 2 else quantizer.codebook[0, 15]
    torch.testing.assert_close(moved, torch.full_like(moved, 110.0), rtol=1e-3, atol=0)


def test_a_kept_code_can_die_and_restart() -> None:
    quantizer = make(depth=1, init="random", unused="keep", restart_dead_codes=True, decay=0.9)
    quantizer.codebook[8:] = 100.0 + torch.arange(8.0)[:, None]
    quantizer.ema_count.fill_(2.0)
    quantizer.ema_sum.copy_(2 * quantizer.codebook)
    start = quantizer.codebook.clone()
    for step in range(8):
        quantizer(torch.randn(400, 4))
        far = quantizer.codebook[8:]
        assert torch.equal(far, start[8:]) if step < 6 else far.abs().max() < 10, step  # 2 * 0.9^7 < 1
    assert quantizer.config.unused == "keep"


def test_what_was_saved_before_there_was_a_choice_loads() -> None:
    settings = to_dict(make().config)
    assert settings.pop("unused") == "shrink"
    assert from_dict(QuantizerConfig, settings, where="config.json") == make().config
    names = ["codebook", "ema_count", "ema_sum", "initialized", "usage.current", "usage.previous", "usage.positions"]
    assert list(make().state_dict()) == names
    assert {tensor.dtype for tensor in make(dead_code_threshold=2).state_dict().values()} == {
        torch.float32,
        torch.bool,
        torch.int64,
    }


# --- initialisation


def test_first_training_batch_initialises_once(device: torch.device) -> None:
    quantizer = make(depth=1).to(device)
    random = quantizer.codebook.clone()
    z = torch.randn(100, 4, device=device) * 100
    quantizer.initialize(z)
    assert quantizer.initialized
    assert (quantizer.codebook[:, None] == z[None]).all(-1).any(1).all()
    assert quantizer.codebook.unique(dim=0).shape[0] == 16
    assert torch.equal(quantizer.ema_sum, quantizer.codebook)
    assert torch.equal(quantizer.ema_count, torch.ones(16, device=device))

    by_forward = make(depth=1).to(device)
    by_forward.codebook.copy_(random)
    by_forward(z)
    assert by_forward.initialized
    assert by_forward.codebook.abs().mean() > 20
    moved = by_forward.codebook.clone()
    by_forward(torch.randn(100, 4, device=device))
    # A second initialisation would have replaced these large codes by small ones.
    assert by_forward.codebook.abs().mean() > 0.5 * moved.abs().mean()
    # One by hand does, and the counts of the codes before it go.
    by_forward.initialize(torch.randn(100, 4, device=device))
    assert by_forward.codebook.abs().mean() < 2
    assert by_forward.usage.counts().sum() == 0


def test_random_initialisation_ignores_the_data() -> None:
    quantizer = make(init="random", decay=1.0)
    before = quantizer.codebook.clone()
    quantizer(torch.randn(100, 4) * 100)
    torch.testing.assert_close(quantizer.codebook, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_codes_for_later_depths_come_from_their_residuals(shared: bool) -> None:
    quantizer = make(depth=2, shared_codebook=shared, codebook_size=64)
    # Clusters far apart: the first depth's codes are large, the residuals small.
    z = torch.randn(8, 1, 4) * 1000 + torch.randn(8, 50, 4)
    quantizer.initialize(z)
    first, second = (quantizer.codebook[:32], quantizer.codebook[32:]) if shared else tuple(quantizer.codebook)
    assert (first.norm(dim=1) > 100).all()
    assert (second.norm(dim=1) < 10).all()
    errors = rqkernels.residual_search(z, quantizer.codebook, 2).residual_sq_norms.mean(dim=(0, 1))
    assert errors[1] < 0.7 * errors[0]


def test_kmeans_initialisation_really_clusters() -> None:
    clusters = torch.randn(16, 4) * 100
    z = clusters.repeat_interleave(200, 0) + 0.01 * torch.randn(3200, 4)
    losses = {}
    for init in ("random", "data", "kmeans"):
        torch.manual_seed(0)
        losses[init] = make(depth=1, init=init, kmeans_iterations=30)(z).commitment_loss.item()
    assert losses["kmeans"] < 0.6 * losses["data"]
    assert losses["data"] < losses["random"]


def test_fewer_vectors_than_codes() -> None:
    quantizer = make(depth=2)
    quantizer(torch.randn(5, 4))
    assert quantizer.codebook.unique(dim=0).shape[0] == 16


def test_initialisation_needs_finite_vectors() -> None:
    quantizer = make()
    with pytest.raises(ValueError, match="finite vector"):
        quantizer(torch.full((5, 4), torch.nan))
    assert not quantizer.initialized


# --- precision


def test_non_finite_vectors_leave_the_codebook_alone() -> None:
    settings = {"init": "random", "restart_dead_codes": True, "dead_code_threshold": 1.5}
    quantizer = make(**settings)
    z = torch.randn(200, 4)
    z[::2] = torch.nan
    z[1, 2] = torch.inf
    output = quantizer(z)
    assert (output.codes[::2] == -1).all()
    assert (output.codes[1] == -1).all()
    assert output.quantized[::2].isnan().all()
    assert (output.codes[3::2] >= 0).all()
    for name, tensor in quantizer.state_dict().items():
        assert tensor.isfinite().all(), name
    assert quantizer.usage.counts().sum() == 99 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codebooks_stay_float32_when_the_model_is_cast(dtype: torch.dtype) -> None:
    quantizer = make()
    quantizer(torch.randn(100, 4))
    before = state(quantizer)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), quantizer).to(dtype)
    assert model[0].weight.dtype == dtype
    assert_same_state(before, state(quantizer))
    output = quantizer.eval()(torch.randn(3, 4, dtype=dtype))
    assert output.quantized.dtype == dtype
    assert output.commitment_loss.dtype == torch.float32


def test_autocast_touches_neither_codes_nor_codebooks(device: torch.device) -> None:
    z = torch.randn(100, 4, device=device, requires_grad=True)
    quantizers = [make().to(device) for _ in range(2)]
    quantizers[1].load_state_dict(quantizers[0].state_dict())
    torch.manual_seed(0)
    plain = quantizers[0](z)
    torch.manual_seed(0)
    with torch.autocast(device.type, torch.bfloat16):
        cast = quantizers[1](z)
    assert_same_state(state(quantizers[0]), state(quantizers[1]))
    for left, right in zip(plain, cast, strict=True):
        assert torch.equal(left, right)
        assert left.dtype == right.dtype


def test_bfloat16_latents_are_searched_as_the_float32_they_are() -> None:
    quantizer = make().eval()
    z = torch.randn(300, 4).bfloat16()
    assert torch.equal(quantizer.encode(z), quantizer.encode(z.float()))
    assert quantizer(z).quantized.dtype == torch.bfloat16


@pytest.mark.parametrize("shared", [True, False])
def test_training_fits_the_data(shared: bool) -> None:
    """Vector quantization (D = 1) learns 16 clusters; three depths explain what it leaves."""
    clusters = torch.randn(16, 4)
    errors = {}
    for depth in (1, 3):
        settings = {"depth": depth, "shared_codebook": shared, "decay": 0.9, "codebook_size": 32}
        quantizer = make(**settings, restart_dead_codes=True)
        for _ in range(60):
            z = clusters[torch.randint(16, (512,))] + 0.05 * torch.randn(512, 4)
            output = quantizer(z)
        assert (quantizer.usage.codes_used() >= 16).all()
        errors[depth] = (z - output.quantized).square().mean().item()
    assert errors[1] < 0.05 * clusters.var().item()
    assert errors[3] < errors[1]


# --- memory


class LargestTensor(TorchDispatchMode):
    """Watches the storage behind every tensor that an operation returns (a broadcast view has little)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def largest_of_training_steps(quantizer: ResidualQuantizer, rows: int) -> int:
    z = torch.randn(rows, quantizer.code_dim, requires_grad=True)
    with LargestTensor() as watch:
        for _ in range(2):  # the first one initialises
            output = quantizer(z)
            (output.quantized.sum() + output.commitment_loss).backward()
    return watch.elements


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_training_never_allocates_rows_times_codes(shared: bool, mode: str) -> None:
    quantizer = make(8, codebook_size=4096, depth=2, shared_codebook=shared, ema_update=mode)
    quantizer.config.restart_dead_codes = True
    quantizer.config.dead_code_threshold = 0.5
    largest = largest_of_training_steps(quantizer, 4096)
    # Far below N*K = 2^24: nothing exceeds the vectors of all depths and the codebooks themselves.
    assert largest <= 2 * 4096 * 2 * 8


def test_kmeans_initialisation_never_allocates_rows_times_codes() -> None:
    quantizer = make(8, codebook_size=4096, depth=1, init="kmeans", kmeans_iterations=2)
    assert largest_of_training_steps(quantizer, 4096) <= 2 * 4096 * 8


def test_the_watch_sees_a_distance_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same watch over a search by full distances: it must notice."""
    search = rqkernels.residual_search

    def by_distances(x: Tensor, codebook: Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.cdist(x, codebook).argmin(dim=-1)
        return search(x, codebook, *args, **kwargs)

    monkeypatch.setattr(rqkernels, "residual_search", by_distances)
    quantizer = make(8, codebook_size=1024, depth=1, init="random")
    assert largest_of_training_steps(quantizer, 1024) >= 1024 * 1024


def test_packed_where_that_is_repaid_and_the_same_codes() -> None:
    quantizer = make(32, codebook_size=256, depth=3)
    z = torch.randn(300, 32)
    assert quantizer.pack_codebook(1023) is None  # 8 * 256 scans to be saved, two for each vector
    packed = quantizer.pack_codebook(1024)
    if rqkernels.info()["cpu_capability"] == "avx512":
        assert packed is not None and packed.has_gram
        assert torch.equal(quantizer.encode(z, packed), quantizer.encode(z))
        # As it was: what the codebook has become since is not searched.
        codes = quantizer.encode(z)
        quantizer.codebook.neg_()
        assert torch.equal(quantizer.encode(z, packed), codes) and not torch.equal(quantizer.encode(z), codes)
    else:
        assert packed is None
    for other in (make(32, codebook_size=256, depth=1), make(32, codebook_size=256, shared_codebook=False), make(31)):
        assert other.pack_codebook(10**9) is None


def test_a_parametrized_codebook_is_searched_and_not_trained() -> None:
    """Averages would be written to a value that is computed anew at every look."""

    class Half(torch.nn.Module):
        def forward(self, codebook: Tensor) -> Tensor:
            return 0.5 * codebook

    quantizer = ResidualQuantizer(QuantizerConfig(codebook_size=16, depth=2, init="random"), 4).eval()
    expected, z = copy.deepcopy(quantizer), torch.randn(20, 4)
    expected.codebook.mul_(0.5)
    torch.nn.utils.parametrize.register_parametrization(quantizer, "codebook", Half())
    codes = quantizer.encode(z)
    assert torch.equal(codes, expected.encode(z))
    assert torch.equal(quantizer.decode(codes), expected.decode(codes))
    assert torch.equal(quantizer.to(torch.float32)(z).quantized, expected(z).quantized)
    with pytest.raises(
        ValueError, match="quantizer: its codebook is parametrized, and moving averages cannot be written"
    ):
        quantizer.train()(z)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dead_code_threshold": 1e300}, ValueError, "dead_code_threshold: expected a finite number of at most 3.4e"),
        ({"dead_code_threshold": 1e10}, ValueError, "dead_code_threshold: expected at most 1000000000.0"),
        ({"epsilon": -1.0}, ValueError, "epsilon: expected at least 0.0, got -1.0"),
        ({"usage_window": 2**70}, ValueError, "usage_window: expected an integer"),
        ({"depth": "3"}, TypeError, "depth: expected an integer, got '3'"),
        ({"decay": None}, TypeError, "decay: expected a finite number, got None"),
    ],
)
def test_settings_that_no_arithmetic_holds_are_named(settings, error, message) -> None:
    with pytest.raises(error) as caught:
        QuantizerConfig(**settings)
    assert str(caught.value).startswith(message)
