"""Sampling by CUDA graphs: on the CPU with a stand-in for them, and on a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rqkernels
from rqgen.inference import LevelParams, cuda_graph
from rqgen.inference.cuda_graph import CapturedSampler
from rqgen.models import RQTransformer

K, DEPTH, CLASSES = 11, 3, 5
PARAMS = LevelParams(temperature=(1.0, 0.5, 1.0), top_k=(None, 5, None), top_p=(None, None, 0.9), seed=13)


def make_prior(side: int = 3) -> RQTransformer:
    prior = tiny.rq_prior(code_shape=(side, side, DEPTH), codebook_size=K, layers=2, num_classes=CLASSES)
    return tiny.resample_weights(prior, std=0.3)  # the codes before must matter


def draw(
    sampler: CapturedSampler,
    first_label: int = 0,
    known: int = 0,
    offset: int = 0,
    guidance: float = 0.0,
    **params: Any,
) -> Tensor:
    """Codes (4, T, D) of four images."""
    device = sampler.prior.device
    labels = (torch.arange(4) + first_label) % CLASSES
    known_btd = (torch.arange(4 * known * DEPTH).view(4, known, DEPTH) % K).to(device)
    params = replace(PARAMS, cfg_scale=(guidance,) * DEPTH if guidance else (), **params)
    sampled = sampler.sample(labels[:, None].to(device), params, first_image=offset, known=known_btd.flatten(1))
    return sampled.codes.flatten(1, 2)


# --- on the CPU


class StandIn:
    """A CUDA graph as far as its rules can be seen on a CPU: in a capture nothing changes and nobody looks at a number
    on the device; a replay repeats the same calls, with the numbers of then and the tensors' contents of now."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def pool(self) -> object:
        return self.calls

    def replay(self) -> None:
        for function, args, kwargs, before in self.calls:
            after = function(*args, **kwargs)
            if not any(result.alias_info for result in function._schema.returns):
                for old, new in zip(tensors_of(before), tensors_of(after), strict=True):
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """Appends to a graph what is called."""

    def __init__(self, graph: StandIn) -> None:
        super().__init__()
        self.graph, self.written = graph, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema, kwargs = function._schema, kwargs or {}
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh")
        assert schema.name.split("::")[1] not in waits, f"{schema.name} in a capture"
        for argument, value in zip(schema.arguments, (*args, *kwargs.values()), strict=False):
            value = kwargs.get(argument.name, value)
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written.append((value, value.clone()))
        result = function(*args, **kwargs)
        self.graph.calls.append((function, args, kwargs, result))
        return result


def tensors_of(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for r in results or () for t in tensors_of(r)]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Arguments that each capture was begun with."""
    begun: list[dict[str, Any]] = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.waited: list[Any] = []

        def wait_stream(self, other: Any) -> None:
            self.waited.append(other)

    @contextlib.contextmanager
    def graph(into: StandIn, **settings: Any) -> Iterator[None]:
        begun.append(settings)
        with Capture(into) as capture:
            yield
        for tensor, content in reversed(capture.written):
            tensor.copy_(content)

    current = Stream()
    for name, value in {
        "Stream": Stream,
        "CUDAGraph": StandIn,
        "graph": graph,
        "current_stream": lambda: current,
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_graph, "BUCKET", 3)
    cuda_graph._capture_stream.cache_clear()
    yield begun
    cuda_graph._capture_stream.cache_clear()


@pytest.mark.parametrize("settings", [{}, {"guidance": 1.5}, {"known": 1}], ids=str)
def test_replayed_positions_are_those_that_are_launched(captures: list[Any], settings: dict[str, Any]) -> None:
    prior = make_prior()
    replaying, launching = CapturedSampler(prior, capture=True), CapturedSampler(prior, capture=False)
    for call in ({"offset": 7}, {"offset": 40, "first_label": 2}):
        expected = draw(launching, **settings, **call)
        assert torch.equal(draw(replaying, **settings, **call), expected)
    # Nine positions: what comes after the first has up to nine tokens before it, in graphs for 3, 6 and 9 of them. The
    # second call needed none of its own.
    assert len(captures) == 3
    first, *others = captures
    assert first["pool"] is None and all(other["pool"] is not None for other in others)
    assert {id(other["stream"]) for other in others} == {id(first["stream"])}
    assert {capture["capture_error_mode"] for capture in captures} == {"thread_local"}
    assert torch.cuda.current_stream().waited == [first["stream"]] * 3


def test_other_weights_are_seen_behind_a_capture(captures: list[Any]) -> None:
    """Weights written to the captured memory, and other memory in its place."""
    prior = make_prior()
    sampler = CapturedSampler(prior, capture=True)
    drawn = [draw(sampler)]
    block = prior.spatial_transformer.blocks[1]

    def to_other_memory() -> None:
        block.mlp[0].weight = torch.nn.Parameter(torch.randn_like(block.mlp[0].weight))

    for change, captured_anew in (
        (lambda: block.mlp[2].weight.data.copy_(torch.randn_like(block.mlp[2].weight)), False),
        (to_other_memory, True),
        (lambda: prior.load_state_dict(make_prior().state_dict(), assign=True), True),
    ):
        before = len(captures)
        change()
        drawn.append(draw(sampler))
        assert torch.equal(drawn[-1], draw(CapturedSampler(prior, capture=False)))
        assert not torch.equal(drawn[-1], drawn[-2]) and (len(captures) > before) == captured_anew


def test_the_modules_of_a_prior_are_called() -> None:
    """At every position: whatever stands in for attention and blocks, and hooks on them."""
    prior, called = make_prior(), []
    for name, module in prior.named_modules():
        if name.startswith("spatial_transformer") and not isinstance(module, (torch.nn.ModuleList, torch.nn.Dropout)):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    draw(CapturedSampler(prior, capture=False))
    names = {name for name, module in prior.named_modules() if module._forward_hooks}
    assert set(called) == names and all(called.count(name) == prior.positions for name in names)


def test_a_look_at_the_device_is_found_in_a_capture(captures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sample = rqkernels.sample_logits
    monkeypatch.setattr(
        rqkernels, "sample_logits", lambda logits, **s: sample(logits, **{**s, "stream": int(s["stream"])})
    )
    with pytest.raises(AssertionError, match="_local_scalar_dense in a capture"):
        draw(CapturedSampler(make_prior(), capture=True))


def test_logits_without_a_distribution_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the code is -1, and must not be looked up."""
    sample, calls = rqkernels.sample_logits, []

    def fail_once(logits: Tensor, **settings: Any) -> Tensor:
        calls.append(1)
        codes = sample(logits, **settings)
        codes[2:] = -1 if len(calls) == 5 else codes[2:]
        return codes

    monkeypatch.setattr(rqkernels, "sample_logits", fail_once)
    sampler = CapturedSampler(make_prior(), capture=False)
    with pytest.raises(ValueError, match="prior: the logits of image 102 have NaN"):
        draw(sampler, offset=100)
    assert draw(sampler, offset=100).min() >= 0  # the next call starts again


