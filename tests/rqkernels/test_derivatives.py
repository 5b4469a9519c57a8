"""Every differentiable operator under everything that takes derivatives: right, or refused by name.

What is called stands in op_calls, in each operator's DERIVATIVES; the first test finds those without one.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from op_calls import Derivative, derivatives
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rqkernels as rqk

Function = Callable[[Tensor], Tensor]

_DRAWN = torch.Generator().manual_seed(7)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_DRAWN)


X, E, MASK = drawn(3, 2, 4), drawn(2, 9, 4), torch.tensor([[True, True], [False, True], [True, True]])
CODES = torch.randint(0, 9, (4, 3), generator=_DRAWN)


CASES = derivatives()
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
_ONE_OF_EACH = {case.op: case for case in reversed(CASES.values())}
each_operator = pytest.mark.parametrize("case", _ONE_OF_EACH.values(), ids=_ONE_OF_EACH)


def ours(case: Derivative) -> Function:
    return partial(case.call, rqk)


def curved(function: Function) -> Function:
    """A number with derivatives of every order, whatever the function's."""
    return lambda v: ((y := function(v)).square() + y.sin()).sum()


def assert_right(case: Derivative, derivative: Callable[[Function, Tensor], Tensor], curve: bool = True) -> None:
    """`derivative` of our operator is that of the definition in float64."""
    wrap = curved if curve else (lambda function: function)
    true = derivative(wrap(partial(case.call, rqk.reference)), case.leaf.double())
    found = derivative(wrap(ours(case)), case.leaf.clone())
    assert true.abs().max() > 1e-3  # of something that is not lost
    torch.testing.assert_close(found.double(), true, rtol=2e-4, atol=2e-5 * true.abs().max().item())


def test_every_operator_says_whether_it_is_differentiable() -> None:
    covered = {case.op for case in CASES.values()}
    for name in rqk.__all__:
        operator = getattr(rqk, name)
        if not inspect.isfunction(operator) or name in ("info", "depth_decode"):
            continue  # no tensors; codes alone
        refuses = "Not differentiable" in inspect.getdoc(operator)
        assert refuses != (name in covered), f"{name}: its docstring says 'Not differentiable', or op_calls has it"


# --- once ------------------------------------------------------------------------------------------------


def gradient(function: Function, leaf: Tensor) -> Tensor:
    leaf = leaf.requires_grad_()
    return torch.autograd.grad(function(leaf * 1), leaf)[0]


def tangent(function: Function, leaf: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf, torch.arange(leaf.numel()).to(leaf).view(leaf.shape).sin())
        return forward_ad.unpack_dual(function(dual)).tangent


def jvp(function: Function, leaf: Tensor) -> Tensor:
    return torch.func.jvp(function, (leaf,), (leaf.cos(),))[1]


FIRST: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "autograd": gradient,
    "forward mode": tangent,
    "func.grad": lambda f, v: torch.func.grad(f)(v),
    "func.vjp": lambda f, v: (pair := torch.func.vjp(f, v))[1](torch.ones_like(pair[0]))[0],
    "func.jvp": jvp,
    "func.jacrev": lambda f, v: torch.func.jacrev(f)(v),
    "func.jacfwd": lambda f, v: torch.func.jacfwd(f)(v),
    "vmap of grad": lambda f, v: torch.vmap(torch.func.grad(f))(torch.stack([v, v + 0.5])),
    "grad of vmap": lambda f, v: torch.func.grad(lambda u: torch.vmap(f)(u).sum())(torch.stack([v, v + 0.5])),
    "vmap": lambda f, v: torch.vmap(f)(torch.stack([v, v + 0.5])),
    "checkpoint": lambda f, v: gradient(lambda u: checkpoint(f, u, use_reentrant=False), v),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("derivative", FIRST.values(), ids=FIRST)
@each_case
def test_first_derivatives(case: Derivative, derivative: Callable[[Function, Tensor], Tensor]) -> None:
    assert_right(case, derivative)


JACOBIANS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "a batch of gradients": partial(torch.autograd.functional.jacobian, vectorize=True),
    "a batch of tangents": partial(torch.autograd.functional.jacobian, vectorize=True, strategy="forward-mode"),
}


@pytest.mark.parametrize("derivative", JACOBIANS.values(), ids=JACOBIANS)
@each_case
def test_jacobians(case: Derivative, derivative: Callable[[Function, Tensor], Tensor]) -> None:
    assert_right(case, derivative, curve=False)


@each_case
def test_reentrant_checkpoint(case: Derivative) -> None:
    leaf = case.leaf.clone().requires_grad_()
    checkpoint(curved(ours(case)), leaf, use_reentrant=True).backward()
    torch.testing.assert_close(leaf.grad, gradient(curved(ours(case)), case.leaf.clone()))


