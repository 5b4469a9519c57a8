"""Generated calls of every operator and packed object, with hostile arguments.

    python tests/fuzz/operators.py --calls 100000 --seed 0

Each call is a function of the seed and its number: a valid call, of which up to three arguments are made hostile. They
run in child processes that may have a few GiB of memory and no more. Reported, with the call's number (`--only` runs
that one alone, in this process):

    crash     the child was ended by a signal
    hang      a call took longer than --timeout
    class     an error that is no TypeError, ValueError or IndexError, and none of memory (of torch's class and words)
    unnamed   an error that names not the function that was called, or no argument
    refused   a call without a hostile argument raised
    wrong     a result, or a class of error, that is not the reference's (tried on a share of the calls)
    broken    this file could not make or judge the call
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import decimal
import fractions
import inspect
import math
import os
import random
import re
import resource
import selectors
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from op_calls import Twin, functions
from op_calls.depth_decode import random_stack

import rqkernels

MEMORY = 3 << 30  # of a child, above what it has after importing torch
GIANT = 1 << 40
FUNCTIONS = functions()
COMPARED = 0.3  # share of the calls that are compared with the reference

Random = random.Random


class Call(NamedTuple):
    """A call to be made: of `rqkernels.<name>` and of its reference alike."""

    name: str
    arguments: dict[str, Any]
    hostile: tuple[str, ...]  # the arguments that were changed
    context: str
    planted: str = ""


# --- hostile arguments -----------------------------------------------------------------------------------


class Subclass(Tensor):
    """A tensor of a subclass."""


OBJECTS: list[Any] = [
    *(None, "", "3", b"1", [], (), {}, object(), 1 + 2j, decimal.Decimal(1), fractions.Fraction(1, 2), torch.float32),
    *(int, np.array([1, 2]), np.zeros((2, 3)), range(3), [1.0], [[1], [2]], Ellipsis, print),
]
_POWERS = [sign << bits for bits in (0, 1, 5, 31, 32, 53, 62, 63, 64, 70) for sign in (1, -1)]
INTEGERS: list[Any] = [
    *(power + more for power in _POWERS for more in (-1, 0, 1)),
    *(10**400, True, False, 1.0, 2.5, math.nan, np.int64(2), np.int8(-1), np.uint64(2**64 - 1), np.bool_(True)),
]
NUMBERS: list[Any] = [
    *(0.0, -0.0, -1.0, 1.0, 0.3, 5e-324, 1e-320, 1e-45, 1e-30, 1e38, 3.5e38, 1e39, 1e308, -1e39, math.nan, math.inf),
    *(-math.inf, True, 10**400, -(10**400), 2**64),
    *(np.float32(0.5), np.float64(math.nan), np.float16(math.inf), np.int64(2)),
]
DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32),
    *(torch.float64, torch.complex64, torch.float8_e4m3fn, torch.uint16),
]
SCALARS = [torch.tensor(2), torch.tensor(0.5), torch.tensor([1, 2]), torch.tensor(True), torch.ones((), device="meta")]


def values(tensor: Tensor, rng: Random) -> Tensor:
    """Replace some entries by hostile values."""
    copied = tensor.detach().clone()
    if copied.numel() == 0:
        return copied
    if copied.is_floating_point():
        most = torch.finfo(copied.dtype).max
        value = rng.choice([math.nan, math.inf, -math.inf, most, -most, 1e-42, 0.0, min(1e20, most)])
        if rng.random() < 0.2:
            return torch.full_like(copied, value)
    else:
        value = rng.choice([-(2**63), -2, -1, 7, 40, 300, 2**31, 2**32, 2**63 - 1])
        value = value if copied.dtype == torch.int64 else value % 2
    copied.view(-1)[rng.randrange(copied.numel())] = value
    return copied


def resized(tensor: Tensor, rng: Random) -> Tensor:
    way = rng.randrange(7)
    if way == 0 or tensor.dim() == 0:
        return tensor.unsqueeze(rng.randrange(tensor.dim() + 1))
    d = rng.randrange(tensor.dim())
    if way == 1 and tensor.shape[d] > 0:
        return tensor.select(d, 0)
    if way == 2:
        return tensor.narrow(d, 0, 0)
    if way == 3:
        return torch.cat([tensor, tensor], d)
    if way == 4:
        return tensor.transpose(d, rng.randrange(tensor.dim()))
    if way == 5:
        return tensor.flatten()
    return tensor.new_zeros(0) if rng.random() < 0.5 else tensor.new_zeros([1 << 20] * 2 + [0])


def strided(tensor: Tensor, rng: Random) -> Tensor:
    """The same tensor with other strides."""
    way = rng.randrange(5)
    if tensor.dim() == 0:
        return torch.stack([tensor, tensor])[1]
    if way == 0:
        return torch.stack([tensor, tensor], -1)[..., 0]
    if way == 1:
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if way == 2:
        return torch.nn.functional.pad(tensor, (1, 0))[..., 1:] if tensor.dtype != torch.bool else tensor.flip(0)
    if way == 3 and tensor.numel() > 0:
        d = rng.randrange(tensor.dim())
        return tensor.narrow(d, 0, 1).expand(tensor.shape)
    return (
        torch.as_strided(tensor, tensor.shape, [1 if size > 1 else 0 for size in tensor.shape])
        if (tensor.numel() > 0 and sum(tensor.shape) <= tensor.numel())
        else tensor.contiguous()
    )


def giant(tensor: Tensor, rng: Random) -> Tensor:
    """A tensor of more elements than any memory holds, by strides of zero."""
    sizes = list(tensor.shape) or [1]
    at = rng.randrange(len(sizes))
    others = math.prod(max(size, 1) for size in sizes) // max(sizes[at], 1)
    sizes[at] = min(rng.choice([GIANT, 1 << 45, 1 << 61]), (1 << 61) // others)
    return torch.zeros((), dtype=tensor.dtype).expand(sizes)


def not_a_plain_tensor(tensor: Tensor, rng: Random) -> Any:
    tensor = tensor.detach()
    ways: list[Callable[[], Any]] = [
        tensor.to_sparse,
        lambda: tensor.reshape(1, -1).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([tensor, tensor]),
        lambda: torch.nested.nested_tensor([tensor.reshape(-1), tensor.reshape(-1)], layout=torch.jagged),
        lambda: tensor.to("meta"),
        lambda: tensor.to_mkldnn(),
        lambda: tensor.numpy(),
        tensor.tolist,
        lambda: [tensor],
        lambda: torch.nn.Parameter(tensor),
        lambda: tensor.as_subclass(Subclass),
        lambda: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
        lambda: torch._neg_view(tensor) if tensor.dtype != torch.bool else tensor,
        lambda: torch.zeros(tensor.shape, dtype=torch.complex64).conj(),
        lambda: torch.nn.UninitializedParameter(),
        lambda: torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory(),
        lambda: torch.Tensor._make_subclass(Subclass, tensor),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return rng.choice(ways)()
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError):
            return tensor.tolist()


def inference_tensor(tensor: Tensor, rng: Random) -> Tensor:
    with torch.inference_mode():
        return tensor.detach().clone()


def hostile_tensor(tensor: Tensor, rng: Random) -> Any:
    ways: list[tuple[float, Callable[[Tensor, Random], Any]]] = [
        (4, values),
        (4, resized),
        (3, strided),
        (1, giant),
        (3, lambda t, _: t.detach().to(rng.choice(DTYPES))),
        (3, not_a_plain_tensor),
        (1, inference_tensor),
        (1, lambda t, _: t.detach().clone().requires_grad_() if t.is_floating_point() else t),
        (1, lambda t, _: rng.choice(OBJECTS)),
        (1, lambda t, _: rng.choice(INTEGERS + NUMBERS)),
        (0.3, lambda t, _: torch.rand(3, 2, 4)),
    ]
    make = rng.choices([way for _, way in ways], [weight for weight, _ in ways])[0]
    return make(tensor, rng)


def hostile_block(block: Any, rng: Random) -> Any:
    if rng.random() < 0.2:
        return rng.choice([list(block), tuple(block)[:5], {}, None, rng.choice(OBJECTS)])
    name = rng.choice(block._fields)
    tensor = getattr(block, name)
    return block._replace(**{name: rng.choice(OBJECTS) if tensor is None else hostile_tensor(tensor, rng)})


def hostile_list(value: list[Any], rng: Random) -> Any:
    if value and isinstance(value[0], rqkernels.BlockWeights):
        changed = list(value)
        at = rng.randrange(len(changed))
        changed[at] = hostile_block(changed[at], rng)
        return rng.choice([changed, changed, changed, value[0], iter(value), tuple(value)])
    if value and rng.random() < 0.7:
        changed = list(value)
        changed[rng.randrange(len(changed))] = rng.choice(INTEGERS + NUMBERS + OBJECTS)
        return rng.choice([changed, tuple(changed)])
    return rng.choice([[], value * 2, (), np.array([1.0]), torch.tensor([1.0]), {0: 1}, iter(value), *OBJECTS])


def hostile(value: Any, rng: Random) -> Any:
    """A value to replace a valid argument by."""
    if isinstance(value, Tensor):
        return hostile_tensor(value, rng)
    if isinstance(value, Twin):
        others = [value.kernel.__class__, "packed", random_stack(rng), small_packed_codebook(rng), *OBJECTS]
        return rng.choice(others)
    if isinstance(value, rqkernels.PackedCodebook):
        return rng.choice([hostile_tensor(value.codebook, rng), rqkernels.PackedCodebook, *OBJECTS])
    if isinstance(value, list):
        return hostile_list(value, rng)
    if isinstance(value, str):
        return rng.choice(["", value.upper(), value + " ", value.encode(), [value], "cuda:99", "meta", *OBJECTS])
    kinds = [INTEGERS, NUMBERS, OBJECTS]
    weights = [1, 4, 1] if isinstance(value, float) else [4, 1, 1] if isinstance(value, int) else [2, 2, 1]
    chosen = rng.choice(rng.choices(kinds, weights)[0])
    return rng.choice(SCALARS) if rng.random() < 0.1 else chosen


def small_packed_codebook(rng: Random) -> Any:
    return rqkernels.PackedCodebook(torch.randn(5, 4))


def is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def shared_memory(arguments: dict[str, Any], rng: Random) -> str | None:
    """Make one tensor a view of another's memory; return its name."""
    plain = {name: value for name, value in arguments.items() if type(value) is Tensor and is_dense(value)}
    tensors = [name for name, value in plain.items() if value.numel() > 0]
    if len(tensors) < 2:
        return None
    name, other = rng.sample(tensors, 2)
    memory, shape = arguments[other].detach(), arguments[name].shape
    if memory.dtype != arguments[name].dtype or memory.numel() < math.prod(shape) or not memory.is_contiguous():
        return None
    arguments[name] = memory.view(-1)[: math.prod(shape)].view(shape)
    return name


