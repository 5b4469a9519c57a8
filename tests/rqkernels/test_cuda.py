"""Streams, devices and CUDA graphs: what every operator owes on a GPU. Results are the CPU's, bit for bit where
they are exact."""

from __future__ import annotations

import pytest
import torch
from op_calls import OPS, Call, calls_of
from op_calls.depth_decode import CAPTURED, decoder
from torch import Tensor

import rqkernels as rqk

pytestmark = pytest.mark.gpu

CALLS = pytest.mark.parametrize(
    "call",
    [pytest.param(call, id=f"{op}, {call.where}") for op in OPS for call in calls_of(op).RAGGED if call.captured],
)


def assert_those_of_the_cpu(call: Call, ours: list[Tensor], given: list[Tensor]) -> None:
    call.check(ours, call.run(*given))


@CALLS
def test_a_captured_call_replays_on_new_inputs(call: Call) -> None:
    static = [tensor.cuda() for tensor in call.draw(0)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.run(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run(*static)
    for seed in (1, 2):
        for old, new in zip(static, call.draw(seed), strict=True):
            old.copy_(new)
        for result in results:
            result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_those_of_the_cpu(call, results, call.draw(seed))


@CALLS
def test_launches_go_to_the_current_stream(call: Call) -> None:
    given = call.draw(3)
    # Another stream would read these: codes of no row, and rows of zeros.
    late = [torch.zeros_like(tensor, device="cuda") for tensor in given]
    early = [tensor.cuda() for tensor in given]
    call.run(*late)  # what a first call sets up must not come between
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, early, strict=True):
            target.copy_(source)
        results = call.run(*late)
    side.synchronize()
    assert_those_of_the_cpu(call, results, given)


@CALLS
def test_tensors_of_another_device_than_the_current(call: Call) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    results = call.run(*(tensor.to("cuda:1") for tensor in call.draw(4)))
    assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert_those_of_the_cpu(call, results, call.draw(4))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_captured_position_is_replayed_for_the_next(precision: str, rows: int) -> None:
    """A step of the stack and the codes of the position; one graph serves all positions, only `step` changes."""

    def position(x: Tensor, keys: Tensor, values: Tensor, step: Tensor | None, at: int) -> tuple[Tensor, Tensor]:
        weights = decoder(x.device, precision, CAPTURED)
        y = rqk.transformer_step(x, weights.transformer, keys, values, at, step=step)
        return y, rqk.depth_decode(y, weights, seed=5, top_k=20, stream=at * CAPTURED.depth, step=step)

    positions, (width, _, heads, _, layers, *_) = 5, CAPTURED
    inputs = torch.randn(positions, rows, width, generator=torch.Generator().manual_seed(1))
    shape = (layers, rows, heads, positions, width // heads)
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
