"""Arguments that operators, packed objects and references accept, and their errors for everything else.

A refusal of a kernel and of its reference is the same: class and text.
"""

from __future__ import annotations

import decimal
import fractions
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_calls import functions
from op_calls.depth_decode import block, decoder_arguments
from torch import Tensor

import rqkernels as rqk
from rqkernels import _library
from rqkernels._arguments import check_integer, check_number

FUNCTIONS = functions()


def arguments_of(name: str, package: Any) -> dict[str, Any]:
    """Arguments of a valid call of `package.<name>`, the same numbers for both packages."""
    torch.manual_seed(3)
    return FUNCTIONS[name].arguments(package)


NAMES = sorted(set(rqk.__all__) - {"BlockWeights", "ResidualCodes", "info", "reference"})


def refusal(name: str, package: Any, change: dict[str, Any]) -> Exception:
    arguments = {**arguments_of(name, package), **change}
    with pytest.raises(Exception) as raised:
        getattr(package, name)(**arguments)
    return raised.value


def assert_refused(name: str, change: dict[str, Any], error: type[Exception], expected: str) -> None:
    """Check that kernel and reference refuse in the same words, which begin with the function and the argument."""
    ours, theirs = (refusal(name, package, change) for package in (rqk, rqk.reference))
    assert type(ours) is error, ours
    assert str(ours).startswith(f"{name}: {expected}"), ours
    assert type(theirs) is error, theirs
    # References are what kernels are measured by, and take float64 for that.
    assert str(theirs).replace(", float64,", ",", 1) == str(ours).replace(", float64,", ",", 1)


def test_every_operator_is_called_here() -> None:
    for name in NAMES:
        for package in (rqk, rqk.reference):
            getattr(package, name)(**arguments_of(name, package))


# --- what is an integer, a number, a flag ----------------------------------------------------------------

EACH_INTEGER = [(name, argument, *bounds) for name, f in FUNCTIONS.items() for argument, bounds in f.integers.items()]
EACH_NUMBER = [(name, argument) for name, f in FUNCTIONS.items() for argument in f.numbers]
EACH_FLAG = [(name, argument) for name, f in FUNCTIONS.items() for argument in f.flags]


@pytest.mark.parametrize(("name", "argument", "low", "bits"), EACH_INTEGER)
def test_integers(name: str, argument: str, low: int, bits: int | None) -> None:
    valid = arguments_of(name, rqk)[argument]
    for kind in (np.int64, np.int8, np.uint16):
        for package in (rqk, rqk.reference):
            getattr(package, name)(**{**arguments_of(name, package), argument: kind(valid)})
    for value in (True, np.bool_(True), 1.0, np.float32(1), "1", torch.float32, decimal.Decimal(1), [[1]]):
        kind = type(value[0] if isinstance(value, list) and argument == "top_k" else value).__name__
        if isinstance(value, list) and argument == "top_k" and name == "depth_decode":
            continue  # one per depth: below
        kind = type(value).__name__
        assert_refused(name, {argument: value}, TypeError, f"{argument} must be an integer")
        assert str(refusal(name, rqk, {argument: value})).endswith(f"got {kind}")
    if argument not in ("offset", "stream") or name != "sample_logits":
        assert_refused(name, {argument: torch.tensor(1)}, TypeError, f"{argument} must be an integer")
    outside = [low - 1, -1, -(1 << 31), -(1 << 63), -(1 << 63) - 1, -(1 << 64), -(10**40)]
    outside += [] if bits is None else [1 << bits, (1 << bits) + 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 80, 10**400]
    for value in outside:
        if bits is not None and low <= value < 1 << bits:
            continue
        assert_refused(name, {argument: value}, ValueError, "")
        assert argument in str(refusal(name, rqk, {argument: value}))


