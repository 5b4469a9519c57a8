"""Depth attention: the definition, and the kernels against it in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import rqkernels as rqk
from rqkernels import reference

HALVES = [torch.float16, torch.bfloat16]
Attention = Callable[..., Tensor]


def inputs(
    stacks: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v and a gradient of the result."""
    return [torch.randn(stacks, heads, rows, head_dim).to(dtype) for rows in (queries, keys, keys, queries)]


def both_ways(attention: Attention, given: list[Tensor], **options: object) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    leaves = [t.detach().clone().requires_grad_() for t in given[:3]]
    out = attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


def truth(given: list[Tensor], **options: object) -> list[Tensor]:
    return both_ways(reference.depth_attention, [t.double() for t in given], **options)


def pytorch(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def errors(ours: list[Tensor], true: list[Tensor]) -> list[float]:
    """Mean errors: the largest error is that of one row with two equal scores, by chance in either."""
    return [(a.double() - b).abs().mean().item() for a, b in zip(ours, true, strict=True)]


# --- the definition --------------------------------------------------------------------------------------


def test_the_definition_is_causal_attention() -> None:
    q, k, v, _ = (t.double() for t in inputs(2, 3, 5, 5, 4))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(reference.depth_attention(q, k, v), expected)
    prefixed = reference.depth_attention(q[:, :, 3:], k, v, scale=0.3)
    torch.testing.assert_close(prefixed, reference.depth_attention(q, k, v, scale=0.3)[:, :, 3:])
    qkv = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4)
    torch.testing.assert_close(reference.depth_attention_packed(qkv), expected.transpose(1, 2))


def test_the_definition_has_the_right_gradient() -> None:
    leaves = [t.double().requires_grad_() for t in inputs(2, 1, 3, 4, 3)[:3]]
    assert torch.autograd.gradcheck(reference.depth_attention, leaves)


# --- the kernels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacks", [0, 1, 129])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (5, 7), (1, 32), (32, 32)], ids=str)
@pytest.mark.parametrize("head_dim", [1, 17, 64])
def test_equals_the_definition(stacks: int, queries: int, keys: int, head_dim: int, device: torch.device) -> None:
    given = [t.to(device) for t in inputs(min(stacks, 3) if keys == 32 else stacks, 2, queries, keys, head_dim)]
    for ours, true in zip(both_ways(rqk.depth_attention, given), truth(given), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), true, rtol=2e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", [1e-3, 1.0, 5.0])
@pytest.mark.parametrize(("depths", "head_dim"), [(4, 64), (8, 24), (16, 256), (32, 12)])
def test_errors_are_no_larger_than_those_of_pytorch(
    depths: int, head_dim: int, size: float, dtype: torch.dtype, device: torch.device
) -> None:
    given = [(size * t).to(device) for t in inputs(20, 2, depths, depths, head_dim, dtype)]
    true = truth(given)
    ours = errors(both_ways(rqk.depth_attention, given), true)
    theirs = errors(both_ways(pytorch, given), true)
    # A little: half a unit in the last place of float32.
    little = [2.0**-25 * t.abs().mean().item() for t in true]
    assert all(a <= 1.1 * b + c for a, b, c in zip(ours, theirs, little, strict=True)), (ours, theirs)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0, 1e30])
def test_scale(scale: float) -> None:
    given = inputs(3, 2, 4, 6, 8)
    given = [t.round() for t in given]  # scores are exact, and some of them equal
    ours, true = both_ways(rqk.depth_attention, given, scale=scale), truth(given, scale=scale)
    for a, b in zip(ours[:1] if scale > 1e3 else ours, true, strict=False):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_values_at_the_ends_of_float() -> None:
    # Scores of 1e30 leave one key to a query; v passes through with all its digits.
    for size in (1e-38, 1e15):
        q, k, v, grad = inputs(3, 2, 4, 4, 16)
        given = [q * size, k, v * size, grad]
        for a, b in zip(both_ways(rqk.depth_attention, given)[:1], truth(given)[:1], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0 if size > 1 else 1e-44)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("head_dim", [24, 64])
