"""Sampling with an RQ-Transformer, in plain PyTorch: one step of a stack, and all codes of one position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._arguments import (
    REFERENCE_DTYPES,
    check_choice,
    check_counter,
    check_device,
    check_elements,
    check_flag,
    check_float32,
    check_integer,
    check_temperature,
    check_tensor,
    check_top_k,
    check_top_p,
    check_writable,
    differ,
    may_overlap,
    shape_of,
    shapes_differ,
)
from .sample_logits import sample_logits

ACTIVATIONS = ("gelu", "quick_gelu")
PRECISIONS = ("fp32", "bf16", "int8")


class BlockWeights(NamedTuple):
    """Weights of one causal pre-norm block of width W, in the layout of `torch.nn.LayerNorm` and `torch.nn.Linear`."""

    attention_norm_weight: Tensor
    """(W,)"""
    attention_norm_bias: Tensor
    """(W,)"""
    qkv_weight: Tensor
    """(3 W, W): queries, keys, values; the channels of a head are contiguous."""
    qkv_bias: Tensor | None
    """(3 W,)"""
    out_weight: Tensor
    """(W, W)"""
    out_bias: Tensor | None
    """(W,)"""
    mlp_norm_weight: Tensor
    """(W,)"""
    mlp_norm_bias: Tensor
    """(W,)"""
    mlp_in_weight: Tensor
    """(H, W)"""
    mlp_in_bias: Tensor | None
    """(H,)"""
    mlp_out_weight: Tensor
    """(W, H)"""
    mlp_out_bias: Tensor | None
    """(W,)"""


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a linear layer's weight to symmetric int8, with one scale per output: `weight ~ q * scale`.

        scale_o = max_i |w_oi| / 127;   q_oi = round(w_oi / scale_o), ties to even; 0 if all weights of the output are 0

    Args:
        weight: (outputs, inputs), float32.

    Returns:
        q int8 (outputs, inputs) in [-127, 127], scale float32 (outputs,).
    """
    scale = weight.abs().amax(dim=1) / 127
    # The scale of a row of denormals can be 0: its weights become 0.
    divisor = torch.where(scale > 0, scale, torch.inf)
    quotient = weight / divisor[:, None]
    return quotient.round().clamp(-127, 127).to(torch.int8), scale


def rounded_weight(weight: Tensor, precision: str) -> Tensor:
    """Return the float32 values that a layer multiplies by at this precision."""
    weight = weight.detach().float()
    if precision == "bf16":
        return weight.bfloat16().float()
    if precision == "int8":
        q, scale = quantize_weight(weight)
        return q.float() * scale[:, None]
    return weight


# --- checks, for the kernels too -------------------------------------------------------------------------

CheckTensor = Callable[[str, str, object, "tuple[torch.dtype, ...]"], None]
MOST_LAYERS, MOST_WIDTH, MOST_DEPTH = 4096, 32768, 32768  # as in csrc/ops/depth_decode/op.cpp


class StackArguments(NamedTuple):
    """Checked arguments of a `PackedTransformer`."""

    blocks: list[BlockWeights]
    heads: int
    activation: str
    precision: str
    eps: float
    width: int
    hidden: int
    device: torch.device


def check_stack(
    blocks: object,
    heads: object,
    *,
    activation: object,
    precision: object,
    eps: object,
    width: object,
    device: object,
    dtypes: tuple[torch.dtype, ...],
    check: CheckTensor = check_tensor,
) -> StackArguments:
    op = "PackedTransformer"
    given = _blocks_of(op, blocks)
    activation = check_choice(op, "activation", activation, ACTIVATIONS)
    precision = check_choice(op, "precision", precision, PRECISIONS)
    heads, eps = check_integer(op, "heads", heads, 1), check_float32(op, "eps", eps)
    w = None if width is None else check_integer(op, "width", width, 1, or_none=True)
    place = None if device is None and given else _device_of(op, device)
    if not given and w is None:
        raise ValueError(f"{op}: no blocks: then width must be given")
    if len(given) > MOST_LAYERS:
        raise ValueError(f"{op}: blocks must be at most {MOST_LAYERS}, got {len(given)}")
    for layer, block in enumerate(given):
        for name, tensor in zip(block._fields, block, strict=True):
            if tensor is not None or not name.endswith("_bias") or "norm" in name:
                check(op, f"blocks[{layer}].{name}", tensor, dtypes)
    if given:
        w, hidden, place = _sizes_of(op, given[0], w, place)
    else:
        assert w is not None and place is not None
        if w > MOST_WIDTH:
            raise ValueError(f"{op}: width must be in [1, {MOST_WIDTH}], got {w}")
        hidden = min(4 * w, MOST_WIDTH)
    if w % heads:
        raise ValueError(f"{op}: heads must divide the width {w}, got {heads}")
    for layer, block in enumerate(given):
        _check_block(op, layer, block, w, hidden, place)
    return StackArguments(given, heads, activation, precision, eps, w, hidden, place)


