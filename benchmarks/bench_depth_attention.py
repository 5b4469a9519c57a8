"""Depth attention, forward and both ways, against scaled_dot_product_attention and the plain formulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import _harness
import pytest
import torch
from _harness import QUICK, Contender, Work
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import rqkernels


class Case(NamedTuple):
    """N stacks of D depths with H heads of head_dim, from one projection; with or without the gradient."""

    name: str
    depths: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    both_ways: bool
    stacks_cpu: int
    stacks_cuda: int


def _cases() -> list[Case]:
    if QUICK:
        return [Case(f"tiny{way}", 4, 2, 8, torch.float32, bool(way), 8, 8) for way in ("", "-both-ways")]
    # The 1.4B model has 24 heads. On a GPU several hundred MB, but at most 65535 stacks, the limit of a grid's second
    # and third dimension, which peers use for stacks.
    shapes = [
        ("d4", 4, 8, torch.float32, 2048, 49152),
        ("d4-24-heads", 4, 24, torch.float32, 1024, 16384),
        ("d4-bf16", 4, 8, torch.bfloat16, 2048, 49152),
        ("d8", 8, 8, torch.float32, 1024, 32768),
        ("d8-bf16", 8, 8, torch.bfloat16, 1024, 32768),
        ("d16", 16, 8, torch.float32, 512, 16384),
        ("d16-bf16", 16, 8, torch.bfloat16, 512, 16384),
    ]
    if torch.cuda.is_available():
        shapes += [
            ("d4-24-heads-bf16", 4, 24, torch.bfloat16, 1024, 16384),
            ("d4-fp16", 4, 8, torch.float16, 2048, 49152),
            ("d8-fp16", 8, 8, torch.float16, 1024, 32768),
            ("d16-fp16", 16, 8, torch.float16, 512, 16384),
        ]
        # A run on a card may be cut short: bfloat16, in which a prior computes there, comes first.
        shapes.sort(key=lambda shape: (torch.bfloat16, torch.float32, torch.float16).index(shape[3]))
    return [
        Case(name + way, depths, heads, 64, dtype, bool(way), on_cpu, on_cuda)
        for name, depths, heads, dtype, on_cpu, on_cuda in shapes
        for way in ("", "-both-ways")
    ]


CASES = _cases()


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute scores, mask, softmax, weighted sum."""
    unseen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(unseen, -torch.inf)
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def with_backend(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return attention


def from_packed(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap attention as in a transformer: heads from one projection, concatenated again for the next."""

    def call(qkv: Tensor) -> Tensor:
        return attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)

    return call


BACKENDS = {
    "SDPA (math)": SDPBackend.MATH,
    "SDPA (flash)": SDPBackend.FLASH_ATTENTION,
    "SDPA (memory-efficient)": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA (cuDNN)": SDPBackend.CUDNN_ATTENTION,
}


def attentions_on(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the contenders by name, ours first. Not every backend supports every type; a CPU has torch's choice and
    math only."""
    backends = BACKENDS if device.type == "cuda" else {"SDPA (math)": SDPBackend.MATH}
    found = {
        "rqkernels": lambda qkv: rqkernels.depth_attention_packed(qkv).flatten(2),
        "rqkernels, q k v apart": from_packed(rqkernels.depth_attention),
        "SDPA (torch's choice)": from_packed(sdpa),
        **{name: from_packed(with_backend(backend)) for name, backend in backends.items()},
        "naive, eager": from_packed(naive),
    }
    # On a GPU compiling takes longer than everything else: there only bfloat16 is compiled.
    if not QUICK and (device.type == "cpu" or dtype == torch.bfloat16):
        torch.compiler.reset()
        mode = "max-autotune-no-cudagraphs"
        found["naive, torch.compile"] = torch.compile(from_packed(naive), mode=mode, fullgraph=True, dynamic=False)
    return found


def run_case(case: Case, device: torch.device, benchmark: Any = None) -> dict[str, Any]:
    stacks = case.stacks_cuda if device.type == "cuda" else case.stacks_cpu
    width = case.heads * case.head_dim
    generator = torch.Generator(device).manual_seed(0)
    shape = (stacks, case.depths, 3, case.heads, case.head_dim)
    qkv = torch.randn(shape, generator=generator, device=device).to(case.dtype).requires_grad_(case.both_ways)
    grad = torch.randn(stacks, case.depths, width, generator=generator, device=device).to(case.dtype)

    def caller(attention: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            out = attention(qkv)
            return (out.detach(), *torch.autograd.grad(out, qkv, grad)) if case.both_ways else (out,)

        return call

    n = min(stacks, 64)
    truth = qkv.detach()[:n].double().requires_grad_()
    out = rqkernels.reference.depth_attention_packed(truth).flatten(2)
    true = [out.detach(), *torch.autograd.grad(out, truth, grad[:n].double())]
    # Half types round the result; some implementations also round the probabilities.
    limit = 1e-5 if case.dtype == torch.float32 else 4 * torch.finfo(case.dtype).eps

    def error_of(found: tuple[Tensor, ...]) -> float:
        return max(((a[:n].double() - b).norm() / b.norm()).item() for a, b in zip(found, true, strict=False))

    contenders, without = [], {}
    for name, attention in attentions_on(device, case.dtype).items():
        call = caller(attention)
        if name in BACKENDS:
            try:
                error = error_of(call())
            except RuntimeError as reason:
                without[name] = str(reason).splitlines()[0]
                continue
            if error >= limit:
                without[name] = f"off by {error:.1e}"
                continue
        contenders.append(Contender(name, call, stacks))

    def check(results: Mapping[str, Any]) -> dict[str, float]:
        errors = {name: error_of(found) for name, found in results.items()}
        for name, error in errors.items():
            assert error < limit, f"{name}: off by {error:.1e}"
        return {name: 1.0 - error for name, error in errors.items()}

    element, rows = case.dtype.itemsize, stacks * case.depths * width
    work = Work(
        # q, k, v and the result; both ways also q, k, v and grad again, and three gradients.
        bytes=element * rows * (11 if case.both_ways else 4),
        # Two dot products per query and visible key; five in backward.
        operations=rows * (case.depths + 1) * (7 if case.both_ways else 2),
    )
    described = {"N": stacks, "H": case.heads, "D": case.depths, "head_dim": case.head_dim, "dtype": str(case.dtype)}
    record = _harness.compare(case.name, described, device, contenders, work, check, benchmark)
    best = min((c for c in record["contenders"] if "SDPA" in c["name"]), key=lambda c: c["median_ns"])
    return record | {"best_sdpa": {key: best[key] for key in ("name", "times_ours_per_row")}, "without": without}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_depth_attention(run: _harness.Run, case: Case, benchmark: Any) -> None:
    run.cases.append(run_case(case, run.device, benchmark))


if __name__ == "__main__":
    _harness.main("depth_attention", CASES, run_case)