def test_views_give_what_contiguous_tensors_give(dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
    given = [t.to(device) for t in inputs(5, 3, 6, 6, head_dim, dtype)]
    expected = both_ways(rqk.depth_attention, given)
    packed = torch.stack(given[:3]).permute(1, 3, 0, 2, 4).contiguous()
    wide = torch.stack(given, 3)
    ways = {
        "packed": [*packed.permute(2, 0, 3, 1, 4), given[3]],
        "side by side": list(wide.unbind(3)),
        "at an odd place": [F.pad(t, (1, 2))[..., 1:-2] for t in given],
        "channels apart": [t.transpose(2, 3).contiguous().transpose(2, 3) for t in given],
        "reversed": [t.flip(0).flip(0) for t in given],
    }
    for name, views in ways.items():
        leaves = [t.detach().requires_grad_() for t in views[:3]]
        out = rqk.depth_attention(*leaves)
        results = [out, *torch.autograd.grad(out, leaves, views[3])]
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), name
    # A gradient of one number for all.
    leaf = given[0].clone().requires_grad_()
    (summed,) = torch.autograd.grad(rqk.depth_attention(leaf, *given[1:3]).sum(), leaf)
    assert torch.equal(summed, both_ways(rqk.depth_attention, [*given[:3], torch.ones_like(given[3])])[1])


def test_the_result_lies_as_the_next_layer_reads_it() -> None:
    q, k, v, grad = inputs(3, 2, 4, 4, 8)
    leaf = q.clone().requires_grad_()
    out = rqk.depth_attention(leaf, k, v)
    flat = out.transpose(1, 2).reshape(3, 4, 16)
    assert flat.data_ptr() == out.data_ptr() and flat.is_contiguous()
    (grad_q,) = torch.autograd.grad(out, leaf, grad)
    assert grad_q.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_packed(dtype: torch.dtype, device: torch.device) -> None:
    given = [t.to(device) for t in inputs(5, 3, 6, 6, 16, dtype)]
    expected = both_ways(rqk.depth_attention, given, scale=0.3)
    memory = F.pad(torch.stack(given[:3]).permute(1, 3, 0, 2, 4), (3, 1, 0, 2))
    qkv = memory[..., :3, 3:-1].detach().requires_grad_()
    out = rqk.depth_attention_packed(qkv, 0.3)
    assert out.shape == (5, 6, 3, 16) and out.is_contiguous()
    (grad,) = torch.autograd.grad(out, qkv, given[3].transpose(1, 2))
    assert torch.equal(out, expected[0].transpose(1, 2))
    assert grad.is_contiguous()
    for ours, true in zip(grad.permute(2, 0, 3, 1, 4), expected[1:], strict=True):
        assert torch.equal(ours, true)
    assert rqk.depth_attention_packed(torch.zeros(0, 4, 3, 2, 8, device=device)).shape == (0, 4, 2, 8)


def test_what_is_not_finite_stays_with_those_who_see_it(device: torch.device) -> None:
    given = [t.to(device) for t in inputs(2, 3, 6, 7, 24)]
    clean = both_ways(rqk.depth_attention, given)
    q, k, v, _ = given
    k[0, 1, 3, 2], v[0, 2, 5, 0], q[1, 0, 4, 1] = torch.nan, torch.inf, torch.nan
    out, *grads = both_ways(rqk.depth_attention, given)
    hurt = torch.zeros(2, 3, 6, dtype=torch.bool, device=device)  # query i sees keys up to i + 1
    hurt[0, 1, 2:] = hurt[0, 2, 4:] = hurt[1, 0, 4] = True
    assert torch.equal(out.isfinite().all(-1), ~hurt)
    assert torch.equal(out[~hurt], clean[0][~hurt])
    untouched = ~hurt.any(-1)
    for ours, before in zip(grads, clean[1:], strict=True):
        assert torch.equal(ours[untouched], before[untouched])