@pytest.mark.parametrize(("name", "argument"), EACH_NUMBER)
def test_numbers(name: str, argument: str) -> None:
    for value in (np.float32(0.5), np.float16(0.5), np.int64(1), 1, fractions.Fraction(1, 2)):
        for package in (rqk, rqk.reference):
            getattr(package, name)(**{**arguments_of(name, package), argument: value})
    for value in (True, np.bool_(False), "1", 1j, decimal.Decimal(1), torch.tensor(1.0), torch.float32):
        assert_refused(name, {argument: value}, TypeError, f"{argument} must be a number")
    for value in (math.nan, np.float32(math.nan), 10**400, -(10**400)):
        assert_refused(name, {argument: value}, ValueError, f"{argument} must be")
    # tau may be infinite, and a scale negative.
    outside: list[float] = [] if argument == "scale" else [-1.0, -math.inf, -1e-30]
    outside += [0.0, -0.0] if argument in ("tau", "top_p") else []
    outside += [] if argument == "tau" else [math.inf]
    # What is used in float32 must be finite there.
    outside += [1e39, 1e308] if argument in ("scale", "eps", "guidance") else []
    for value in outside:
        assert_refused(name, {argument: value}, ValueError, f"{argument} must be")


@pytest.mark.parametrize(("name", "argument"), EACH_FLAG)
def test_flags(name: str, argument: str) -> None:
    for package in (rqk, rqk.reference):
        getattr(package, name)(**{**arguments_of(name, package), argument: np.bool_(True)})
    for value in (1, 0, 1.0, "yes", None, torch.tensor(True), np.array(True)):
        assert_refused(name, {argument: value}, TypeError, f"{argument} must be a bool, got {type(value).__name__}")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("soft_label_cross_entropy", "reduction"),
        ("fused_linear_soft_label_cross_entropy", "reduction"),
        ("PackedTransformer", "activation"),
        ("PackedTransformer", "precision"),
    ],
)
def test_choices(name: str, argument: str) -> None:
    for value in (None, 3, b"mean", ["mean"], torch.zeros(2), np.zeros(2)):
        assert_refused(name, {argument: value}, TypeError, f"{argument} must be a string, one of")
    for value in ("", "MEAN", "fp16"):
        assert_refused(name, {argument: value}, ValueError, f"{argument} must be one of")


@pytest.mark.parametrize("argument", ["temperature", "top_k", "top_p"])
def test_one_value_for_each_depth(argument: str) -> None:
    valid = arguments_of("depth_decode", rqk)[argument]
    for package in (rqk, rqk.reference):
        rows = [[valid] * 3, (valid,) * 3, [np.asarray(valid)[()]] * 3]
        found = [package.depth_decode(**{**arguments_of("depth_decode", package), argument: row}) for row in rows]
        assert all(torch.equal(found[0], codes) for codes in found[1:])
    for value in ([], [valid] * 2, [valid] * 4):
        assert_refused("depth_decode", {argument: value}, ValueError, f"{argument} must be one value, or 3")
    for value in ([valid, valid, "1"], [[valid], valid, valid], {0: valid}, np.array([valid] * 3), iter([valid])):
        assert_refused("depth_decode", {argument: value}, TypeError, f"{argument} must be")
    for value in ([valid, valid, math.nan], [valid, -1, valid], [valid, -(2**70), valid]):
        error = TypeError if argument == "top_k" and value[2] != value[0] else ValueError
        assert_refused("depth_decode", {argument: value}, error, f"{argument} must be")


def test_all_codes_may_be_kept_in_any_words() -> None:
    for top_k in (2**31, 2**63 - 1, 2**63, 2**64, 10**400):
        for name in ("sample_logits", "depth_decode"):
            for package in (rqk, rqk.reference):
                of = arguments_of(name, package)
                function = getattr(package, name)
                assert torch.equal(function(**{**of, "top_k": top_k}), function(**{**of, "top_k": None}))


def test_checks_tell_what_came() -> None:
    with pytest.raises(ValueError, match=r"^op: n must be < 2\^8, got 256$"):
        check_integer("op", "n", 256, 0, 8)
    with pytest.raises(TypeError, match=r"^op: n must be an integer or None, got str$"):
        check_integer("op", "n", "3", or_none=True)
    with pytest.raises(ValueError, match=r"^op: t must be small, got 3\.0$"):
        check_number("op", "t", 3, "small", lambda number: number < 1)
    assert type(check_integer("op", "n", np.uint64(2**64 - 1), 0, 64)) is int