def _blocks_of(op: str, blocks: object) -> list[BlockWeights]:
    if not isinstance(blocks, Iterable) or isinstance(blocks, (str, Tensor)):
        raise TypeError(f"{op}: blocks must be BlockWeights, one for each layer, got {type(blocks).__name__}")
    found, fields = [], len(BlockWeights._fields)
    for layer, block in enumerate(blocks):
        if not isinstance(block, (tuple, list)) or len(block) != fields:
            got = f"{len(block)} parts" if isinstance(block, (tuple, list)) else type(block).__name__
            raise TypeError(f"{op}: blocks[{layer}] must be BlockWeights of {fields} parts, got {got}")
        found.append(BlockWeights(*block))
    return found


def _device_of(op: str, device: object) -> torch.device:
    """Return the device with its index; None is torch's default device."""
    if device is not None and not isinstance(device, (str, torch.device)):
        raise TypeError(f"{op}: device must be a torch.device, a string or None, got {type(device).__name__}")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{op}: device must be one that this torch has, got {str(device)!r}: {reason}") from None


def _sizes_of(
    op: str, block: BlockWeights, width: int | None, device: torch.device | None
) -> tuple[int, int, torch.device]:
    norm, hidden = block.attention_norm_weight, block.mlp_in_weight
    if norm.dim() != 1 or not 1 <= norm.shape[0] <= MOST_WIDTH:
        raise ValueError(
            f"{op}: blocks[0].attention_norm_weight must be (W,) with 1 <= W <= {MOST_WIDTH}, got {tuple(norm.shape)}"
        )
    if hidden.dim() != 2 or not 1 <= hidden.shape[0] <= MOST_WIDTH:
        raise ValueError(
            f"{op}: blocks[0].mlp_in_weight must be (H, W) with 1 <= H <= {MOST_WIDTH}, got {tuple(hidden.shape)}"
        )
    if width is not None and norm.shape[0] != width:
        raise ValueError(f"{op}: width is {width}, the blocks' another")
    if norm.device.type == "meta":
        raise ValueError(f"{op}: blocks[0].attention_norm_weight must be on cpu or cuda, got meta")
    if device is not None and (device.type != norm.device.type or device.index not in (None, norm.device.index)):
        raise ValueError(f"{op}: device is {device}, the blocks are on {norm.device}")
    return norm.shape[0], hidden.shape[0], norm.device