def test_threads_and_neighbours_change_nothing() -> None:
    for dtype, head_dim in ((torch.float32, 64), (torch.bfloat16, 20)):
        given = inputs(300, 5, 4, 4, head_dim, dtype)
        whole = both_ways(rqk.depth_attention, given)
        threads = torch.get_num_threads()
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                for part in (slice(0, 1), slice(37, 191)):
                    some = both_ways(rqk.depth_attention, [t[part] for t in given])
                    assert all(torch.equal(a, b[part]) for a, b in zip(some, whole, strict=True))
                    few = both_ways(rqk.depth_attention, [t[:, 1:3] for t in given])
                    assert all(torch.equal(a, b[:, 1:3]) for a, b in zip(few, whole, strict=True))
        finally:
            torch.set_num_threads(threads)


# --- wrong arguments -------------------------------------------------------------------------------------

SDPA = "torch.nn.functional.scaled_dot_product_attention"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 8)}, r"q must be \(N, H, D, head_dim\), got \(2, 4, 8\)"),
        ({"v": torch.zeros(2, 3, 4, 8, 1)}, r"v must be \(N, H, D, head_dim\), got"),
        ({"k": torch.zeros(2, 3, 4, 7)}, r"agree in N, H and head_dim, got q \(2, 3, 4, 8\) and k \(2, 3, 4, 7\)"),
        ({"v": torch.zeros(1, 3, 4, 8)}, "agree in N, H and head_dim"),
        ({"k": torch.zeros(2, 2, 4, 8)}, "agree in N, H and head_dim"),
        ({"k": torch.zeros(2, 3, 5, 8)}, r"k and v must have the same number of depths, got k \(2, 3, 5, 8\)"),
        ({"q": torch.zeros(2, 3, 5, 8)}, "k must have at least the depths of q"),
        ({"k": torch.zeros(2, 3, 33, 8), "v": torch.zeros(2, 3, 33, 8)}, f"1 <= D <= 32, got .*33, 8.*{SDPA}"),
        ({"q": torch.zeros(2, 3, 0, 8)}, "1 <= D <= 32, got"),
        ({name: torch.zeros(2, 3, 4, 0) for name in "qkv"}, "1 <= head_dim <= 256, got"),
        ({name: torch.zeros(2, 3, 4, 257) for name in "qkv"}, f"1 <= head_dim <= 256, got .*{SDPA}"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"v": torch.zeros(2, 3, 4, 8).half()}, "v and q must have the same dtype"),
    ],
)
def test_bad_values_are_named(change: dict[str, object], message: str) -> None:
    good = {name: torch.zeros(2, 3, 4, 8) for name in "qkv"}
    with pytest.raises(ValueError, match=f"depth_attention: .*{message}"):
        rqk.depth_attention(**{**good, **change})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 3, 8), r"qkv must be \(N, D, 3, H, head_dim\), got \(2, 4, 3, 8\)"),
        ((2, 4, 2, 3, 8), r"qkv must be \(N, D, 3, H, head_dim\), got"),
        ((2, 33, 3, 2, 8), f"1 <= D <= 32, got .*{SDPA}"),
        ((2, 4, 3, 2, 0), "1 <= head_dim <= 256"),
    ],
)
def test_bad_packed_shapes_are_named(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"depth_attention_packed: .*{message}"):
        rqk.depth_attention_packed(torch.zeros(shape))


def test_bad_types_are_named() -> None:
    q = torch.zeros(2, 3, 4, 8)
    with pytest.raises(TypeError, match="depth_attention: k must be float32, float16, bfloat16, got float64"):
        rqk.depth_attention(q, q.double(), q)
    with pytest.raises(TypeError, match=r"depth_attention: q must be a torch\.Tensor, got list"):
        rqk.depth_attention([1.0], q, q)
    for scale in ("1", True):
        with pytest.raises(TypeError, match="scale must be a number or None"):
            rqk.depth_attention(q, q, q, scale)
    with pytest.raises(TypeError, match="depth_attention_packed: qkv must be float32, float16, bfloat16, got int64"):
        rqk.depth_attention_packed(torch.zeros(2, 4, 3, 2, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="depth_attention_packed: scale must be a number"):
        rqk.depth_attention_packed(torch.zeros(2, 4, 3, 2, 8), "1")


def test_a_gradient_of_another_shape_is_refused() -> None:
    q, qkv = torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3, 3, 8)
    with pytest.raises(ValueError, match=r"grad must have the shape of q, \(2, 3, 4, 8\), got \(2, 4, 3, 8\)"):
        torch.ops.rqkernels.depth_attention_backward(q.transpose(1, 2), q, q, q, None)
    with pytest.raises(ValueError, match=r"grad must be \(N, D, H, head_dim\) as the result of qkv"):
        torch.ops.rqkernels.depth_attention_packed_backward(q, qkv, None)