@each_case
def test_gradcheck(case: Derivative) -> None:
    """PyTorch's own check, in float32: numerical differences are that coarse."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input #0 requires gradient and is not a double")
        assert torch.autograd.gradcheck(
            ours(case), case.leaf.clone().requires_grad_(), eps=1e-2, atol=1e-2, rtol=1e-2,
            check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, nondet_tol=1e-5,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["grad", "jvp"])
@pytest.mark.parametrize("inner", [True, False], ids=["within", "of"])
@each_operator
def test_transforms_and_compiled_code(case: Derivative, kind: str, inner: bool) -> None:
    """`torch.func` inside a compiled function, and around one."""
    compiled = partial(torch.compile, backend="aot_eager", dynamic=False)
    transform = FIRST[f"func.{kind}"]
    function = curved(ours(case))
    torch._dynamo.reset()
    found = compiled(lambda v: transform(function, v))(case.leaf) if inner else transform(compiled(function), case.leaf)
    torch.testing.assert_close(found, transform(function, case.leaf), rtol=1e-5, atol=1e-5)


# --- more than once --------------------------------------------------------------------------------------


def second(function: Function, leaf: Tensor) -> Tensor:
    leaf = leaf.requires_grad_()
    (first,) = torch.autograd.grad(function(leaf * 1), leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum(), leaf)[0]


def second_by_backward(function: Function, leaf: Tensor) -> Tensor:
    leaf = leaf.requires_grad_()
    (first,) = torch.autograd.grad(function(leaf * 1), leaf, create_graph=True)
    first.square().sum().backward()
    return leaf.grad


def third(function: Function, leaf: Tensor) -> Tensor:
    leaf = leaf.requires_grad_()
    (first,) = torch.autograd.grad(function(leaf * 1), leaf, create_graph=True)
    (again,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(again.square().sum(), leaf)[0]


BY_GRAPH: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "create_graph": second,
    "backward": second_by_backward,
    "third": third,
    "functional.hessian": torch.autograd.functional.hessian,
    "functional.hvp": lambda f, v: torch.autograd.functional.hvp(f, v, v.cos())[1],
}
BY_TRANSFORM: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "func.hessian": lambda f, v: torch.func.hessian(f)(v),
    "jacrev of jacrev": lambda f, v: torch.func.jacrev(torch.func.jacrev(f))(v),
    "grad of jvp": lambda f, v: torch.func.grad(lambda u: jvp(f, u))(v),
    "jvp of grad": lambda f, v: jvp(torch.func.grad(f), v),
}


@pytest.mark.parametrize("derivative", BY_GRAPH.values(), ids=BY_GRAPH)
@each_case
def test_derivatives_of_gradients(case: Derivative, derivative: Callable[[Function, Tensor], Tensor]) -> None:
    if case.twice:
        return assert_right(case, derivative)
    for function in (curved(ours(case)), lambda v: ours(case)(v).sum()):
        with pytest.raises(RuntimeError, match=f"^{case.op}: a second derivative .* rqkernels.reference.{case.op} has"):
            derivative(function, case.leaf.clone())


@pytest.mark.parametrize("derivative", BY_TRANSFORM.values(), ids=BY_TRANSFORM)
@each_case
def test_derivatives_of_derivatives_by_transforms(
    case: Derivative, derivative: Callable[[Function, Tensor], Tensor]
) -> None:
    assert_right(case, derivative)


@each_case
def test_gradgradcheck(case: Derivative) -> None:
    def check() -> bool:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Input #. requires gradient and is not a double")
            return torch.autograd.gradgradcheck(
                ours(case), case.leaf.clone().requires_grad_(), eps=1e-2, atol=3e-2, rtol=3e-2, nondet_tol=1e-5
            )

    if case.twice:
        assert check()
    else:
        with pytest.raises(RuntimeError, match=f"^{case.op}: a second derivative"):
            check()


@each_case
def test_a_gradient_may_be_differentiated_in_what_the_loss_is_multiplied_by(case: Derivative) -> None:
    """A factor of one; a second derivative that is missing is refused."""
    leaf, scale = case.leaf.clone().requires_grad_(), torch.ones((), requires_grad=True)
    (first,) = torch.autograd.grad(ours(case)(leaf).sum() * scale, leaf, create_graph=True)
    if case.call is CASES["fused losses, weight"].call:
        with pytest.raises(RuntimeError, match=f"^{case.op}: a second derivative"):
            torch.autograd.grad(first.square().sum(), scale)
    else:
        (found,) = torch.autograd.grad(first.square().sum(), scale)
        torch.testing.assert_close(found, 2 * first.detach().square().sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_case
def test_derivatives_in_half_precision(case: Derivative, dtype: torch.dtype) -> None:
    leaf = case.leaf.to(dtype)
    function = curved(ours(case))
    for derivative in (gradient, FIRST["func.grad"], tangent, second, FIRST["vmap of grad"]):
        if derivative is second and not case.twice:
            with pytest.raises(RuntimeError, match=f"^{case.op}: a second derivative"):
                second(function, leaf.clone())
            continue
        found = derivative(function, leaf.clone())
        true = derivative(curved(partial(case.call, rqk.reference)), leaf.double())
        assert (found.double() - true).norm() <= 10 * torch.finfo(dtype).eps * true.norm()


# --- what has no derivative ------------------------------------------------------------------------------


def test_labels_have_no_gradient() -> None:
    logits, x, e = drawn(6, 9).requires_grad_(), drawn(6, 4).requires_grad_(), drawn(9, 4).requires_grad_()
    weight = drawn(9, 9)
    for loss in (
        rqk.soft_label_cross_entropy(logits, x, e, 1.0),
        rqk.fused_linear_soft_label_cross_entropy(logits, weight, None, x, e, 1.0),
    ):
        found = torch.autograd.grad(loss, (logits, x, e), allow_unused=True)
        assert found[0] is not None and found[1] is None and found[2] is None
    assert not rqk.soft_label_cross_entropy(logits.detach(), x, e, 1.0).requires_grad
    for operator in (rqk.soft_label_cross_entropy, rqk.distance_softmax):
        arguments = (logits, x, e) if operator is rqk.soft_label_cross_entropy else (x, e)
        with pytest.raises(TypeError, match=f"^{operator.__name__}: tau must be a number, got Tensor"):
            operator(*arguments, torch.tensor(1.0, requires_grad=True))


def test_what_is_not_differentiable_gives_results_without_a_gradient() -> None:
    x, e = drawn(6, 4).requires_grad_(), drawn(9, 4).requires_grad_()
    results = [
        *rqk.residual_search(x, e, 2, return_residuals=True)[:4],
        *rqk.stochastic_residual_search(x, e, 2, tau=1.0, seed=0)[:3],
        *rqk.code_statistics(x, CODES[:, 0].repeat(2)[:6], 9),
        rqk.distance_softmax(x, e, 1.0),
        rqk.sample_logits(x, seed=0),
    ]
    assert not any(result.requires_grad for result in results)


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v: rqk.soft_label_cross_entropy(v, X[:2], E, 1.0), ValueError, "soft_label_cross_entropy: logits"),
        (lambda v: rqk.soft_label_cross_entropy(v, X, E * torch.nan, 1.0), ValueError, "codebook must be finite"),
        (lambda v: rqk.depth_attention(v[None], v[None, :, :1], v[None]), ValueError, "depth_attention: k and v must"),
        (lambda v: rqk.residual_decode(CODES + 7, v[0]), IndexError, r"residual_decode: codes must be in \[0, 2\)"),
    ],
)
def test_wrong_arguments_are_named_under_transforms(call: Function, error: type[Exception], message: str) -> None:
    leaf = drawn(3, 2, 9)
    for derivative in (FIRST["func.grad"], FIRST["func.jvp"], tangent, gradient):
        with pytest.raises(error, match=message):
            derivative(lambda v: call(v).sum(), leaf.clone())


def test_what_transforms_cannot_have() -> None:
    leaf = drawn(6, 9)
    loss = partial(rqk.soft_label_cross_entropy, x=drawn(6, 4), codebook=drawn(9, 4), tau=1.0)
    with pytest.raises(ValueError, match=r"^soft_label_cross_entropy: inplace cannot be used"):
        torch.func.grad(lambda v: loss(v * 1, inplace=True))(leaf)
    outside = torch.empty(6)
    for derivative in (FIRST["func.grad"], FIRST["func.jvp"], FIRST["vmap"]):
        with pytest.raises(ValueError, match=r"^soft_label_cross_entropy: losses_out must be made"):
            derivative(lambda v: loss(v, losses_out=outside), leaf)

    def within(v: Tensor) -> Tensor:
        losses = v.new_empty(6)
        return loss(v, losses_out=losses) + losses.sum()  # the losses on the side have no derivative

    torch.testing.assert_close(torch.func.grad(within)(leaf), torch.func.grad(loss)(leaf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_place_has_no_second_derivative(dtype: torch.dtype) -> None:
    leaf = drawn(6, 9).to(dtype).requires_grad_()
    loss = rqk.soft_label_cross_entropy(leaf * 1, drawn(6, 4), drawn(9, 4), 1.0, inplace=True)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^soft_label_cross_entropy: a second derivative"):
        first.sum().backward()
