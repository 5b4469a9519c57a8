"""Sampling with an RQ-Transformer: one step of a transformer stack, and all codes of one position in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._arguments import FLOAT_DTYPES, check_device, check_elements, check_integer, shape_of, signed_seed
from .._library import call, check_tensor
from ..reference.depth_decode import (
    BlockWeights,
    check_caches,
    check_decode_settings,
    check_decode_shapes,
    check_decoder,
    check_given_codes,
    check_rounded,
    check_stack,
    check_step_shapes,
    quantize_weight,
    rounded_weight,
)

_PANEL = 32  # kOutputPanel of csrc/ops/depth_decode/params.h, which describes the packed layout
_LAYERS = ("qkv", "out", "mlp_in", "mlp_out")


class PackedTransformer:
    """Weights of a stack of causal pre-norm blocks, packed once for `transformer_step` and `depth_decode`.

    They are copied in the order in which the kernels read them: each call streams them once, whatever the batch. At
    precision

    - "fp32" they are unchanged;
    - "bf16" they are rounded to bfloat16 and multiplied as float32 (on a GPU each activation is the sum of two
      bfloat16, with an error of at most 2^-18): half the bytes;
    - "int8" they become integers in [-127, 127] with one float32 scale per output,
      `scale_o = max_i |w_oi| / 127` (`quantize_weight` in rqkernels/reference/depth_decode.py): a quarter of the bytes.
      Activations are rounded to integers in [-32639, 32639] with one scale per row, and products are exact, so that the
      rounding of the weights is the only visible error.

    Norms, biases, activations, keys, values and attention are float32 throughout. For a few rows the time is that of
    reading the weights, so fewer bytes are faster; for many rows int8 is the fastest with AVX-512 VNNI, float32
    without.

    Args:
        blocks: one `BlockWeights` per layer, float32, float16 or bfloat16, all on one device; at least one unless
            `width` is given.
        heads: must divide the width.
        activation: "gelu" (exact) or "quick_gelu", `x * sigmoid(1.702 x)`.
        precision: "fp32", "bf16" or "int8".
        eps: of the norms.
        width, device: of a stack without blocks, which is the identity (default: torch's default device).

    Raises:
        TypeError: a weight that is not a tensor of these dtypes, a setting of another type.
        ValueError: shapes or devices that do not match, weights that are not finite (at this precision), an unknown
            activation or precision, a width outside of [1, 32768], eps negative or not finite in float32.
    """

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
            dtypes=FLOAT_DTYPES,
            check=check_tensor,
        )
        self.layers, self.heads, self.width, self.hidden = len(given.blocks), given.heads, given.width, given.hidden
        self.activation, self.precision, self.eps = given.activation, given.precision, given.eps
        parts, errors = [], _Errors()
        for layer, block in enumerate(given.blocks):
            name = f"PackedTransformer: blocks[{layer}]."
            parts += [_vector(block.attention_norm_weight), _vector(block.attention_norm_bias)]
            parts += _linear(block.qkv_weight, block.qkv_bias, precision, errors, "qkv", name)
            parts += _linear(block.out_weight, block.out_bias, precision, errors, "out", name)
            parts += [_vector(block.mlp_norm_weight), _vector(block.mlp_norm_bias)]
            parts += _linear(block.mlp_in_weight, block.mlp_in_bias, precision, errors, "mlp_in", name)
            parts += _linear(block.mlp_out_weight, block.mlp_out_bias, precision, errors, "mlp_out", name)
        self._blocks = (
            _joined("PackedTransformer", parts) if parts else torch.empty(0, dtype=torch.uint8, device=given.device)
        )
        self.quantization_error: dict[str, float] = errors.relative()
        """Relative error `|rounded - weight| / |weight|` (Frobenius) over all blocks, by kind of layer: "qkv", "out",
        "mlp_in", "mlp_out"."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._blocks.nbytes

    def _arguments(self) -> tuple[int, int, int, str, str, float]:
        return self.layers, self.hidden, self.heads, self.activation, self.precision, self.eps

    def __repr__(self) -> str:
        return (
            f"PackedTransformer({self.layers} layers, width {self.width}, {self.heads} heads, {self.precision}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )


class PackedDepthDecoder:
    """Weights of `depth_decode`, packed once: a depth transformer, its input embedding and its classifier.

    Args:
        transformer: the depth stack; its precision is also the classifier's.
        depth_positions: (D, W), added to the input of each depth. If the vectors come from a linear layer with a bias,
            add that bias here, in rows 1 .. D-1.
        vectors: (K, W), or (D, K, W) or (D * K, W) with one block per depth: the input embedding of each code at width
            W, such as `linear(codebook, projection)`. Kept in float32: a call reads one row per code, whereas
            projecting the sum of codes would read the whole projection at every depth.
        norm_weight, norm_bias: (W,), of the LayerNorm before the classifier.
        classifier_weight: (K, W) for all depths, or (D, K, W).
        classifier_bias: (K,) or (D, K), or None.
        cumulative: if True, the input of depth d is the sum of the vectors of all previous codes, added in depth order
            (Lee et al. 2022, equation 12); if False, the vector of the last code.
        eps: of the norm.

    All tensors are float32, float16 or bfloat16 on one device; they are copied.

    Raises:
        TypeError: transformer not a `PackedTransformer`, a tensor of another dtype, a setting of another type.
        ValueError: shapes or devices that do not match, values that are not finite (except a bias of -inf, which
            forbids its code), eps negative or not finite in float32.
    """

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
        width = transformer.width
        given = check_decoder(
            width,
            transformer._blocks.device,
            tensors,
            cumulative=cumulative,
            eps=eps,
            dtypes=FLOAT_DTYPES,
            check=check_tensor,
        )
        self.transformer = transformer
        self.depth, self.num_codes, self.cumulative, self.eps = given
        self._per_depth = classifier_weight.dim() == 3
        self._positions, self._vectors = (
            tensor.detach().reshape(-1, width).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            for tensor in (depth_positions, vectors)
        )
        parts, errors = [_vector(norm_weight), _vector(norm_bias)], _Errors()
        weights = classifier_weight if self._per_depth else classifier_weight[None]
        biases = [None] * len(weights) if classifier_bias is None else classifier_bias.reshape(len(weights), -1)
        for weight, bias in zip(weights, biases, strict=True):
            parts += _linear(weight, bias, transformer.precision, errors, "classifier", f"{op}: ")
        self._classifier = _joined(op, parts)
        self.quantization_error: dict[str, float] = {**transformer.quantization_error, **errors.relative()}
        """Errors of the transformer, and of "classifier"."""

    @property
    def nbytes(self) -> int:
        """Bytes held, those of its transformer included."""
        return self.transformer.nbytes + self._classifier.nbytes + self._vectors.nbytes + self._positions.nbytes

    def __repr__(self) -> str:
        return (
            f"PackedDepthDecoder(D={self.depth}, K={self.num_codes}, {self.transformer!r}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )


def transformer_step(
    x: Tensor,
    packed: PackedTransformer,
    keys: Tensor,
    values: Tensor,
    length: int,
    *,
    step: Tensor | None = None,
) -> Tensor:
    """Run new positions through a stack of causal pre-norm blocks with a cache of keys and values.

        x <- x + out(attention(norm(x)));   x <- x + mlp_out(activation(mlp_in(norm(x))))
        attention: softmax(q k^T / sqrt(W / heads)) v over the positions up to and including its own

    Weights are read once for up to 64 rows (B * n; whole sequences of n), and once per block of 64 rows beyond that; on
    a GPU once in all. On one kind of device a row's result is the same to the last bit for every batch size, position
    in the batch and thread count. Nothing is concatenated or reallocated. `rqkernels.reference.transformer_step` is the
    definition in plain PyTorch.

    Not differentiable. No norm follows the last block.

    Args:
        x: float32 (B, W), or (B, n, W) for n new positions.
        packed: the stack.
        keys, values: float32 (layers, B, heads, capacity, W / heads), contiguous; those of the new positions are
            written in place after the first `length`. Later entries are neither read nor changed.
        length: positions seen so far, 0 .. capacity - n.
        step: one int64 number on the device of x, added to `length`, so that a captured CUDA graph can be replayed for
            the next position. (On a GPU it is not read back: if it exceeds the capacity the result is NaN.)

    Returns:
        float32, the shape of x.

    Raises:
        TypeError: another dtype, packed not a `PackedTransformer`, length not an integer.
        ValueError: shapes or devices that do not match; keys or values that are not contiguous, share memory with one
            another or with x, cannot be written, or are full.
    """
    op = "transformer_step"
    for name, tensor in (("x", x), ("keys", keys), ("values", values)):
        check_tensor(op, name, tensor, (torch.float32,))
    if not isinstance(packed, PackedTransformer):
        raise TypeError(f"{op}: packed must be a PackedTransformer, got {type(packed).__name__}")
    length = check_integer(op, "length", length, -(1 << 63), 63)
    _check_step(op, step)
    if x.dim() not in (2, 3) or x.shape[-1] != packed.width:
        raise ValueError(f"{op}: x must be (B, {packed.width}) or (B, n, {packed.width}), got {shape_of(x)}")
    check_elements(op, "x", x)
    check_caches(op, keys, values)
    return call(
        op,
        torch.ops.rqkernels.transformer_step,
        x.detach(),
        packed._blocks,
        keys.detach(),
        values.detach(),
        length,
        step,
        *packed._arguments(),
    )


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
    """Sample the D codes of one position, one after another, in one call (Lee et al. 2022, equations 12-14).

        x_0 = context + positions[0];   x_d = sum_{d' < d} vectors[S_d'] + positions[d]
        S_d ~ sample_logits(classifier_d(norm(transformer(x_0 .. x_d)_d)))

    or, if the decoder is not cumulative, x_d = vectors[S_{d-1}] + positions[d].

    Embedding, transformer, classifier and sampling of all depths run without returning to Python; the only temporaries
    are keys and values of the D inputs and the logits of one depth. Weights are read once per depth for up to 64 rows
    (32 with guidance), and once per block of as many beyond that; on a GPU once in all. There a call is a fixed
    sequence of launches without a host sync, which a CUDA graph can capture. A row's codes are the same for every batch
    size, position in the batch and thread count. `rqkernels.reference.depth_decode` is the definition in plain PyTorch.

    Args:
        context: float32 (B, W): the position's context, from the spatial transformer. With guidance (2 B, W): the
            second half is the same rows under the null condition.
        decoder: weights.
        temperature, top_k, top_p: one value, or a list of one per depth; as in `rqkernels.reference.sample_logits`.
        guidance: g >= 0: logits = (1 + g) * conditional - g * null (Ho and Salimans 2022); 0 is off.
        seed: 0 <= seed < 2^64.
        offset: index of the first row, >= 0.
        stream: depth d samples as `sample_logits(..., seed=seed, offset=offset, stream=stream + d)` does.
        step: one int64 number on the device of context; adds step * D to the stream, so that a captured CUDA graph can
            be replayed for the next position. (On a GPU it is not read back: a stream beyond 2^32 wraps around.)

    Returns:
        int64 (B, D). On a GPU a row is -1 from the first depth on whose logits have NaN, +inf or only -inf.

    Raises:
        TypeError: context not float32, decoder not a `PackedDepthDecoder`, or a non-numeric setting.
        ValueError: shapes or devices that do not match, a setting out of range; on a CPU logits with NaN, +inf or only
            -inf.
    """
    op = "depth_decode"
    _check_context(op, context, decoder)
    given = check_decode_settings(
        op,
        decoder.depth,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance=guidance,
        seed=seed,
        offset=offset,
        stream=stream,
    )
    _check_step(op, step)
    return _call(
        op,
        context,
        decoder,
        given.temperature,
        [decoder.num_codes if value is None else value for value in given.top_k],
        [1.0 if value is None else value for value in given.top_p],
        given.guidance,
        signed_seed(given.seed),
        given.offset,
        given.stream,
        step,
        None,
    )[0]


def depth_logits(context: Tensor, codes: Tensor, decoder: PackedDepthDecoder) -> Tensor:
    """Logits of every depth given the codes before it, bit for bit those that `depth_decode` samples from.

    Not differentiable: context is detached.

    Args:
        context: float32 (B, W), as in `depth_decode`, without guidance.
        codes: int64 (B, D) in [0, K). On a GPU they are not checked: after one out of range the logits are NaN.
        decoder: weights.

    Returns:
        float32 (B, D, K).

    Raises:
        TypeError: another dtype, decoder not a `PackedDepthDecoder`.
        ValueError, IndexError: shapes or devices that do not match, a code out of range (on a CPU).
    """
    op = "depth_logits"
    _check_context(op, context, decoder)
    check_tensor(op, "codes", codes, (torch.int64,))
    return _call(op, context, decoder, [], [], [], 0.0, 0, 0, 0, None, codes)[1]


def _call(op: str, context: Tensor, decoder: PackedDepthDecoder, *options: object) -> tuple[Tensor, Tensor]:
    return call(
        op,
        torch.ops.rqkernels.depth_decode,
        context.detach(),
        decoder.transformer._blocks,
        decoder._classifier,
        decoder._positions,
        decoder._vectors,
        decoder.num_codes,
        decoder._per_depth,
        decoder.cumulative,
        *decoder.transformer._arguments(),
        decoder.eps,
        *options,
    )


@torch.library.register_fake("rqkernels::transformer_step")
def _fake_step(
    x: Tensor,
    blocks: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    step: Tensor | None,
    layers: int,
    hidden: int,
    heads: int,
    *_: object,
) -> Tensor:
    check_step_shapes("transformer_step", x, keys, values, length, step, layers, heads)
    check_device("transformer_step", "x", x, "blocks", blocks)
    return x.new_empty(x.shape)


@torch.library.register_fake("rqkernels::depth_decode")
def _fake_decode(
    context: Tensor,
    blocks: Tensor,
    classifier: Tensor,
    depth_positions: Tensor,
    vectors: Tensor,
    num_codes: int,
    classifier_per_depth: bool,
    cumulative: bool,
    layers: int,
    hidden: int,
    heads: int,
    activation: str,
    precision: str,
    eps: float,
    classifier_eps: float,
    temperature: list[float],
    top_k: list[int],
    top_p: list[float],
    guidance: float,
    seed: int,
    offset: int,
    stream: int,
    step: Tensor | None,
    codes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    op = "depth_decode" if codes is None else "depth_logits"
    depth, width = depth_positions.shape
    rows = check_decode_shapes(op, context, width, depth, guidance, offset, stream, step)
    for name, tensor in (("blocks", blocks), ("depth_positions", depth_positions), ("vectors", vectors)):
        check_device(op, "context", context, name, tensor)
    if codes is not None:
        check_given_codes(op, codes, context, depth)
    drawn = context.new_empty((rows, depth) if codes is None else (0,), dtype=torch.int64)
    return drawn, context.new_empty((0,) if codes is None else (rows, depth, num_codes))


# --- packing ---------------------------------------------------------------------------------------------


class _Errors:
    """Squared norms of weights and of their rounding errors, by kind of layer."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, kind: str, rounded: Tensor, weight: Tensor) -> None:
        lost, whole = self._sums.get(kind, (0.0, 0.0))
        lost += float((rounded - weight).double().square().sum())
        whole += float(weight.double().square().sum())
        self._sums[kind] = lost, whole

    def relative(self) -> dict[str, float]:
        return {kind: (lost / whole) ** 0.5 if whole > 0 else 0.0 for kind, (lost, whole) in self._sums.items()}


def _joined(op: str, parts: list[Tensor]) -> Tensor:
    packed = torch.cat(parts)
    return call(op, torch.ops.rqkernels.copy_to_large_pages, packed) if packed.device.type == "cpu" else packed


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8).flatten()


def _vector(values: Tensor) -> Tensor:
    padding = -values.shape[0] % _PANEL
    return _bytes(torch.nn.functional.pad(values.detach().float(), (0, padding)))


def _linear(
    weight: Tensor, bias: Tensor | None, precision: str, errors: _Errors, kind: str, owner: str
) -> list[Tensor]:
    """Pack a linear layer into parts; `owner` begins the name of its weight in an error."""
    weight = weight.detach().float()
    outputs, inputs = weight.shape
    rounded = rounded_weight(weight, precision)
    check_rounded(f"{owner}{kind}_weight", rounded, precision)
    errors.add(kind, rounded, weight)
    scales = []
    if precision == "int8":
        weight, scale = quantize_weight(weight)
        scales = [_vector(scale)]
    weight = torch.nn.functional.pad(weight, (0, -inputs % _PANEL, 0, -outputs % _PANEL))
    if precision == "fp32":
        panels = weight.view(-1, _PANEL, weight.shape[1]).transpose(1, 2)
    elif precision == "bf16":
        panels = weight.bfloat16().view(-1, 2, _PANEL // 2, weight.shape[1]).permute(0, 3, 2, 1)
    else:
        panels = weight.view(-1, _PANEL, weight.shape[1] // 4, 4).transpose(1, 2)
        panels = (panels.to(torch.int16) + 128).to(torch.uint8)
    return [_bytes(panels), *scales, _vector(weight.new_zeros(outputs) if bias is None else bias)]


# --- checks ----------------------------------------------------------------------------------------------


def _check_context(op: str, context: Tensor, decoder: PackedDepthDecoder) -> None:
    check_tensor(op, "context", context, (torch.float32,))
    if not isinstance(decoder, PackedDepthDecoder):
        raise TypeError(f"{op}: decoder must be a PackedDepthDecoder, got {type(decoder).__name__}")


def _check_step(op: str, step: Tensor | None) -> None:
    if step is not None:
        check_tensor(op, "step", step, (torch.int64,))