def test_keys_that_are_not_numbers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weight NaN is NaN still."""
    sample = rqkernels.sample_logits

    def as_on_a_gpu(logits: Tensor, **settings: Any) -> Tensor:
        bad = logits.isnan().any(dim=-1)
        return torch.where(bad, -1, sample(logits.nan_to_num(), **settings))

    monkeypatch.setattr(rqkernels, "sample_logits", as_on_a_gpu)
    prior = make_prior()
    sampler, weights = CapturedSampler(prior, capture=False), prior.condition_embedding.weight
    good = weights.detach().clone()
    weights.data[1] = torch.nan
    with pytest.raises(ValueError, match="prior: the logits of image 1 have NaN"):
        draw(sampler)
    weights.data.copy_(good)
    assert torch.equal(draw(sampler), draw(CapturedSampler(prior, capture=False)))


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_graphs_are_replayed_for_other_images(dtype: torch.dtype, guidance: float) -> None:
    prior = make_prior(side=6).to("cuda", dtype)  # three graphs
    replaying, launching = CapturedSampler(prior, capture=True), CapturedSampler(prior, capture=False)
    for call in ({"offset": 7}, {"offset": 40, "first_label": 2}, {"offset": 7}):
        assert torch.equal(draw(replaying, guidance=guidance, **call), draw(launching, guidance=guidance, **call))


@pytest.mark.gpu
def test_graphs_draw_on_the_current_stream() -> None:
    prior = make_prior(side=5).cuda()
    expected = draw(CapturedSampler(prior, capture=False))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sampler = CapturedSampler(prior, capture=True)
        torch.cuda._sleep(50_000_000)
        codes = draw(sampler)
        assert torch.cuda.current_stream() == side
        again = draw(sampler)
    side.synchronize()
    assert torch.equal(codes, expected) and torch.equal(again, expected)


@pytest.mark.gpu
def test_other_threads_may_use_the_device_during_a_capture() -> None:
    prior = make_prior(side=6).cuda()
    expected = draw(CapturedSampler(prior, capture=False))
    over, failures, drawn = threading.Event(), [], []

    def meddle() -> None:
        try:
            while not over.is_set():
                host = torch.empty(1 << 20).pin_memory()  # memory, copies and questions to events
                event = torch.cuda.Event()
                host.to("cuda", non_blocking=True).sum()
                event.record()
                event.query()
        except Exception as error:
            failures.append(error)

    def sample() -> None:
        try:
            drawn.extend(draw(CapturedSampler(prior, capture=True)) for _ in range(3))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=meddle), *(threading.Thread(target=sample) for _ in range(2))]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    over.set()
    threads[0].join()
    assert not failures
    assert len(drawn) == 6 and all(torch.equal(codes, expected) for codes in drawn)


@pytest.mark.gpu
def test_graphs_leave_with_their_sampler() -> None:
    prior = make_prior(side=6).cuda()
    expected = draw(CapturedSampler(prior, capture=False))
    left = []
    for _ in range(3):
        sampler = CapturedSampler(prior, capture=True)
        codes = draw(sampler)
        draw(sampler, seed=1)  # the graphs of the first call go, perhaps while the device still works
        del sampler
        assert torch.equal(codes, expected)
        del codes
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        left.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert left[1:] == left[:1] * 2  # what cuBLAS keeps for the stream of captures, once


@pytest.mark.gpu
def test_logits_without_a_distribution_leave_the_device_usable() -> None:
    prior = make_prior().cuda()
    prior.spatial_positions.data[4] = torch.nan
    with pytest.raises(ValueError, match="prior: the logits of image 3 have NaN"):
        draw(CapturedSampler(prior, capture=True), offset=3)
    torch.cuda.synchronize()
    assert torch.ones(3, device="cuda").sum() == 3