def _check_block(op: str, layer: int, block: BlockWeights, w: int, h: int, device: torch.device) -> None:
    shapes = ((w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,), (w,), (w,), (h, w), (h,), (w, h), (w,))
    for name, tensor, shape in zip(block._fields, block, shapes, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(
                f"{op}: blocks[{layer}].{name} must be {shape} on {device}, got "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
        check_weights(op, f"blocks[{layer}].{name}", tensor)


def check_weights(op: str, name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor.detach()).all()):
        raise ValueError(f"{op}: {name} must be finite")


class DecoderArguments(NamedTuple):
    """Checked arguments of a `PackedDepthDecoder`."""

    depth: int
    num_codes: int
    cumulative: bool
    eps: float


def check_decoder(
    width: int,
    device: torch.device,
    tensors: dict[str, Any],
    *,
    cumulative: object,
    eps: object,
    dtypes: tuple[torch.dtype, ...],
    check: CheckTensor = check_tensor,
) -> DecoderArguments:
    """Check `tensors` by name, depth_positions first, against the width and device of the transformer."""
    op = "PackedDepthDecoder"
    cumulative, eps = check_flag(op, "cumulative", cumulative), check_float32(op, "eps", eps)
    depth_positions = tensors["depth_positions"]
    for name, tensor in tensors.items():
        check(op, name, tensor, dtypes)
        if tensor.device != depth_positions.device:
            raise ValueError(
                f"{op}: {name} must be on {depth_positions.device} like depth_positions, got {tensor.device}"
            )
    if device != depth_positions.device:
        raise ValueError(f"{op}: transformer is on {device}, not {depth_positions.device}")
    if device.type == "meta":
        raise ValueError(f"{op}: depth_positions must be on cpu or cuda, got meta")
    shape = tuple(depth_positions.shape)
    if len(shape) != 2 or not 1 <= shape[0] <= MOST_DEPTH or shape[1] != width:
        raise ValueError(f"{op}: depth_positions must be (D, {width}), 1 <= D <= {MOST_DEPTH}, got {shape}")
    depth, shape = shape[0], tuple(tensors["classifier_weight"].shape)
    if len(shape) not in (2, 3) or shape[-1] != width or shape[:-2] not in ((), (depth,)):
        raise ValueError(f"{op}: classifier_weight must be (K, {width}) or ({depth}, K, {width}), got {shape}")
    num_codes = shape[-2]
    if not 1 <= num_codes < 1 << 31:
        raise ValueError(f"{op}: classifier_weight must have 1 to 2^31 - 1 codes, got {shape}")
    expected: dict[str, list[tuple[int, ...]]] = {
        "vectors": [(num_codes, width), (depth * num_codes, width), (depth, num_codes, width)],
        "norm_weight": [(width,)],
        "norm_bias": [(width,)],
        "classifier_bias": [shape[:-1]],
    }
    for name, shapes in expected.items():
        if name in tensors and tuple(tensors[name].shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{op}: {name} must be {wanted}, got {tuple(tensors[name].shape)}")
    for name, tensor in tensors.items():
        check_elements(op, name, tensor)
        # A bias of -inf forbids its code.
        finite = tensor if name != "classifier_bias" else torch.where(tensor == -math.inf, 0, tensor)
        check_weights(op, name, finite)
    return DecoderArguments(depth, num_codes, cumulative, eps)


def check_step(op: str, step: Tensor | None) -> None:
    if step is not None:
        check_tensor(op, "step", step, (torch.int64,))


def check_step_shapes(
    op: str, x: Tensor, keys: Tensor, values: Tensor, length: int, step: Tensor | None, layers: int, heads: int
) -> None:
    """Check the arguments of a transformer's step with the messages of op.cpp."""
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x must be (B, W) or (B, n, W), got {shape_of(x)}")
    for name, tensor in (("x", x), ("keys", keys), ("values", values)):
        check_elements(op, name, tensor)
    batch, count, width = x.shape[0], x.shape[1] if x.dim() == 3 else 1, x.shape[-1]
    capacity = keys.shape[3] if keys.dim() == 5 else 0
    expected = (layers, batch, heads, capacity, width // heads)
    if shapes_differ(keys.shape, expected) or shapes_differ(values.shape, expected):
        raise ValueError(
            f"{op}: keys and values must be ({layers}, {batch}, {heads}, capacity, {width // heads}), "
            f"got {shape_of(keys)} and {shape_of(values)}"
        )
    known = all(isinstance(size, int) for size in (length, count, capacity))
    if known and not 0 <= length <= capacity - count:
        raise ValueError(f"{op}: length {length} and {count} new positions do not fit the keys' capacity {capacity}")
    for name, tensor in (("keys", keys), ("values", values)):
        check_device(op, "x", x, name, tensor)
        if tensor.dtype != x.dtype or not tensor.is_contiguous():
            dtype = str(x.dtype).removeprefix("torch.")
            raise ValueError(f"{op}: {name} must be contiguous {dtype}, got shape {shape_of(tensor)}")
    check_place_of_step(op, "x", x, step)


def check_place_of_step(op: str, name: str, like: Tensor, step: Tensor | None) -> None:
    if step is None:
        return
    check_device(op, name, like, "step", step)
    if differ(step.numel(), 1):
        raise ValueError(f"{op}: step must be one int64 number, got {shape_of(step)}")


def check_caches(op: str, keys: Tensor, values: Tensor) -> None:
    for name, tensor in (("keys", keys), ("values", values)):
        check_elements(op, name, tensor)
        check_writable(op, name, tensor)


def check_apart(op: str, x: Tensor, keys: Tensor, values: Tensor) -> None:
    if may_overlap(keys, values):
        raise ValueError(f"{op}: keys and values must not share memory")
    if may_overlap(x, keys) or may_overlap(x, values):
        raise ValueError(f"{op}: x must not share memory with keys or values")


def per_depth(op: str, name: str, value: object, depth: int, check: Callable[[str, object], Any]) -> list[Any]:
    """Expand one value, or a list of one per depth, to a list; check each."""
    if not isinstance(value, (list, tuple)):
        return [check(op, value)] * depth
    if len(value) != depth:
        raise ValueError(f"{op}: {name} must be one value, or {depth} (one per depth), got {len(value)}")
    return [check(op, one) for one in value]


class DecodeSettings(NamedTuple):
    """Checked sampling settings of `depth_decode`; lists have one value per depth."""

    temperature: list[float]
    top_k: list[int | None]
    top_p: list[float | None]
    guidance: float
    seed: int
    offset: int
    stream: int


def check_decode_settings(
    op: str,
    depth: int,
    *,
    temperature: object,
    top_k: object,
    top_p: object,
    guidance: object,
    seed: object,
    offset: object,
    stream: object,
) -> DecodeSettings:
    return DecodeSettings(
        per_depth(op, "temperature", temperature, depth, check_temperature),
        per_depth(op, "top_k", top_k, depth, check_top_k),
        per_depth(op, "top_p", top_p, depth, check_top_p),
        check_float32(op, "guidance", guidance),
        check_counter(op, "seed", seed, 64),
        check_counter(op, "offset", offset, 63),
        check_counter(op, "stream", stream, 32),
    )


def check_context(op: str, context: Tensor, width: int) -> None:
    check_elements(op, "context", context)
    if context.dim() != 2 or differ(context.shape[1], width):
        raise ValueError(f"{op}: context must be (B, {width}), got {shape_of(context)}")


def check_decode_shapes(
    op: str, context: Tensor, width: int, depth: int, guidance: float, offset: int, stream: int, step: Tensor | None
) -> int:
    """Check the arguments of a position's decoding with the messages of op.cpp; return the number of rows."""
    check_context(op, context, width)
    copies = 2 if guidance > 0 else 1
    if isinstance(context.shape[0], int) and context.shape[0] % copies:
        raise ValueError(f"{op}: context must be (2 B, W) with guidance, got {shape_of(context)}")
    rows = context.shape[0] // copies
    if isinstance(rows, int) and not 0 <= offset <= (1 << 63) - 1 - rows:
        raise ValueError(f"{op}: offset must be >= 0, and offset + rows below 2^63; got {offset} with {rows} rows")
    if not 0 <= stream <= (1 << 32) - depth:
        raise ValueError(f"{op}: stream must be >= 0, and stream + D at most 2^32; got {stream} with D = {depth}")
    check_place_of_step(op, "context", context, step)
    return rows


def check_given_codes(op: str, codes: Tensor, context: Tensor, depth: int) -> None:
    check_elements(op, "codes", codes)
    check_device(op, "context", context, "codes", codes)
    if shapes_differ(codes.shape, (context.shape[0], depth)):
        raise ValueError(f"{op}: codes must be contiguous int64 ({context.shape[0]}, {depth}), got {shape_of(codes)}")


# --- the definition --------------------------------------------------------------------------------------


class PackedTransformer:
    """Weights rounded to the precision, in their own layout; see `rqkernels.PackedTransformer`."""

    def __init__(
        self,
        blocks: Iterable[BlockWeights],
        heads: int,
        *,
        activation: str = "gelu",
        precision: str = "fp32",
        eps: float = 1e-5,
        width: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        given = check_stack(
            blocks,
            heads,
            activation=activation,
            precision=precision,
            eps=eps,
            width=width,
            device=device,
            dtypes=REFERENCE_DTYPES,
        )
        self.heads, self.activation, self.precision, self.eps = given.heads, activation, precision, given.eps
        self.width, self.hidden, self.layers, self.device = given.width, given.hidden, len(given.blocks), given.device
        self.blocks = [
            BlockWeights._make(
                tensor
                if tensor is None or tensor.dim() == 1
                else _rounded(f"PackedTransformer: blocks[{layer}].{name}", tensor, precision)
                for name, tensor in zip(block._fields, block, strict=True)
            )
            for layer, block in enumerate(given.blocks)
        ]


def _rounded(name: str, weight: Tensor, precision: str) -> Tensor:
    rounded = rounded_weight(weight, precision)
    check_rounded(name, rounded, precision)
    return rounded


def check_rounded(name: str, rounded: Tensor, precision: str) -> None:
    """Raise ValueError for weights that became infinite: bfloat16 rounds the largest float32 numbers to infinity."""
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(f"{name} must be finite in {precision}")


class PackedDepthDecoder:
    """Weights rounded to the precision, in their own layout; see `rqkernels.PackedDepthDecoder`."""

    def __init__(
        self,
        transformer: PackedTransformer,
        depth_positions: Tensor,
        vectors: Tensor,
        *,
        norm_weight: Tensor,
        norm_bias: Tensor,
        classifier_weight: Tensor,
        classifier_bias: Tensor | None = None,
        cumulative: bool = True,
        eps: float = 1e-5,
    ) -> None:
        op = "PackedDepthDecoder"
        if not isinstance(transformer, PackedTransformer):
            raise TypeError(f"{op}: transformer must be a PackedTransformer, got {type(transformer).__name__}")
        tensors = {
            "depth_positions": depth_positions,
            "vectors": vectors,
            "norm_weight": norm_weight,
            "norm_bias": norm_bias,
            "classifier_weight": classifier_weight,
            **({} if classifier_bias is None else {"classifier_bias": classifier_bias}),
        }
        given = check_decoder(
            transformer.width,
            transformer.device,
            tensors,
            cumulative=cumulative,
            eps=eps,
            dtypes=REFERENCE_DTYPES,
        )
        self.transformer, self.depth_positions = transformer, depth_positions
        self.vectors = vectors.reshape(-1, transformer.width)
        self.norm_weight, self.norm_bias = norm_weight, norm_bias
        self.depth, self.num_codes, self.cumulative, self.eps = given
        weights = classifier_weight if classifier_weight.dim() == 3 else [classifier_weight]
        self.classifier_weights = [rounded_weight(weight, transformer.precision) for weight in weights]
        for rounded in self.classifier_weights:
            check_rounded(f"{op}: classifier_weight", rounded, transformer.precision)
        self.classifier_biases: list[Tensor | None] = [None] * len(weights)
        if classifier_bias is not None:
            self.classifier_biases = list(classifier_bias) if classifier_weight.dim() == 3 else [classifier_bias]


@contextmanager
def _plainly(x: Tensor) -> Iterator[None]:
    """Disable gradients and autocast."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def transformer_step(
    x: Tensor, packed: PackedTransformer, keys: Tensor, values: Tensor, length: int, *, step: Tensor | None = None
) -> Tensor:
    """Run new positions through a stack of causal pre-norm blocks with a cache of keys and values.

        x <- x + out(attention(norm(x)));   x <- x + mlp_out(activation(mlp_in(norm(x))))

    Args:
        x: (B, W), or (B, n, W) for n new positions; float32 or float64, the dtype of all arithmetic.
        packed: the stack.
        keys, values: (layers, B, heads, capacity, W / heads), the dtype of x; those of the new positions are written
            after the first `length`.
        length: positions seen so far; `step`, one int64 number, is added to it.

    Returns:
        A tensor like x. No norm follows the last block.
    """
    op = "transformer_step"
    for name, tensor in (("x", x), ("keys", keys), ("values", values)):
        check_tensor(op, name, tensor, (torch.float32, torch.float64))
    if not isinstance(packed, PackedTransformer):
        raise TypeError(f"{op}: packed must be a PackedTransformer, got {type(packed).__name__}")
    length = check_integer(op, "length", length, -(1 << 63), 63)
    check_step(op, step)
    if x.dim() not in (2, 3) or x.shape[-1] != packed.width:
        raise ValueError(f"{op}: x must be (B, {packed.width}) or (B, n, {packed.width}), got {shape_of(x)}")
    check_elements(op, "x", x)
    check_caches(op, keys, values)
    check_step_shapes(op, x, keys, values, length, step, packed.layers, packed.heads)
    check_apart(op, x, keys, values)
    count, capacity = (x.shape[1] if x.dim() == 3 else 1), keys.shape[3]
    if step is not None and not 0 <= int(step) <= capacity - count - length:
        raise ValueError(
            f"{op}: length {length}, step {int(step)} and {count} new positions do not fit the keys' capacity "
            f"{capacity}"
        )
    with _plainly(x):
        return _step(x, packed, keys.detach(), values.detach(), length + (0 if step is None else int(step)))


def _step(x: Tensor, packed: PackedTransformer, keys: Tensor, values: Tensor, begin: int) -> Tensor:
    """Run the step with checked arguments."""
    shape = x.shape
    x = x if x.dim() == 3 else x[:, None]
    batch, new, width = x.shape
    end = begin + new
    for layer, w in enumerate(packed.blocks):
        normed = _norm(x, w.attention_norm_weight, w.attention_norm_bias, packed.eps)
        qkv = _linear(normed, w.qkv_weight, w.qkv_bias).view(batch, new, 3, packed.heads, width // packed.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        keys[layer, :, :, begin:end], values[layer, :, :, begin:end] = k, v
        # Position by position, and not by a mask: a weight of 0 times a later value that is NaN would be NaN.
        heads = torch.empty_like(q)
        for row in range(new):
            seen, at = begin + row + 1, slice(row, row + 1)
            scores = q[:, :, at] @ keys[layer, :, :, :seen].transpose(-1, -2) / (width // packed.heads) ** 0.5
            heads[:, :, at] = torch.softmax(scores, dim=-1) @ values[layer, :, :, :seen]
        x = x + _linear(heads.transpose(1, 2).reshape(batch, new, width), w.out_weight, w.out_bias)
        hidden = _linear(_norm(x, w.mlp_norm_weight, w.mlp_norm_bias, packed.eps), w.mlp_in_weight, w.mlp_in_bias)
        hidden = F.gelu(hidden) if packed.activation == "gelu" else hidden * torch.sigmoid(1.702 * hidden)
        x = x + _linear(hidden, w.mlp_out_weight, w.mlp_out_bias)
    return x.reshape(shape)


def _logits_by_depth(
    context: Tensor, decoder: PackedDepthDecoder, code_of: Callable[[Tensor, int], Tensor], copies: int
) -> list[Tensor]:
    """Return the logits (B, K) of each depth; code_of(logits, d) returns the codes to continue with."""
    packed, dtype = decoder.transformer, context.dtype
    head_dim = context.shape[1] // packed.heads
    shape = (len(packed.blocks), context.shape[0], packed.heads, decoder.depth, head_dim)
    keys, values = context.new_empty(shape), context.new_empty(shape)
    given, total, found = context, None, []
    for d in range(decoder.depth):
        state = _step(given + decoder.depth_positions[d].to(dtype), packed, keys, values, d)
        of = d if len(decoder.classifier_weights) > 1 else 0
        normed = _norm(state, decoder.norm_weight, decoder.norm_bias, decoder.eps)
        found.append(_linear(normed, decoder.classifier_weights[of], decoder.classifier_biases[of]))
        codes = code_of(found[-1], d)
        if d + 1 < decoder.depth:
            first = d * decoder.num_codes if decoder.vectors.shape[0] > decoder.num_codes else 0
            vectors = decoder.vectors[first + codes].to(dtype).repeat(copies, 1)
            total = vectors if total is None or not decoder.cumulative else total + vectors
            given = total
    return found


def depth_decode(
    context: Tensor,
    decoder: PackedDepthDecoder,
    *,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int | None] | None = None,
    top_p: float | Sequence[float | None] | None = None,
    guidance: float = 0.0,
    seed: int,
    offset: int = 0,
    stream: int = 0,
    step: Tensor | None = None,
) -> Tensor:
    """Sample the D codes of one position, one after another (Lee et al. 2022, equations 12-14).

        x_0 = context + positions[0];   x_d = sum_{d' < d} vectors[S_d'] + positions[d]
        S_d ~ sample_logits(classifier_d(norm(transformer(x_0 .. x_d)_d)))

    or, not cumulative, x_d = vectors[S_{d-1}] + positions[d].

    Args:
        context: (B, W), float32 or float64, the dtype of all arithmetic up to the logits. With guidance (2 B, W), the
            second half under the null condition: logits = (1 + guidance) * first half - guidance * second half.
        temperature, top_k, top_p: one value or one per depth, as in `sample_logits`.
        seed, offset, stream: depth d samples as `sample_logits(..., seed, offset, stream + d)` does; `step`, one int64
            number, adds step * D to the stream.

    Returns:
        int64 (B, D).
    """
    op = "depth_decode"
    _check_call(op, context, decoder)
    depth = decoder.depth
    given = check_decode_settings(
        op,
        depth,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance=guidance,
        seed=seed,
        offset=offset,
        stream=stream,
    )
    check_step(op, step)
    guidance, stream = given.guidance, given.stream
    rows = check_decode_shapes(op, context, decoder.transformer.width, depth, guidance, given.offset, stream, step)
    check_device(op, "context", context, "vectors", decoder.vectors)
    if step is not None:
        if not 0 <= int(step) <= ((1 << 32) - depth - stream) // depth:
            raise ValueError(
                f"{op}: step must be >= 0, and stream + (step + 1) D at most 2^32; got {int(step)} "
                f"with stream = {stream} and D = {depth}"
            )
        stream += int(step) * depth
    codes: list[Tensor] = []

    def sample(logits: Tensor, d: int) -> Tensor:
        if guidance:
            conditional, null = logits[:rows], logits[rows:]
            logits = (1 + guidance) * conditional - guidance * null
        bad = (~torch.isfinite(logits.amax(-1))).nonzero()
        if len(bad) > 0:
            raise ValueError(f"{op}: context: the logits of row {int(bad[0])} have NaN, +inf, or nothing but -inf")
        code = sample_logits(
            logits,
            temperature=given.temperature[d],
            top_k=given.top_k[d],
            top_p=given.top_p[d],
            seed=given.seed,
            offset=given.offset,
            stream=stream + d,
        )
        codes.append(code)
        return code

    with _plainly(context):
        _logits_by_depth(context, decoder, sample, 2 if guidance else 1)
    return torch.stack(codes, dim=1)


def depth_logits(context: Tensor, codes: Tensor, decoder: PackedDepthDecoder) -> Tensor:
    """Logits of every depth given the codes before it, computed as in `depth_decode`.

    Args:
        context: (B, W), float32 or float64, the dtype of all arithmetic.
        codes: int64 (B, D) in [0, K).

    Returns:
        (B, D, K), like context.
    """
    op = "depth_logits"
    _check_call(op, context, decoder)
    check_tensor(op, "codes", codes, (torch.int64,))
    check_context(op, context, decoder.transformer.width)
    check_device(op, "context", context, "vectors", decoder.vectors)
    check_given_codes(op, codes, context, decoder.depth)
    bad = codes[(codes < 0) | (codes >= decoder.num_codes)]
    if len(bad) > 0:
        raise IndexError(f"{op}: codes must be in [0, {decoder.num_codes}), got {int(bad[0])}")
    with _plainly(context):
        return torch.stack(_logits_by_depth(context, decoder, lambda _, d: codes[:, d], 1), dim=1)


def _check_call(op: str, context: object, decoder: object) -> None:
    check_tensor(op, "context", context, (torch.float32, torch.float64))
    if not isinstance(decoder, PackedDepthDecoder):
        raise TypeError(f"{op}: decoder must be a PackedDepthDecoder, got {type(decoder).__name__}")