# --- numbers in tensors, and sums that do not overflow ---------------------------------------------------


@pytest.mark.parametrize("package", [rqk, rqk.reference], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("length", "step"),
    [(2**63 - 1, 0), (2**63 - 5, 3), (4, 1), (0, 5), (0, -1), (1, 2**63 - 1), (1, -(2**63)), (2**62, 2**62), (-1, 1)],
)
def test_a_step_outside_of_the_caches_writes_nothing(package: Any, length: int, step: int) -> None:
    given = arguments_of("transformer_step", package)
    keys, values = given["keys"].clone(), given["values"].clone()
    with pytest.raises(ValueError, match=rf"^transformer_step: length {length}.*do not fit the keys' capacity 5"):
        package.transformer_step(**{**given, "length": length, "step": torch.tensor(step)})
    assert torch.equal(given["keys"], keys) and torch.equal(given["values"], values)


def test_counters_in_tensors_and_sums_of_counters() -> None:
    for value in (-1, 2**32, 2**63 - 1, -(2**63)):
        assert_refused("sample_logits", {"stream": torch.tensor(value)}, ValueError, "stream must be in [0, 2^32)")
    for value in (-1, -(2**63), 2**63 - 1):
        assert_refused("sample_logits", {"offset": torch.tensor(value)}, ValueError, "offset must be >= 0")
    assert_refused("sample_logits", {"offset": 2**63 - 1}, ValueError, "offset must be >= 0, and offset + rows below")
    assert_refused("sample_logits", {"stream": 2**32 - 1}, ValueError, "stream + streams must be <= 2^32")
    assert_refused("stochastic_residual_search", {"offset": 2**63 - 2}, ValueError, "offset must be >= 0, and offset +")
    assert_refused("depth_decode", {"offset": 2**63 - 1}, ValueError, "offset must be >= 0, and offset + rows below")
    assert_refused("depth_decode", {"stream": 2**32 - 2}, ValueError, "stream must be >= 0, and stream + D at most")
    for value in (-1, 2**63 - 1, -(2**63), 2**32 // 3, 2**62):
        assert_refused("depth_decode", {"step": torch.tensor(value)}, ValueError, "step must be >= 0, and stream +")
    last = torch.tensor((2**32 - 3 - 3) // 3)
    for package in (rqk, rqk.reference):
        assert package.depth_decode(**{**arguments_of("depth_decode", package), "step": last}).shape == (2, 3)


def test_codes_out_of_range() -> None:
    for value in (-1, 9, 2**31, 2**63 - 1, -(2**63)):
        codes = torch.tensor([[0, 1], [2, value], [0, 0], [1, 1]])
        assert_refused(
            "residual_decode", {"codes": codes}, IndexError, f"codes must be in [0, 9), got {value} in row 1"
        )
        of_depths = torch.cat([codes, codes[:, :1]], 1)
        assert_refused("depth_logits", {"codes": of_depths}, IndexError, f"codes must be in [0, 9), got {value}")
        if value != -1:
            one = {"codes": codes[:, 1].contiguous()}
            assert_refused("code_statistics", one, IndexError, f"codes must be in [-1, 9), got {value} in row 1")


# --- tensors ---------------------------------------------------------------------------------------------


def tensors_of(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in arguments_of(name, rqk).items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_plain_tensor(name: str) -> None:
    for argument, tensor in tensors_of(name).items():
        others: list[tuple[Any, str]] = [
            (tensor.to_sparse(), "must be a dense tensor, got a sparse_coo one"),
            (torch.nested.nested_tensor([tensor, tensor]), "must be a dense tensor, got a nested one"),
            (torch.nn.UninitializedParameter(), "must be a torch.Tensor, got an uninitialized parameter"),
            (tensor.to(torch.complex64), "must be"),
            (tensor.to(torch.int16), "must be"),
        ]
        # A number may stand in the place of a counter.
        if name != "sample_logits" or argument == "logits":
            others.append((tensor.numpy(), "must be a torch.Tensor"))
        for other, message in others:
            assert_refused(name, {argument: other}, TypeError, f"{argument} {message}")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_other_classes_and_layouts_are_taken(name: str) -> None:
    """Results have the bits of plain tensors: no layout here changes an order of sums."""

    class Mine(Tensor):
        pass

    expected = getattr(rqk, name)(**arguments_of(name, rqk))
    for argument, tensor in tensors_of(name).items():
        ways: list[Callable[[Tensor], Tensor]] = [lambda t: t.as_subclass(Mine), lambda t: t.clone().share_memory_()]
        if argument not in ("keys", "values"):
            ways.append(lambda t: torch.stack([t, t], -1)[..., 1])
        for way in ways:
            found = getattr(rqk, name)(**{**arguments_of(name, rqk), argument: way(tensor)})
            pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
            for ours, plain in pairs:
                if isinstance(plain, Tensor):
                    assert torch.equal(ours.as_subclass(Tensor), plain), argument


GIANT = 1 << 45


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"PackedTransformer"}))
def test_more_elements_than_any_memory(name: str) -> None:
    """One number with a stride of zero: the error comes at once and no memory is requested."""
    for argument, tensor in tensors_of(name).items():
        for d in range(tensor.dim()):
            sizes = [GIANT if i == d else size for i, size in enumerate(tensor.shape)]
            change: dict[str, Any] = {argument: torch.zeros((), dtype=tensor.dtype).expand(sizes)}
            if "losses_out" in tensors_of(name) and argument != "losses_out":
                change["losses_out"] = None  # whose shape is told first
            assert_refused(name, change, ValueError, "")
            assert argument in str(refusal(name, rqk, change))