# With --plant each of these calls has a fault of its own, to test this file.
PLANTED = {2: "crash", 4: "hang", 6: "class", 7: "unnamed", 8: "refused", 9: "wrong"}


def go_wrong(kind: str) -> Any:
    if kind == "crash":
        os.abort()
    if kind == "hang":
        time.sleep(1000)
    if kind == "class":
        raise RuntimeError("residual_decode: codes must be good")
    if kind == "unnamed":
        raise ValueError("residual_decode: no good")
    if kind == "refused":
        raise ValueError("residual_decode: codes must be better")
    return torch.zeros(2, 3)


CONTEXTS = ("",) * 12 + ("no_grad", "inference_mode", "autocast", "float64", "float16", "flush")


def make_call(seed: int, number: int, planted: dict[int, str]) -> Call:
    if number in planted:
        codes = {"codes": torch.zeros(3, 2, dtype=torch.int64), "codebooks": torch.ones(4, 5)}
        changed = () if planted[number] == "refused" else ("codes",)
        return Call("residual_decode", codes, changed, "", planted[number])
    rng = Random(f"{seed}/{number}")
    torch.manual_seed(rng.randrange(1 << 40))
    name = rng.choice(list(FUNCTIONS))
    arguments = FUNCTIONS[name].random(rng)
    changed = []
    for argument in rng.sample(list(arguments), min(len(arguments), rng.choice([0, 1, 1, 1, 2, 3]))):
        arguments[argument] = hostile(arguments[argument], rng)
        changed.append(argument)
    if rng.random() < 0.03 and (shared := shared_memory(arguments, rng)):
        changed.append(shared)
    return Call(name, arguments, tuple(changed), rng.choice(CONTEXTS))


