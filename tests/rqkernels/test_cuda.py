"""Streams, devices and CUDA graphs: what every operator owes on a GPU. Results are the CPU's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

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


Call = Callable[[Tensor, Tensor, Tensor], list[Tensor]]
CALLS = pytest.mark.parametrize("call", [_search, _search_by_depth, _decode, _statistics, _sample])


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
        assert torch.allclose(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


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