def test_devices_that_differ() -> None:
    for name in NAMES:
        tensors = tensors_of(name)
        for argument, tensor in tensors.items():
            if len(tensors) == 1:
                continue
            change: dict[str, Any] = {argument: tensor.to("meta")}
            if "losses_out" in tensors and argument != "losses_out":
                change["losses_out"] = None  # which would be told
            error = refusal(name, rqk, change)
            assert type(error) is ValueError
            assert str(error).startswith(f"{name}: ")
            assert argument in str(error) and "meta" in str(error)


def test_shapes_are_checked_where_there_is_no_memory_too() -> None:
    """As `torch.compile` and the meta device do without: a wrong shape is not carried on."""
    packed = {"PackedCodebook", "PackedTransformer", "PackedDepthDecoder"}
    for name in sorted(set(NAMES) - packed - {"sample_logits"}):
        given = tensors_of(name)
        if {"packed", "decoder"} & set(arguments_of(name, rqk)):
            continue  # which have memory
        on_meta = {argument: tensor.to("meta") for argument, tensor in given.items()}
        getattr(rqk, name)(**{**arguments_of(name, rqk), **on_meta})
        for argument, tensor in on_meta.items():
            if tensor.dim() == 0:
                continue
            wrong = {**on_meta, argument: torch.cat([tensor, tensor], 0)[..., None, None, None]}
            error = refusal(name, rqk, wrong)
            on_cpu = refusal(name, rqk, {argument: torch.cat([given[argument]] * 2, 0)[..., None, None, None]})
            assert type(error) is type(on_cpu) is ValueError
            assert str(error).replace("meta", "cpu") == str(on_cpu)

    with pytest.raises(ValueError, match=r"logits must have at least one code, got \(4, 0\)"):
        rqk.sample_logits(torch.zeros(4, 0, device="meta"), seed=0)
    with pytest.raises(ValueError, match=r"stream \+ streams must be <= 2\^32"):
        rqk.sample_logits(torch.zeros(4, 2, device="meta"), seed=0, streams=2, stream=2**32 - 1)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"PackedCodebook", "PackedTransformer", "PackedDepthDecoder"}))