# --- what happens ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def entered(context: str) -> Iterator[None]:
    default = torch.get_default_dtype()
    try:
        with contextlib.ExitStack() as opened:
            if context == "no_grad":
                opened.enter_context(torch.no_grad())
            elif context == "inference_mode":
                opened.enter_context(torch.inference_mode())
            elif context == "autocast":
                opened.enter_context(torch.autocast("cpu", torch.bfloat16))
            elif context in ("float64", "float16"):
                torch.set_default_dtype(getattr(torch, context))
            elif context == "flush":
                torch.set_flush_denormal(True)
            yield
    finally:
        torch.set_default_dtype(default)
        torch.set_flush_denormal(False)


def run(call: Call, *, reference: bool = False) -> Any:
    if call.planted and not reference:
        return go_wrong(call.planted)
    function = getattr(rqkernels.reference if reference else rqkernels, call.name)
    arguments = {name: value[reference] if isinstance(value, Twin) else value for name, value in call.arguments.items()}
    if reference:
        arguments = {
            name: rqkernels.reference.PackedCodebook(value.codebook)
            if isinstance(value, rqkernels.PackedCodebook)
            else value
            for name, value in arguments.items()
        }
    with entered(call.context):
        result = function(**arguments)
    if isinstance(result, Tensor) and result.requires_grad and result.device.type == "cpu":
        result.sum().backward()
    return result


