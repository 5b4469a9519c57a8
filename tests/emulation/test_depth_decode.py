"""The CUDA kernels of the transformer's step and of a position's codes, on the CPU, against the definition in float64.

At each precision the definition has the weights that the kernel has, so that what is compared is the arithmetic:
float32 for fp32 and bf16 (whose activations are two parts), integers of 15 bits for int8.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import rqkernels
from rqkernels import reference
from rqkernels.reference.depth_decode import PRECISIONS, BlockWeights

from .harness import Device, Emulation

# Relative to the largest. PyTorch's float32 is off by 3e-7 on these; what two parts leave of an activation is up to
# 4e-6 of it; a step of int8's is 1/32639 of a row's largest.
ERROR = {"fp32": 6e-7, "bf16": 1e-5, "int8": 1e-4}
H100 = Device()


def random_block(width: int, hidden: int, generator: torch.Generator, *, bias: bool = True) -> BlockWeights:
    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor | None]:
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        return weight, 0.1 * torch.randn(outputs, generator=generator) if bias else None

    def norm() -> tuple[Tensor, Tensor]:
        return 1 + 0.1 * torch.randn(width, generator=generator), 0.1 * torch.randn(width, generator=generator)

    return BlockWeights(
        *norm(),
        *linear(3 * width, width),
        *linear(width, width),
        *norm(),
        *linear(hidden, width),
        *linear(width, hidden),
    )


class Stack(NamedTuple):
    kernel: rqkernels.PackedTransformer
    truth: reference.PackedTransformer
    device: Device = H100

    @classmethod
    def random(
        cls, precision: str, width: int, hidden: int, heads: int, layers: int = 2, activation: str = "gelu",
        bias: bool = True,
    ) -> Stack:  # fmt: skip
        generator = torch.Generator().manual_seed(width + hidden)
        blocks = [random_block(width, hidden, generator, bias=bias) for _ in range(layers)]
        options = {"activation": activation, "precision": precision, "eps": 1e-5}
        kernel = rqkernels.PackedTransformer(blocks, heads, width=width, **options)
        return cls(kernel, reference.PackedTransformer(blocks, heads, width=width, **options))

    def arguments(self) -> dict[str, object]:
        """Arguments of both cases that describe the stack."""
        k = self.kernel
        names = {"activation": k.activation, "precision": k.precision}
        sizes = {"layers": k.layers, "hidden": k.hidden, "heads": k.heads, "eps": k.eps}
        return {"blocks": k._blocks.numpy(), **sizes, **names, "device": self.device}


def assert_close(ours: np.ndarray, truth: Tensor, precision: str) -> None:
    np.testing.assert_allclose(ours, truth.numpy(), rtol=0, atol=ERROR[precision] * max(1.0, float(truth.abs().max())))


def step(
    emulation: Emulation, stack: Stack, x: Tensor, keys: Tensor, values: Tensor, length: int, step: int | None = None
) -> list[np.ndarray]:
    return emulation.run(
        "transformer_step",
        x=x.numpy(),
        keys=keys.numpy(),
        values=values.numpy(),
        length=length,
        step=step,
        **stack.arguments(),
    )


def check_step(
    emulation: Emulation, stack: Stack, batch: int, new: int, length: int, capacity: int, add: int | None = None
) -> None:
    width, heads, layers = stack.kernel.width, stack.kernel.heads, stack.kernel.layers
    generator = torch.Generator().manual_seed(batch + new)
    x = torch.randn(batch, new, width, generator=generator)
    keys, values = torch.randn(2, layers, batch, heads, capacity, width // heads, generator=generator)
    begin = length + (add or 0)
    keys[:, :, :, begin:] = values[:, :, :, begin:] = torch.nan  # neither read nor, beyond the new ones, changed
    y, new_keys, new_values = step(emulation, stack, x, keys, values, length, add)
    true_keys, true_values = keys.double(), values.double()
    truth = reference.transformer_step(x.double(), stack.truth, true_keys, true_values, begin)
    assert_close(y, truth, stack.kernel.precision)
    for ours, given, expected in ((new_keys, keys, true_keys), (new_values, values, true_values)):
        end = begin + new
        assert_close(ours[:, :, :, begin:end], expected[:, :, :, begin:end], stack.kernel.precision)
        np.testing.assert_array_equal(ours[:, :, :, :begin], given[:, :, :, :begin].numpy())
        assert np.isnan(ours[:, :, :, end:]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_step(emulation: Emulation, precision: str) -> None:
    # One row; widths of no whole panel, three channels to a head.
    check_step(emulation, Stack.random(precision, 33, 70, 11, 1, "quick_gelu"), 1, 1, 5, 7)
    # Several new positions, more positions than lanes; no biases, heads of whole fours. Two tiles of rows.
    stack = Stack.random(precision, 40, 96, 2, 2, bias=False)
    check_step(emulation, stack, 3, 13 if emulation.build == "plain" else 3, 30, 47, add=1)


def test_steps_beyond_the_capacity(emulation: Emulation) -> None:
    stack, x = Stack.random("fp32", 4, 8, 1, 1), contexts(2, 4).view(2, 1, 4)
    keys = torch.randn(1, 2, 1, 3, 4)
    # No sum of these overflows into a place that is there.
    for length, add in ((0, -1), (0, 3), (0, 1 << 40), (2, -1), (2, 2**63 - 1), (2, 2**63 - 3), (2, -(2**63))):
        y, *caches = step(emulation, stack, x, keys, keys, length, add)
        assert np.isnan(y).all()
        assert all((cache == keys.numpy()).all() for cache in caches)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_wide_rows(emulation: Emulation, precision: str) -> None:
    # More channels than a block has threads, and than a warp holds of a head.
    check_step(emulation, Stack.random(precision, 300, 40, 2, 1), 1, 2, 0, 2)
    # More fours of hidden channels than threads.
    check_step(emulation, Stack.random(precision, 4, 1060, 1, 1), 1, 1, 0, 1)


class Decoder(NamedTuple):
    stack: Stack
    kernel: rqkernels.PackedDepthDecoder
    truth: reference.PackedDepthDecoder

    @classmethod
    def random(
        cls, stack: Stack, depth: int, num_codes: int, *, per_depth: bool = False, cumulative: bool = True
    ) -> Decoder:
        generator, width = torch.Generator().manual_seed(depth), stack.kernel.width
        several = (depth,) if per_depth else ()
        tensors = (
            torch.randn(depth, width, generator=generator),
            torch.randn(num_codes * (depth if per_depth else 1), width, generator=generator),
        )
        named = {
            "norm_weight": 1 + 0.1 * torch.randn(width, generator=generator),
            "norm_bias": 0.1 * torch.randn(width, generator=generator),
            "classifier_weight": torch.randn(*several, num_codes, width, generator=generator) / width**0.5,
            "classifier_bias": torch.randn(*several, num_codes, generator=generator) if per_depth else None,
        }
        options = {"cumulative": cumulative, "eps": 1e-6}
        return cls(
            stack,
            rqkernels.PackedDepthDecoder(stack.kernel, *tensors, **named, **options),
            reference.PackedDepthDecoder(stack.truth, *tensors, **named, **options),
        )

    def run(
        self, emulation: Emulation, context: Tensor, *, given: Tensor | None = None, guidance: float = 0.0,
        temperature: float | list[float] = 1.0, top_k: int | list[int] | None = None,
        top_p: float | list[float] | None = None, seed: int = 0, offset: int = 0, stream: int = 0,
        step: int | None = None,
    ) -> np.ndarray:  # fmt: skip
        k, depth = self.kernel, self.kernel.depth

        def by_depth(value: object, none: object, dtype: type) -> np.ndarray:
            values = value if isinstance(value, list) else [value] * depth
            return np.array([none if v is None else v for v in values], dtype=dtype)

        return emulation.run(
            "depth_decode",
            context=context.numpy(),
            **self.stack.arguments(),
            classifier=k._classifier.numpy(),
            classifiers=len(self.truth.classifier_weights),
            classifier_eps=k.eps,
            num_codes=k.num_codes,
            positions=k._positions.numpy(),
            vectors=k._vectors.numpy(),
            cumulative=k.cumulative,
            guidance=guidance,
            temperature=by_depth(temperature, 1.0, np.float64),
            top_k=by_depth(top_k, k.num_codes, np.int64),
            top_p=by_depth(top_p, 1.0, np.float64),
            seed=seed,
            offset=offset,
            stream=stream,
            step=step,
            given=None if given is None else given.numpy(),
        )[0]

    def check(self, emulation: Emulation, context: Tensor, **options: object) -> np.ndarray:
        codes = self.run(emulation, context, **options)
        truth = reference.depth_decode(
            context.double(),
            self.truth,
            **{k: torch.tensor([v]) if k == "step" else v for k, v in {"seed": 0, **options}.items()},
        )
        np.testing.assert_array_equal(codes, truth.numpy())
        return codes


def contexts(rows: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_codes(emulation: Emulation, precision: str) -> None:
    # The uniforms of these seeds are far enough from all boundaries for what rounding does to the logits.
    rows = 11 if emulation.build == "plain" else 2
    decoder = Decoder.random(Stack.random(precision, 33, 70, 3, 1), 3, 45)
    context = contexts(rows, 33)
    greedy = decoder.check(emulation, context, temperature=0.0)
    drawn = decoder.check(emulation, context, seed=(1 << 63) - 5, offset=7, stream=2, step=3)
    assert (drawn != greedy).any()
    given = torch.from_numpy(drawn)
    logits = decoder.run(emulation, context, given=given)
    assert_close(logits, reference.depth_logits(context.double(), given, decoder.truth), precision)


def test_one_of_everything_per_depth(emulation: Emulation) -> None:
    decoder = Decoder.random(Stack.random("fp32", 8, 8, 2, 1), 3, 40, per_depth=True, cumulative=False)
    options = {"temperature": [0.5, 1.0, 2.0], "top_k": [None, 5, 2], "top_p": [0.9, None, 0.5], "seed": 3}
    plain = decoder.check(emulation, contexts(5, 8), **options)
    guided = decoder.check(emulation, contexts(10, 8), guidance=1.5, **options)
    assert (plain != guided).any()


def test_a_stack_without_blocks(emulation: Emulation) -> None:
    decoder = Decoder.random(Stack.random("fp32", 5, 20, 1, 0), 2, 9)
    decoder.check(emulation, contexts(3, 5), temperature=0.0)


def test_rows_do_not_depend_on_those_beside_them(emulation: Emulation) -> None:
    # One row to a tile, 32 to a tile with one panel to a block, and with four: the same bits.
    rows, width = 70 if emulation.build == "plain" else 9, 40
    for precision in PRECISIONS if emulation.build == "plain" else ("int8",):
        stack = Stack.random(precision, width, 72, 2, 1)
        decoder = Decoder.random(stack, 2, 130)
        context, given = contexts(rows, width), torch.arange(2 * rows).view(rows, 2) % 130
        few_multiprocessors = decoder._replace(stack=stack._replace(device=Device(multiprocessors=1)))
        whole = decoder.run(emulation, context, given=given)
        np.testing.assert_array_equal(few_multiprocessors.run(emulation, context, given=given), whole)
        for row in (0, rows - 1):
            alone = decoder.run(emulation, context[row : row + 1], given=given[row : row + 1])
            np.testing.assert_array_equal(alone, whole[row : row + 1])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rows_without_codes(emulation: Emulation, precision: str) -> None:
    decoder = Decoder.random(Stack.random(precision, 8, 8, 2, 1), 3, 40)
    context = contexts(4, 8)
    clean = decoder.check(emulation, context, seed=3)
    context[1, 3], context[2, 0] = torch.nan, torch.inf
    codes = decoder.run(emulation, context, seed=3)
    assert (codes[[1, 2]] == -1).all()
    np.testing.assert_array_equal(codes[[0, 3]], clean[[0, 3]])
    given = torch.tensor([[0, 1, 2], [-1, 1, 2], [0, 40, 2], [0, 1, 40]])
    bad = np.isnan(decoder.run(emulation, contexts(4, 8), given=given)).all(-1)
    np.testing.assert_array_equal(bad, [[0, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