def test_checks_are_traced_with_parameters(name: str) -> None:
    """One graph, with the arguments as models have them."""
    given = arguments_of(name, rqk)
    expected = getattr(rqk, name)(**given)
    for argument, value in arguments_of(name, rqk).items():
        is_weight = isinstance(value, Tensor) and value.is_floating_point() and argument != "losses_out"
        given[argument] = torch.nn.Parameter(value) if is_weight and argument not in ("keys", "values") else value
    torch._dynamo.reset()
    found = torch.compile(lambda: getattr(rqk, name)(**given), fullgraph=True, backend="aot_eager")()
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for ours, plain in pairs:
        if isinstance(plain, Tensor):
            torch.testing.assert_close(ours.detach(), plain)


def test_checks_tie_no_compiled_graph_to_a_size() -> None:
    """The number of rows depends on the data: it is unknown while the graph is made."""

    def f(x: Tensor, chosen: Tensor, codebook: Tensor, logits: Tensor) -> Tensor:
        rows = x[chosen]
        found = rqk.residual_search(rows, codebook, 2)
        decoded = rqk.residual_decode(found.codes, codebook)
        counts, _ = rqk.code_statistics(rows, found.codes[:, 0], 9)
        loss = rqk.soft_label_cross_entropy(logits[chosen], rows, codebook, 0.5, reduction="sum")
        return torch.cat([decoded.sum()[None], counts, loss[None]])

    x, codebook, logits = torch.randn(40, 5), torch.randn(9, 5), torch.randn(40, 9)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for share in (0.2, 0.8):
            chosen = torch.rand(40) < share
            given = (x, chosen, codebook, logits)
            torch.testing.assert_close(compiled(*given), f(*given))


def test_what_is_written_has_memory_of_its_own() -> None:
    keys = torch.zeros(1, 4, 2, 5, 3)
    name, both = "transformer_step", torch.zeros(2 * keys.numel())
    half = both[: keys.numel()].view(keys.shape)
    assert_refused(name, {"keys": half, "values": half}, ValueError, "keys and values must not share memory")
    shifted = both[7 : 7 + keys.numel()].view(keys.shape)
    assert_refused(name, {"keys": half, "values": shifted}, ValueError, "keys and values must not share memory")
    x = half.view(-1)[:24].view(4, 6)
    assert_refused(name, {"keys": half, "x": x}, ValueError, "x must not share memory with keys or values")
    for argument in ("keys", "values"):
        for other in (torch._neg_view(keys), torch._efficientzerotensor(keys.shape)):
            assert_refused(name, {argument: other}, ValueError, f"{argument} must have memory to write to")
    with torch.inference_mode():
        made = torch.zeros(4)
    for name in ("soft_label_cross_entropy", "fused_linear_soft_label_cross_entropy"):
        for other, message in (
            (torch.zeros(()).expand(4), "must have memory for each row"),
            (torch.zeros(4, requires_grad=True), "must not require a gradient"),
            (torch._efficientzerotensor(4), "must have memory to write to"),
            (made, "must not be made in inference mode"),
        ):
            assert_refused(name, {"losses_out": other}, ValueError, f"losses_out {message}")
    x = torch.randn(4, 5)
    change = {"x": x, "losses_out": x.view(-1)[3:7]}
    assert_refused("soft_label_cross_entropy", change, ValueError, "losses_out must not share memory with x")