MEMORY_WORDS = ("DefaultCPUAllocator", "Storage size calculation overflowed", "out of memory")


def is_of_memory(error: BaseException) -> bool:
    return type(error) in (RuntimeError, torch.OutOfMemoryError) and any(words in str(error) for words in MEMORY_WORDS)


def fault_of(call: Call, error: BaseException) -> tuple[str, str] | None:
    """Kind of fault and text of an error that must not occur; None if the error is as documented."""
    text = f"{type(error).__name__}: {error}"
    if is_of_memory(error):
        return None if call.name in text else ("unnamed", text)
    if not isinstance(error, (TypeError, ValueError, IndexError)) or isinstance(error, UnicodeError):
        return "class", text
    if not call.hostile:
        return "refused", text
    if not re.match(rf"\w+: {call.name}: ", text):
        return "unnamed", text
    words = set(re.findall(r"\w+", str(error).split(": ", 1)[1]))
    return None if words & set(call.arguments) else ("unnamed", text)


def leaves(result: Any) -> list[Any]:
    if isinstance(result, tuple):
        return [leaf for part in result for leaf in leaves(part)]
    return [result] if isinstance(result, Tensor) else []


def is_moderate(call: Call) -> bool:
    """True if the results of float32 and float64 must agree."""
    for value in call.arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            finite = value.detach().double()
            finite = finite[finite.isfinite()].abs()
            if finite.numel() > 0 and float(finite.max()) > 100:
                return False
        elif isinstance(value, float) and not (value == 0 or math.isinf(value) or 1e-2 < abs(value) < 100):
            return False
    return call.context not in ("flush", "autocast")


def difference(call: Call, ours: Any, theirs: Any) -> str | None:
    """First difference from the reference; None if there is none, or if rounding may explain it."""
    mine, others = leaves(ours), leaves(theirs)
    if len(mine) != len(others):
        return f"{len(mine)} results, the reference has {len(others)}"
    for a, b in zip(mine, others, strict=True):
        if a.shape != b.shape:
            return f"shape {tuple(a.shape)}, the reference's is {tuple(b.shape)}"
        if a.dtype != b.dtype:
            return f"{a.dtype}, the reference has {b.dtype}"
        a, b = a.detach(), b.detach()
        if not agree(call, a, b):
            return f"{a.flatten()[:8].tolist()}, the reference has {b.flatten()[:8].tolist()}"
    return None


def agree(call: Call, a: Tensor, b: Tensor) -> bool:
    results = FUNCTIONS[call.name].results
    if results == "exact":
        return call.context == "flush" or torch.equal(a.nan_to_num(nan=7.25), b.nan_to_num(nan=7.25))
    if not is_moderate(call) or a.numel() == 0:
        return True
    if results == "drawn":
        # A draw falls otherwise where u is within rounding of a boundary: one of many. What depends on it too.
        depends = a.is_floating_point() or call.name == "depth_decode"
        return depends or int((a != b).sum()) <= 1 + a.numel() // 10
    halves = (torch.float16, torch.bfloat16)
    are_halves = any(isinstance(value, Tensor) and value.dtype in halves for value in call.arguments.values())
    coarse = 2e-2 if are_halves or results == "products" else 2e-4
    scale = max(1.0, float(b.double().nan_to_num(0, 0, 0).abs().max()))
    return torch.allclose(a.double(), b.double(), rtol=coarse, atol=coarse * scale, equal_nan=True)


def is_comparable(call: Call) -> bool:
    """The reference takes float64 too, knows no meta tensors, and is slow."""
    for value in call.arguments.values():
        if isinstance(value, torch.nn.UninitializedParameter):
            return False
        if isinstance(value, Tensor):
            if value.dtype == torch.float64 or value.device.type != "cpu" or value.layout is not torch.strided:
                return False
            if value.is_nested or value.numel() > 1 << 16 or value.is_inference():
                return False
        if type(value) is int and call.name != "code_statistics" and value > 1000 and value < 2**31:
            return False  # a depth
    return True