# --- autograd, torch.compile, autocast -------------------------------------------------------------------


def test_opcheck() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(2, 3, 4, 5, 8)[:3])
    ops = torch.ops.rqkernels
    torch.library.opcheck(ops.depth_attention.default, (q, k, v, None))
    torch.library.opcheck(ops.depth_attention.default, (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), 0.5))
    qkv = torch.randn(2, 4, 3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    torch.library.opcheck(ops.depth_attention_packed.default, (qkv, None))
    plain = [t.detach() for t in (q, q, k, v)]
    torch.library.opcheck(ops.depth_attention_backward.default, (*plain, 0.5))
    torch.library.opcheck(
        ops.depth_attention_packed_backward.default, (torch.randn(2, 4, 2, 8).bfloat16(), qkv.detach(), None)
    )


def test_compiled_in_one_graph() -> None:
    x, weight = torch.randn(6, 4, 16), torch.randn(48, 16, requires_grad=True)

    def packed(w: Tensor) -> Tensor:
        qkv = F.linear(x, w).view(6, 4, 3, 2, 8)
        return rqk.depth_attention_packed(qkv).reshape(6, 4, 16)

    def apart(w: Tensor) -> Tensor:
        q, k, v = F.linear(x, w).view(6, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return rqk.depth_attention(q, k, v).transpose(1, 2).reshape(6, 4, 16)

    for function in (packed, apart):
        expected = function(weight)
        (grad,) = torch.autograd.grad(expected.square().sum(), weight)
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(weight)
        assert torch.equal(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), weight)[0], grad)


def test_autocast_leaves_it_alone() -> None:
    q, k, v, _ = inputs(2, 2, 4, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = rqk.depth_attention(q, k, v)
    assert torch.equal(under, rqk.depth_attention(q, k, v))


# --- every level of the CPU ------------------------------------------------------------------------------

LEVELS_SCRIPT = """
import json, torch, rqkernels as rqk
from rqkernels import reference
torch.manual_seed(0)
worst = 0.0
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for n, m, c in ((1, 1, 3), (4, 4, 64), (5, 7, 16), (3, 8, 100), (31, 32, 20)):
        leaves = [torch.randn(3, 2, rows, c).to(dtype).requires_grad_() for rows in (n, m, m)]
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        out, true = rqk.depth_attention(*leaves), reference.depth_attention(*doubles)
        grad = torch.randn_like(out)
        ours = [out, *torch.autograd.grad(out, leaves, grad)]
        truth = [true, *torch.autograd.grad(true, doubles, grad.double())]
        for a, b in zip(ours, truth):
            error = (a.double() - b).abs() - (0 if dtype == torch.float32 else 0.501 * torch.finfo(dtype).eps) * b.abs()
            worst = max(worst, error.max().item())
print(json.dumps([torch.ops.rqkernels.cpu_capability(), worst]))
"""


def test_every_level_agrees_with_the_definition() -> None:
    levels = ["default", "avx2", "avx512"]
    for level in levels[: levels.index(torch.ops.rqkernels.cpu_capability()) + 1]:
        root = Path(rqk.__file__).resolve().parent.parent
        environment = {**os.environ, "RQK_CPU_CAPABILITY": level, "PYTHONPATH": str(root)}
        run = subprocess.run([sys.executable, "-c", LEVELS_SCRIPT], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        name, worst_error = json.loads(run.stdout)
        assert name == level
        assert worst_error < 3e-6
