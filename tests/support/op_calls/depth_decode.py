"""Calls of the transformer's step and of a position's codes, and of what both are packed into."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from random import Random
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

import rqkernels

from ._data import FLOATS, C, D, K, normal, rows_and_codes
from ._types import Agreement, Call, Derivative, Function, Twin

# --- decoders of random weights --------------------------------------------------------------------------


class Sizes(NamedTuple):
    width: int
    hidden: int
    heads: int
    codes: int
    layers: int
    depth: int
    per_depth: bool  # a classifier for each depth
    gain: float  # of the classifier
    seed: int


@cache
def decoder(device: torch.device, precision: str, sizes: Sizes) -> rqkernels.PackedDepthDecoder:
    """Decoder packed once for a device: what a captured call reads must exist before."""
    generator, s = Generator().manual_seed(sizes.seed), sizes

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device) / shape[-1] ** 0.5

    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        return weights(outputs, inputs), weights(outputs)

    def norm() -> tuple[Tensor, Tensor]:
        return weights(s.width), weights(s.width)

    def block() -> rqkernels.BlockWeights:
        attention = linear(3 * s.width, s.width), linear(s.width, s.width)
        mlp = linear(s.hidden, s.width), linear(s.width, s.hidden)
        parts = norm(), *attention, norm(), *mlp
        return rqkernels.BlockWeights(*(tensor for part in parts for tensor in part))

    blocks = [block() for _ in range(s.layers)]
    stack = rqkernels.PackedTransformer(blocks, s.heads, precision=precision, width=s.width, device=device)
    inputs = weights(s.depth, s.width), weights(s.codes, s.width)
    norm_weight, norm_bias = norm()
    classifier = s.gain * (weights(s.depth, s.codes, s.width) if s.per_depth else weights(s.codes, s.width))
    return rqkernels.PackedDepthDecoder(
        stack, *inputs, norm_weight=norm_weight, norm_bias=norm_bias, classifier_weight=classifier
    )


# --- calls -----------------------------------------------------------------------------------------------

CAPTURED = Sizes(width=C + 3, hidden=40, heads=2, codes=K, layers=2, depth=D, per_depth=False, gain=3.0, seed=9)


def _captured(x: Tensor, codebooks: Tensor, codes: Tensor) -> list[Tensor]:
    # Sums of float32 are not the CPU's to the last bit; the largest of K logits are.
    context = torch.cat([x.nan_to_num(), codebooks[:, :1, 0].T.expand(len(x), 3)], dim=1)
    settings = {"temperature": 0.0, "seed": 0}
    return [
        rqkernels.depth_decode(context, decoder(x.device, precision, CAPTURED), **settings)
        for precision in ("fp32", "bf16", "int8")
    ]


def _position_inputs(rows: int, width: int, generator: Generator) -> list[Tensor]:
    return [torch.randn(2 * rows, 3, width, generator=generator)]


def _position(precision: str, sizes: Sizes, x: Tensor) -> list[Tensor]:
    """Every call of the sampling of a position, after two tokens and one more: contexts, greedy codes, logits."""
    packed, k = decoder(x.device, precision, sizes), sizes.codes
    keys, values = x.new_zeros(2, sizes.layers, len(x), 1, 5, sizes.width)
    step = torch.ones(1, dtype=torch.int64, device=x.device)
    rqkernels.transformer_step(x[:, :2].contiguous(), packed.transformer, keys, values, 0)
    context = rqkernels.transformer_step(x[:, 2].contiguous(), packed.transformer, keys, values, 1, step=step)
    codes = rqkernels.depth_decode(context, packed, temperature=0.0, seed=0)
    guided = rqkernels.depth_decode(context, packed, temperature=0.0, guidance=0.5, seed=0, step=step)
    drawn = rqkernels.depth_decode(context, packed, top_k=1 + k // 2, top_p=0.9, seed=0)
    assert ((drawn >= 0) & (drawn < k)).all()
    # Of given codes, so that a code that falls on the other side of a rounding changes nothing else.
    given = torch.arange(len(x) * sizes.depth, device=x.device).view(-1, sizes.depth) % k
    return [context, codes, guided, rqkernels.depth_logits(context, given, packed)]


def _ragged() -> Iterator[Call]:
    """Shapes that fill no tile, with more than one block of rows; a decoder whose stack is the identity."""
    # Of two codes that are nearly as likely either may be the likeliest.
    # A step of int8's is 1/32639 of a row's largest.
    near = Agreement(atol=1e-4, scaled=True, codes=0.05)
    shapes = [(1, 5, 70, 40, 1), (40, 33, 9, 131, 2)]
    settings = [(precision, *shape) for shape in shapes for precision in ("fp32", "bf16", "int8")]
    for precision, rows, width, hidden, k, layers in [*settings, ("fp32", 3, 8, 4, 7, 0)]:
        sizes = Sizes(width, hidden, 1, k, layers, depth=3, per_depth=True, gain=5.0, seed=rows)
        where = f"{precision}, {rows} rows of width {width}"
        yield Call(where, partial(_position_inputs, rows, width), partial(_position, precision, sizes), near)
    yield Call("codes of a position", rows_and_codes, _captured, captured=True)


RAGGED = list(_ragged())


def _typical_inputs(batch: int, sizes: Sizes, generator: Generator) -> list[Tensor]:
    x = torch.randn(batch, sizes.width, generator=generator)
    caches = torch.randn(2, 1, batch, sizes.heads, 64, sizes.width // sizes.heads, generator=generator)
    return [x, *caches]


def _sample(sizes: Sizes, x: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
    packed = decoder(x.device, "bf16", sizes)
    context = rqkernels.transformer_step(x, packed.transformer, keys, values, 32)
    codes = rqkernels.depth_decode(context, packed, top_k=sizes.codes // 8, top_p=0.95, seed=0)
    return [rqkernels.depth_logits(context, codes, packed)]


def typical(device: torch.device, quick: bool) -> Iterator[Call]:
    """Sampling of 500 images of the 1.4B prior: a position of one block in each stack, and its codes."""
    rows, width, heads, k = (4, 16, 2, 32) if quick else (500, 1536, 24, 16384)
    sizes = Sizes(width, 4 * width, heads, k, layers=1, depth=4, per_depth=False, gain=5.0, seed=0)
    for batch in (1, rows):
        yield Call(f"batch {batch}", partial(_typical_inputs, batch, sizes), partial(_sample, sizes))


# --- valid arguments -------------------------------------------------------------------------------------


def block(width: int = 6, hidden: int = 8) -> rqkernels.BlockWeights:
    shapes = (
        *((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)),
        *((width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)),
    )
    return rqkernels.BlockWeights(*(0.3 * torch.randn(shape) for shape in shapes))


def stack_arguments() -> dict[str, Any]:
    return {"blocks": [block()], "heads": 2, "eps": 1e-5, "width": 6, "activation": "gelu", "precision": "fp32"}


def decoder_arguments(package: ModuleType) -> dict[str, Any]:
    return {
        "transformer": package.PackedTransformer(**stack_arguments()),
        "depth_positions": torch.randn(3, 6),
        "vectors": torch.randn(9, 6),
        "norm_weight": torch.ones(6),
        "norm_bias": torch.zeros(6),
        "classifier_weight": torch.randn(9, 6),
        "classifier_bias": torch.randn(9),
        "eps": 1e-5,
        "cumulative": True,
    }


def _step_arguments(package: ModuleType) -> dict[str, Any]:
    caches = {"keys": torch.zeros(1, 4, 2, 5, 3), "values": torch.zeros(1, 4, 2, 5, 3)}
    packed = package.PackedTransformer(**stack_arguments())
    return {"x": torch.randn(4, 6), "packed": packed, **caches, "length": 0, "step": torch.tensor(1)}


def _decode_arguments(package: ModuleType) -> dict[str, Any]:
    packed = package.PackedDepthDecoder(**decoder_arguments(package))
    settings = {"temperature": 0.9, "top_k": 3, "top_p": 0.8, "seed": 1, "offset": 2, "stream": 3}
    return {"context": torch.randn(4, 6), "decoder": packed, **settings, "step": torch.tensor(1), "guidance": 0.5}


def _logits_arguments(package: ModuleType) -> dict[str, Any]:
    packed = package.PackedDepthDecoder(**decoder_arguments(package))
    return {"context": torch.randn(4, 6), "codes": torch.randint(9, (4, 3)), "decoder": packed}


def _random_block(rng: Random, width: int, hidden: int) -> rqkernels.BlockWeights:
    dtype = rng.choice(FLOATS)

    def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor | None]:
        return normal(rng, outputs, inputs, dtype=dtype), rng.choice([None, normal(rng, outputs, dtype=dtype)])

    norm = (torch.ones(width), torch.zeros(width))
    return rqkernels.BlockWeights(
        *norm, *linear(3 * width, width), *linear(width, width), *norm, *linear(hidden, width), *linear(width, hidden)
    )


def _random_stack_arguments(rng: Random) -> dict[str, Any]:
    width = rng.choice([1, 6, 40])
    layers, hidden = rng.choice([0, 1, 2]), rng.choice([1, 2 * width])
    return {
        "blocks": [_random_block(rng, width, hidden) for _ in range(layers)],
        "heads": rng.choice([1, width]),
        "activation": rng.choice(["gelu", "quick_gelu"]),
        "precision": rng.choice(["fp32", "bf16", "int8"]),
        "eps": rng.choice([1e-5, 0.1]),
        "width": rng.choice([None, width]) if layers else width,
        "device": rng.choice([None, "cpu", torch.device("cpu")]),
    }


def random_stack(rng: Random) -> Twin:
    given = _random_stack_arguments(rng)
    return Twin(rqkernels.PackedTransformer(**given), rqkernels.reference.PackedTransformer(**given))


def _random_decoder_arguments(rng: Random) -> dict[str, Any]:
    transformer = random_stack(rng)
    width, depth, k = transformer.kernel.width, rng.choice([1, 3]), rng.choice([1, 9])
    per_depth = (depth,) if rng.random() < 0.5 else ()
    vectors = rng.choice([(k, width), (depth * k, width), (depth, k, width)])
    return {
        "transformer": transformer,
        "depth_positions": normal(rng, depth, width),
        "vectors": normal(rng, *vectors),
        "norm_weight": torch.ones(width),
        "norm_bias": torch.zeros(width),
        "classifier_weight": normal(rng, *per_depth, k, width),
        "classifier_bias": rng.choice([None, normal(rng, *per_depth, k)]),
        "cumulative": rng.random() < 0.5,
        "eps": 1e-5,
    }


def _random_decoder(rng: Random) -> Twin:
    given = _random_decoder_arguments(rng)
    of = [{**given, "transformer": twin} for twin in given["transformer"]]
    return Twin(rqkernels.PackedDepthDecoder(**of[0]), rqkernels.reference.PackedDepthDecoder(**of[1]))


def _random_step(rng: Random) -> dict[str, Any]:
    packed = random_stack(rng)
    kernel, batch, new = packed.kernel, rng.choice([0, 1, 3]), rng.choice([0, 1, 4])
    capacity, length = new + 3, rng.choice([0, 2])
    shape = (kernel.layers, batch, kernel.heads, capacity, kernel.width // kernel.heads)
    x = torch.randn(batch, new, kernel.width) if new != 1 else torch.randn(batch, kernel.width)
    keys, values = torch.randn(shape), torch.randn(shape)
    step = rng.choice([None, torch.tensor(1), torch.tensor([0])])
    return {"x": x, "packed": packed, "keys": keys, "values": values, "length": length, "step": step}


def _random_decode(rng: Random) -> dict[str, Any]:
    twin = _random_decoder(rng)
    depth, guidance = twin.kernel.depth, rng.choice([0.0, 0, 1.5])
    rows = rng.choice([0, 1, 5]) * (2 if guidance else 1)

    def per_depth(values: list[Any]) -> Any:
        return rng.choice([rng.choice(values), [rng.choice(values) for _ in range(depth)]])

    return {
        "context": torch.randn(rows, twin.kernel.transformer.width),
        "decoder": twin,
        "temperature": per_depth([0, 0.7, 1.0]),
        "top_k": per_depth([None, 1, 5, 10**6]),
        "top_p": per_depth([None, 0.5, 1.0]),
        "guidance": guidance,
        "seed": rng.choice([0, 2**64 - 1]),
        "offset": rng.choice([0, 3]),
        "stream": rng.choice([0, 8]),
        "step": rng.choice([None, torch.tensor(1)]),
    }


def _random_logits(rng: Random) -> dict[str, Any]:
    twin = _random_decoder(rng)
    rows = rng.choice([0, 1, 5])
    codes = torch.randint(twin.kernel.num_codes, (rows, twin.kernel.depth))
    return {"context": torch.randn(rows, twin.kernel.transformer.width), "codes": codes, "decoder": twin}


FUNCTIONS = {
    "PackedTransformer": Function(
        lambda package: stack_arguments(),
        _random_stack_arguments,
        integers={"heads": (1, None), "width": (1, 15)},
        numbers=("eps",),
    ),
    "PackedDepthDecoder": Function(
        decoder_arguments, _random_decoder_arguments, numbers=("eps",), flags=("cumulative",)
    ),
    "transformer_step": Function(_step_arguments, _random_step, results="products", integers={"length": (0, 63)}),
    "depth_decode": Function(
        _decode_arguments,
        _random_decode,
        results="drawn",
        integers={"top_k": (1, None), "seed": (0, 64), "offset": (0, 63), "stream": (0, 32)},
        numbers=("temperature", "top_p", "guidance"),
    ),
    "depth_logits": Function(_logits_arguments, _random_logits, results="products"),
}
DERIVATIVES: dict[str, Derivative] = {}