def compare(call: Call, twin: Call, outcome: Any, error: BaseException | None) -> str | None:
    try:
        theirs = run(twin, reference=True)
    except Exception as raised:
        if is_of_memory(raised) or (error is not None and is_of_memory(error)):
            return None
        if error is None and "logits" in str(raised) and not is_moderate(call):
            return None  # in float32 the reference overflows before the kernel does
        if error is None:
            return f"the reference raised {type(raised).__name__}: {raised}"
        if isinstance(raised, type(error)) or isinstance(error, type(raised)):
            return None
        return f"{type(error).__name__}: {error}; the reference: {type(raised).__name__}: {raised}"
    if error is not None:
        # The reference writes no gradient over the logits, so any strides serve it.
        if is_of_memory(error) or "make them contiguous first" in str(error):
            return None
        return f"{type(error).__name__}: {error}; the reference took it"
    return difference(call, outcome, theirs)


def try_call(seed: int, number: int, planted: dict[int, str]) -> tuple[str, str] | None:
    """Make a call; return the kind and text of a fault, or None."""
    call = make_call(seed, number, planted)
    compared = Random(f"{seed}/{number}/compared").random() < COMPARED or call.planted
    # New arguments: a call may write to them.
    twin = make_call(seed, number, planted) if compared and is_comparable(call) else None
    outcome, error = None, None
    try:
        outcome = run(call)
    except Exception as raised:
        error = raised
    fault = fault_of(call, error) if error is not None else None
    if fault is None and twin is not None:
        different = compare(call, twin, outcome, error)
        fault = ("wrong", f"{call.name}: {different}") if different else None
    return fault


# --- children --------------------------------------------------------------------------------------------


def limit_memory(extra: int) -> None:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def work(seed: int, first: int, last: int, planted: dict[int, str]) -> None:
    """Report each call before it is made, and its fault after it."""
    torch.set_num_threads(1)
    limit_memory(MEMORY)
    warnings.simplefilter("ignore")
    for number in range(first, last):
        print("call", number, flush=True)
        try:
            fault = try_call(seed, number, planted)
        except Exception:
            fault = "broken", traceback.format_exc()[-600:]
        if fault is not None:
            print("fault", number, fault[0], repr(fault[1][:600]), flush=True)
    print("done", flush=True)


class Fault(NamedTuple):
    number: int
    kind: str
    text: str


def run_child(seed: int, first: int, last: int, timeout: float, extra: list[str]) -> tuple[int, list[Fault]]:
    """Run calls in a child process until it ends; return the number of the next call, and the faults."""
    command = [sys.executable, __file__, "--seed", str(seed), "--child", str(first), str(last), *extra]
    faults: list[Fault] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as child:
        assert child.stdout is not None
        current, at, rest, done = first, time.monotonic() + 60, b"", False
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, at - time.monotonic())):
                    child.kill()
                    faults.append(Fault(current, "hang", f"over {timeout:.0f} s"))
                    break
                read = os.read(child.stdout.fileno(), 1 << 16)
                if not read:
                    break
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    kind, _, more = line.decode(errors="replace").partition(" ")
                    if kind == "call":
                        current, at = int(more), time.monotonic() + timeout
                    elif kind == "fault":
                        number, what, text = more.split(" ", 2)
                        faults.append(Fault(int(number), what, text))
                    done = done or kind == "done"
        code = child.wait()
    if done:
        return last, faults
    if not faults or faults[-1].kind != "hang" or faults[-1].number != current:
        faults.append(Fault(current, "crash", f"exit status {code}"))
    return current + 1, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=60, help="seconds that one call may take")
    parser.add_argument("--chunk", type=int, default=2000, help="calls to a child")
    parser.add_argument("--only", type=int, help="make this call alone, here")
    parser.add_argument("--plant", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    planted = PLANTED if options.plant else {}
    if options.child:
        work(options.seed, *options.child, planted)
        return 0
    if options.only is not None:
        call = make_call(options.seed, options.only, planted)
        print(call)
        with contextlib.suppress(Exception):
            print(inspect.signature(getattr(rqkernels, call.name)))
        try:
            print("result:", run(copy.copy(call)))
        except Exception:
            traceback.print_exc()
        print("fault:", try_call(options.seed, options.only, planted))
        return 0
    extra = ["--plant"] if options.plant else []
    begin, end = options.first, options.first + options.calls
    counts: collections.Counter[str] = collections.Counter()
    while begin < end:
        begin, faults = run_child(options.seed, begin, min(begin + options.chunk, end), options.timeout, extra)
        for fault in faults:
            counts[fault.kind] += 1
            print(f"call {fault.number}: {fault.kind}: {fault.text}", flush=True)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "nothing"
    print(f"{options.calls} calls, seed {options.seed}: {found}")
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())
