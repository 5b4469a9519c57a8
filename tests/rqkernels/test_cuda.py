"""Streams, devices and CUDA graphs: what every operator owes on a GPU. Results are the CPU's, bit for bit where
they are exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import rqkernels as rqk

pytestmark = pytest.mark.gpu

N, K, C, D = 130, 70, 17, 3


def _search(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    found = rqk.residual_search(x, codebooks[0], D, return_residuals=True, return_statistics=True)
    return [*found[:4], *found.statistics]


def _search_by_depth(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    found = rqk.residual_search(x, codebooks, return_statistics=True)
    return [*found[:3], *found.statistics]


def _decode(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    return [rqk.residual_decode(codes, codebooks, check=False), rqk.residual_decode(codes, codebooks[0], check=False)]


def _statistics(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    return [*rqk.code_statistics(x, codes[:, 0], K), *rqk.code_statistics(x, codes[:, 1], K)]


def _sample(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    logits, counter = x.nan_to_num(), codes[:1, 0].clamp_min(0)
    return [
        rqk.sample_logits(logits, seed=3, offset=counter, stream=counter),
        rqk.sample_logits(codebooks.flatten(1), seed=3, stream=counter, top_k=900, top_p=0.9),
    ]


def _depth_attention(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    """Not the CPU's bits, as of all float32 arithmetic; without a gradient, which a captured graph would not replay."""
    qkv = x[:126, :16].reshape(14, 9, 1, 2, 8).expand(-1, -1, 3, -1, -1)
    return [rqk.depth_attention_packed(qkv), *torch.ops.rqkernels.depth_attention_backward(*[qkv[:, :, 0]] * 4, None)]


@cache
def decoder(device: torch.device, precision: str) -> rqk.PackedDepthDecoder:
    """Packed once: what a captured call reads must be there before."""
    generator = torch.Generator().manual_seed(9)
    width, hidden, heads = C + 3, 40, 2

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device) / shape[-1] ** 0.5

    def block() -> rqk.BlockWeights:
        qkv, out = (tensor(3 * width, width), tensor(3 * width)), (tensor(width, width), tensor(width))
        mlp = tensor(hidden, width), tensor(hidden), tensor(width, hidden), tensor(width)
        return rqk.BlockWeights(tensor(width), tensor(width), *qkv, *out, tensor(width), tensor(width), *mlp)

    stack = rqk.PackedTransformer([block(), block()], heads, precision=precision)
    inputs = tensor(D, width), tensor(K, width)
    norm = {"norm_weight": tensor(width), "norm_bias": tensor(width)}
    return rqk.PackedDepthDecoder(stack, *inputs, **norm, classifier_weight=3 * tensor(K, width))


def contexts(x: Tensor, codebooks: Tensor) -> Tensor:
    return torch.cat([x.nan_to_num(), codebooks[:, :1, 0].T.expand(len(x), 3)], dim=1)


def _codes_of_a_position(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    # Sums of float32 are not the CPU's to the last bit; the largest of K logits are.
    context, settings = contexts(x, codebooks), {"temperature": 0.0, "seed": 0}
    return [
        rqk.depth_decode(context, decoder(x.device, precision), **settings) for precision in ("fp32", "bf16", "int8")
    ]


Call = Callable[[Tensor, Tensor, Tensor], list[Tensor]]
CALLS = pytest.mark.parametrize(
    "call",
    [_search, _search_by_depth, _decode, _statistics, _sample, _depth_attention, _codes_of_a_position],
)


def inputs(seed: int) -> list[Tensor]:
    """Rows, one codebook per depth, codes; a row that is not finite and a code -1 among them."""
    generator = torch.Generator().manual_seed(seed)
    x, codebooks = torch.randn(N, C, generator=generator), torch.randn(D, K, C, generator=generator)
    codes = torch.randint(K, (N, D), generator=generator)
    x[seed % N] = torch.nan
    codes[seed % N] = -1
    return [x, codebooks, codes]


def assert_those_of_the_cpu(call: Call, ours: list[Tensor], given: list[Tensor]) -> None:
    for a, b in zip(ours, call(*given), strict=True):
        tolerance = 1e-5 if call is _depth_attention else 0
        assert torch.allclose(a.cpu(), b, rtol=tolerance, atol=tolerance, equal_nan=True)


@CALLS
def test_a_captured_call_replays_on_new_inputs(call: Call) -> None:
    static = [tensor.cuda() for tensor in inputs(0)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(*static)
    for seed in (1, 2):
        for old, new in zip(static, inputs(seed), strict=True):
            old.copy_(new)
        for result in results:
            result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_those_of_the_cpu(call, results, inputs(seed))


@CALLS
def test_launches_go_to_the_current_stream(call: Call) -> None:
    given = inputs(3)
    # What another stream would read: the codes of nobody, and rows of zeros.
    late = [torch.zeros_like(tensor, device="cuda") for tensor in given]
    early = [tensor.cuda() for tensor in given]
    call(*late)  # what a first call sets up must not come between
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, early, strict=True):
            target.copy_(source)
        results = call(*late)
    side.synchronize()
    assert_those_of_the_cpu(call, results, given)


@CALLS
def test_tensors_of_another_device_than_the_current(call: Call) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    results = call(*(tensor.to("cuda:1") for tensor in inputs(4)))
    assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert_those_of_the_cpu(call, results, inputs(4))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_captured_position_is_replayed_for_the_next(precision: str, rows: int) -> None:
    """A step of the stack and the codes of the position, all positions from one graph: `step` alone changes."""

    def position(x: Tensor, keys: Tensor, values: Tensor, step: Tensor | None, at: int) -> tuple[Tensor, Tensor]:
        weights = decoder(x.device, precision)
        y = rqk.transformer_step(x, weights.transformer, keys, values, at, step=step)
        return y, rqk.depth_decode(y, weights, seed=5, top_k=20, stream=at * D, step=step)

    positions, heads, layers = 5, 2, 2
    inputs = torch.randn(positions, rows, C + 3, generator=torch.Generator().manual_seed(1))
    shape = (layers, rows, heads, positions, (C + 3) // heads)
    x, step = inputs[0].cuda(), torch.zeros(1, dtype=torch.int64, device="cuda")
    caches = torch.zeros(shape, device="cuda"), torch.zeros(shape, device="cuda")
    position(x, *caches, step, 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, codes = position(x, *caches, step, 0)
    on_cpu = torch.zeros(shape), torch.zeros(shape)
    for t in range(positions):
        x.copy_(inputs[t])
        graph.replay()
        step += 1
        expected_y, expected_codes = position(inputs[t], *on_cpu, None, t)
        torch.testing.assert_close(y.cpu(), expected_y, rtol=1e-4, atol=1e-4)
        assert torch.equal(codes.cpu(), expected_codes)
    for ours, expected in zip(caches, on_cpu, strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)