@pytest.mark.parametrize("shared", ["x", "codebook", "mask"])
def test_inplace_reads_before_it_writes(shared: str) -> None:
    """An argument in the memory of the logits, which their gradient overwrites."""
    k = 9
    memory = torch.randn(k, k)
    mask = memory.view(torch.bool).view(-1)[:k] if shared == "mask" else None
    if mask is not None:
        memory.view(torch.uint8).view(-1)[:k] = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1, 1], dtype=torch.uint8)

    def arguments(copied: bool) -> dict[str, Any]:
        own = memory.clone()
        x = own if shared == "x" else torch.linspace(-1, 1, k * k).view(k, k)
        codebook = own if shared == "codebook" else torch.linspace(-1, 1, k * k).view(k, k).mT.contiguous()
        mask = own.view(torch.bool).view(-1)[:k] if shared == "mask" else None
        found = {"x": x, "codebook": codebook, "mask": mask}
        if copied:
            found = {name: None if value is None else value.clone() for name, value in found.items()}
        return {"logits": own, "tau": 0.5, **found}

    gradients = []
    for copied in (True, False):
        given = arguments(copied)
        logits = torch.zeros(k, k, requires_grad=True)
        written = _Alias.apply(logits, given.pop("logits"))
        loss = rqk.soft_label_cross_entropy(written, **given, inplace=True, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
        gradients.append(gradient.clone())
    assert torch.equal(*gradients)


class _Alias(torch.autograd.Function):
    """A result written into given memory."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, memory: Tensor) -> Tensor:
        return memory.view_as(memory)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


# --- names -----------------------------------------------------------------------------------------------


def changed(**parts: Tensor) -> list[rqk.BlockWeights]:
    return [block()._replace(**parts)]


NAN, INF = math.nan, math.inf
SHAPES_AND_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("depth_logits", {"context": torch.zeros(4, 7)}, "context must be (B, 6), got (4, 7)"),
    ("depth_logits", {"codes": torch.zeros(3, 3).long()}, "codes must be contiguous int64 (4, 3), got (3, 3)"),
    ("distance_softmax", {"codebook": torch.full((9, 5), INF)}, "codebook must be finite, got inf in code 0"),
    ("PackedCodebook", {"codebook": torch.full((9, 5), -NAN)}, "codebook must be finite, got nan in code 0"),
    ("depth_attention_packed", {"qkv": torch.zeros(2, 33, 3, 2, 8)}, "qkv must be (N, D, 3, H, head_dim) with 1 <= D"),
    ("depth_attention_packed", {"scale": INF}, "scale must be finite, got inf"),
    ("PackedDepthDecoder", {"classifier_weight": torch.full((9, 6), NAN)}, "classifier_weight must be finite"),
    ("PackedDepthDecoder", {"classifier_bias": torch.full((9,), INF)}, "classifier_bias must be finite"),
    ("PackedDepthDecoder", {"vectors": torch.full((9, 6), INF)}, "vectors must be finite"),
    ("PackedTransformer", {"blocks": changed(qkv_bias=torch.full((18,), NAN))}, "blocks[0].qkv_bias must be finite"),
    ("PackedTransformer", {"blocks": changed(attention_norm_weight=torch.ones(()))}, "blocks[0].attention_norm_weight"),
    ("PackedTransformer", {"blocks": changed(mlp_in_weight=torch.ones(()))}, "blocks[0].mlp_in_weight must be (H, W)"),
    ("PackedTransformer", {"device": "nowhere"}, "device must be one that this torch has, got 'nowhere'"),
    ("PackedTransformer", {"blocks": [], "width": None}, "no blocks: then width must be given"),
    ("PackedTransformer", {"blocks": [], "width": 32769}, "width must be in [1, 32768], got 32769"),
    ("depth_decode", {"context": torch.full((4, 6), NAN)}, "context: the logits of row 0 have NaN, +inf, or nothing"),
]


@pytest.mark.parametrize(("name", "change", "message"), SHAPES_AND_VALUES)
def test_the_function_that_was_called_is_named(name: str, change: dict[str, Any], message: str) -> None:
    assert_refused(name, change, ValueError, message)


def test_blocks_that_are_none() -> None:
    name, parts = "PackedTransformer", "must be BlockWeights of 12 parts, got"
    assert_refused(name, {"blocks": 3}, TypeError, "blocks must be BlockWeights, one for each layer, got int")
    for blocks, got in (([3], "int"), (block(), "Tensor"), ([block()[:5]], "5 parts"), ([{}], "dict")):
        assert_refused(name, {"blocks": blocks}, TypeError, f"blocks[0] {parts} {got}")
    assert_refused(name, {"device": 1.5}, TypeError, "device must be a torch.device, a string or None, got float")


def test_weights_that_a_precision_cannot_hold() -> None:
    change = {"blocks": changed(mlp_in_weight=torch.full((8, 6), 3.4e38)), "precision": "bf16"}
    assert_refused("PackedTransformer", change, ValueError, "blocks[0].mlp_in_weight must be finite in bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": -1.0}, "tau must be > 0"),
        ({"codebook": torch.full((9, 5), math.nan)}, "codebook must be finite, got nan in code 0"),
        ({"codebook": torch.randn(9, 6)}, "x (4, 5) has 5 channels, codebook (9, 6) has 6"),
        ({"codebook": torch.randn(8, 5)}, "weight has 9 codes, the codebook has 8"),
        (
            {"mask": torch.ones(5, dtype=torch.bool)},
            "mask must be bool of the shape of hidden without H, (4, 7); got (5)",
        ),
        ({"codebook": torch.randn(3, 9, 5)}, "x must be (..., D, C) for codebook (3, 9, 5) with D = 3"),
    ],
)
def test_the_fused_loss_speaks_for_itself(change: dict[str, Any], message: str) -> None:
    """Errors name neither `soft_label_cross_entropy`, of which it is made, nor the shapes of its chunks."""
    assert_refused("fused_linear_soft_label_cross_entropy", change, ValueError, message)


def test_a_codebook_that_is_not_finite_is_refused_without_rows_too() -> None:
    bad = torch.full((9, 5), math.nan)
    none = {"x": torch.zeros(0, 5), "codebook": bad}
    loss = {**none, "mask": None, "losses_out": None}
    assert_refused("distance_softmax", none, ValueError, "codebook must be finite")
    assert_refused("soft_label_cross_entropy", {**loss, "logits": torch.zeros(0, 9)}, ValueError, "codebook must be")
    fused = {**loss, "hidden": torch.zeros(0, 7)}
    assert_refused("fused_linear_soft_label_cross_entropy", fused, ValueError, "codebook must be finite")


def test_a_bias_may_forbid_a_code() -> None:
    for package in (rqk, rqk.reference):
        given = decoder_arguments(package)
        bias = torch.full((9,), -math.inf)
        bias[4] = 0
        decoder = package.PackedDepthDecoder(**{**given, "classifier_bias": bias})
        assert (package.depth_decode(torch.randn(5, 6), decoder, seed=0) == 4).all()


# --- memory ----------------------------------------------------------------------------------------------


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """A limit 16 GiB above today's use: some systems promise more memory than they have."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (16 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


ROW = torch.zeros(1, 1)
TOO_MUCH: list[tuple[str, dict[str, Any], int]] = [
    ("residual_search", {"x": ROW.expand(2**39, 1), "codebooks": torch.zeros(9, 1)}, 2**41),
    ("stochastic_residual_search", {"x": ROW.expand(2**39, 1), "codebooks": torch.zeros(9, 1)}, 2**41),
    ("residual_decode", {"codes": ROW.long().expand(2**38, 2)}, 2**42),
    ("code_statistics", {"num_codes": 2**40 - 1}, 2**42 - 4),
    ("distance_softmax", {"x": ROW.expand(2**37, 5)}, 5 * 2**39),
    ("depth_attention", dict.fromkeys("qkv", ROW[..., None, None].expand(2**39, 1, 1, 1)), 2**41),
    ("depth_attention_packed", {"qkv": ROW[..., None, None, None].expand(2**38, 1, 3, 1, 1)}, 2**40),
    ("sample_logits", {"logits": ROW.expand(2**38, 2)}, 2**41),
    ("depth_decode", {"context": ROW.expand(2**37, 6)}, 6 * 2**39),
    (
        "soft_label_cross_entropy",
        {"x": ROW.expand(2**36, 5), "logits": ROW.expand(2**36, 9), "mask": None, "losses_out": None},
        5 * 2**38,
    ),
]


@pytest.mark.parametrize(("name", "change", "least"), TOO_MUCH)
def test_memory_that_is_not_there(limited_memory: None, name: str, change: dict[str, Any], least: int) -> None:
    """The error has torch's class and words, the function's name and the size."""
    error = refusal(name, rqk, change)
    assert type(error) is RuntimeError
    assert str(error).startswith(f"{name}: ")
    words, _, size = str(error).partition("you tried to allocate ")
    assert "DefaultCPUAllocator: can't allocate memory" in words
    assert int(size.split()[0]) >= least


def test_memory_that_a_step_has_not(limited_memory: None) -> None:
    stack = rqk.PackedTransformer([], 2, width=6)
    cache = torch.zeros(0, 2**30, 2, 5, 3)
    with pytest.raises(RuntimeError, match=r"^transformer_step: .*DefaultCPUAllocator.*to allocate 77309411328 bytes"):
        rqk.transformer_step(torch.zeros(1, 1, 6).expand(2**30, 3, 6), stack, cache, cache, 0)


def test_the_class_of_memory_on_a_gpu() -> None:
    """Python raises torch.OutOfMemoryError from the text of an operator's RuntimeError."""

    def operator(text: str) -> None:
        raise RuntimeError(text)

    with pytest.raises(torch.OutOfMemoryError, match=r"^search: CUDA out of memory\. Tried to allocate 8 bytes"):
        _library.call("search", operator, "CUDA out of memory. Tried to allocate 8 bytes.")
    with pytest.raises(RuntimeError, match=r"^search: Storage size calculation overflowed"):
        _library.call("search", operator, "Storage size calculation overflowed with sizes=[4]")
    with pytest.raises(RuntimeError, match=r"^something else$"):
        _library.call("search", operator, "something else")


@pytest.mark.gpu
def test_memory_that_is_not_there_on_a_gpu() -> None:
    x = torch.zeros(1, 1, device="cuda").expand(2**39, 1)
    with pytest.raises(torch.OutOfMemoryError, match=r"^residual_search: CUDA out of memory"):
        rqk.residual_search(x, torch.zeros(9, 1, device="cuda"), 1)


def test_a_depth_beyond_reason() -> None:
    """Without rows it needs no memory and no time."""
    x, codebook = torch.zeros(0, 4), torch.randn(9, 4)
    assert rqk.residual_search(x, codebook, 2**31 - 1).codes.shape == (0, 2**31 - 1)
    assert rqk.stochastic_residual_search(x, codebook, 2**31 - 1, tau=1, seed=0).codes.shape == (0, 2**31 - 1)
    empty = torch.zeros(0, 2**39, 4)
    with pytest.raises(ValueError, match=r"x must have fewer than 2\^40 elements"):
        rqk.residual_search(empty, codebook, 2)
    for codes in (torch.zeros(0, 2**20, 4, dtype=torch.int64), torch.zeros(2**20, 0, 4, dtype=torch.int64)):
        assert rqk.residual_decode(codes, codebook).shape == (*codes.shape[:2], 4)


# --- gradients -------------------------------------------------------------------------------------------


def test_tensors_of_inference_mode_in_a_gradient() -> None:
    with torch.inference_mode():
        k = torch.randn(2, 2, 4, 8)
    q, v = torch.randn(2, 2, 4, 8, requires_grad=True), torch.randn(2, 2, 4, 8)
    with pytest.raises(ValueError, match=r"^depth_attention: k must not be made in inference mode"):
        rqk.depth_attention(q, k, v)
    with torch.no_grad():
        assert rqk.depth_attention(q, k, v).shape == q.shape


@pytest.mark.parametrize("inplace", [False, True])
def test_labels_of_inference_mode(inplace: bool) -> None:
    with torch.inference_mode():
        codebook = torch.randn(5, 3)
    logits = torch.randn(2, 5, dtype=torch.float16, requires_grad=True) * 1
    with pytest.raises(ValueError, match=r"^soft_label_cross_entropy: codebook must not be made in inference mode"):
        rqk.soft_label_cross_entropy(logits, torch.randn(2, 3), codebook, 1.0, reduction="sum", inplace=inplace)
