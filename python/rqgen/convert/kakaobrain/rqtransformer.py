"""The published RQ-Transformer: its `arch` section and its tensor names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rqgen.config import from_dict
from rqgen.models.pretrained import sketch
from rqgen.models.rqtransformer import RQTransformer, RQTransformerConfig
from rqgen.models.state_dict import ForeignTensors
from rqgen.models.transformer import TransformerConfig
from rqgen.reading import shorten

_ACTIVATIONS = {"v1": "gelu", "v2": "quick_gelu"}
# The published model does not read these: a checkpoint computes the same with any value.
_WITHOUT_EFFECT = ("use_padding_emb", "scaled_head_emb_vqvae", "ar_hierarchy")


@dataclass
class PublishedBlock:
    """`arch.body.block` and `arch.head.block`, with the published defaults."""

    n_head: int
    embed_dim: int | None = None
    mlp_bias: bool = True
    attn_bias: bool = True
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.1
    gelu: str = "v1"


@dataclass
class PublishedStack:
    """`arch.body` and `arch.head`."""

    n_layer: int
    block: PublishedBlock


@dataclass
class PublishedArch:
    """`arch` of a prior, with the published defaults."""

    vocab_size: Any
    block_size: list[int]
    embed_dim: int
    body: PublishedStack
    head: PublishedStack
    type: str = "rq-transformer"
    ema: Any = None  # of the published trainer
    ar_hierarchy: bool | None = None
    vocab_size_cond: int = 0
    block_size_cond: int = 0
    input_embed_dim: int | None = None
    use_padding_emb: bool = False
    input_emb_vqvae: bool = False
    head_emb_vqvae: bool = False
    scaled_head_emb_vqvae: bool = False
    cumsum_depth_ctx: bool = False
    shared_tok_emb: bool = False
    shared_cls_emb: bool = False
    embd_pdrop: float = 0.0


def build_rqtransformer(
    arch: Mapping[str, Any], state_dict: Mapping[str, Tensor], codebooks: Tensor | None
) -> RQTransformer:
    """Return an `RQTransformer` with the published weights. Tensors that are float32 and laid out as ours are shared,
    not copied.

    Args:
        arch: the published section; every option of it is read, an unknown one refused.
        state_dict: the published tensors.
        codebooks: (K, C) or (D, K, C) of the tokenizer; None is enough for a prior that embeds codes with its
            own tables alone.

    Raises:
        ValueError: an option of `arch` that is unknown, missing or not supported; codebooks that are needed
            and missing, or do not fit; a tensor missing, unknown or of another shape, by its published name.
    """
    config = _config(arch, codebooks)
    model = sketch(RQTransformer, config, len(state_dict), where="arch")
    tensors = _translate(model, state_dict)
    if codebooks is not None:
        tensors["codebooks"] = codebooks
    model.load_state_dict({name: tensor.float().contiguous() for name, tensor in tensors.items()}, assign=True)
    return model


def _config(arch_options: Mapping[str, Any], codebooks: Tensor | None) -> RQTransformerConfig:
    arch = from_dict(PublishedArch, arch_options, where="arch")
    if arch.type.lower() != "rq-transformer":
        raise ValueError(f"arch.type: expected 'rq-transformer', got {arch.type!r}")
    if len(arch.block_size) != 3 or min(arch.block_size) < 1:
        raise ValueError(f"arch.block_size: expected three integers >= 1, got {arch.block_size}")
    for name in _WITHOUT_EFFECT:
        if getattr(arch, name):
            warnings.warn(f"arch.{name}: without effect in the published model, so here too", stacklevel=4)
    codebook_size = _codebook_size(arch)
    embeds_codebooks = arch.input_emb_vqvae or arch.head_emb_vqvae
    if codebooks is None:
        if embeds_codebooks:
            raise ValueError("codebooks: arch embeds codes with the tokenizer's codebooks, got None")
    else:
        depth, sizes = arch.block_size[2], tuple(codebooks.shape)
        if sizes[:-1] not in ((codebook_size,), (depth, codebook_size)):
            raise ValueError(
                f"codebooks: arch expects ({codebook_size}, C) or ({depth}, {codebook_size}, C), got {sizes}"
            )
        if embeds_codebooks and sizes[-1] != arch.input_embed_dim:
            raise ValueError(f"arch.input_embed_dim: expected the codebooks' {sizes[-1]}, got {arch.input_embed_dim}")
    vocab_size_cond, length_cond = max(arch.vocab_size_cond, 1), max(arch.block_size_cond, 1)
    if length_cond > 1 and vocab_size_cond == 1:
        raise ValueError(
            f"arch.vocab_size_cond: expected > 1 for a condition of {length_cond} tokens, got {arch.vocab_size_cond}"
        )
    # One row of condition embedding is a start symbol, no condition.
    condition = "none" if vocab_size_cond == 1 else "class" if length_cond == 1 else "tokens"
    return RQTransformerConfig(
        code_shape=(arch.block_size[0], arch.block_size[1], arch.block_size[2]),
        codebook_size=codebook_size,
        code_dim=0 if codebooks is None else codebooks.shape[-1],
        shared_codebook=codebooks is None or codebooks.dim() == 2,
        embed_dim=arch.embed_dim,
        spatial=_stack_config(arch.body, arch.embed_dim, "arch.body"),
        depth=_stack_config(arch.head, arch.embed_dim, "arch.head"),
        spatial_embedding="codebook" if arch.input_emb_vqvae else "table",
        depth_embedding="codebook" if arch.head_emb_vqvae else "table",
        shared_table=arch.shared_tok_emb,
        # The published model sums up code vectors only, never rows of its own table.
        depth_context="cumulative" if arch.cumsum_depth_ctx and arch.head_emb_vqvae else "previous",
        shared_classifier=arch.shared_cls_emb,
        condition=condition,
        condition_vocab_size=0 if condition == "none" else vocab_size_cond,
        condition_length=length_cond,
        embedding_dropout=arch.embd_pdrop,
    )


def _codebook_size(arch: PublishedArch) -> int:
    depth, per_depth = arch.block_size[2], isinstance(arch.vocab_size, list)
    sizes = arch.vocab_size if per_depth else [arch.vocab_size]
    if len(sizes) != (depth if per_depth else 1) or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(
            f"arch.vocab_size: expected an integer >= 1, or one per depth ({depth}), got {shorten(arch.vocab_size)}"
        )
    if len(set(sizes)) > 1:
        raise ValueError(f"arch.vocab_size: sizes that differ by depth are not supported, got {shorten(sizes)}")
    return sizes[0]


def _stack_config(stack: PublishedStack, embed_dim: int, name: str) -> TransformerConfig:
    block = stack.block
    if block.embed_dim not in (None, embed_dim):
        raise ValueError(f"{name}.block.embed_dim: expected arch.embed_dim, {embed_dim}, got {block.embed_dim}")
    if block.gelu not in _ACTIVATIONS:
        raise ValueError(f"{name}.block.gelu: expected one of {', '.join(_ACTIVATIONS)}, got {block.gelu!r}")
    return TransformerConfig(
        layers=stack.n_layer,
        heads=block.n_head,
        activation=_ACTIVATIONS[block.gelu],
        attention_bias=block.attn_bias,
        mlp_bias=block.mlp_bias,
        attention_dropout=block.attn_pdrop,
        residual_dropout=block.resid_pdrop,
    )


def _translate(model: RQTransformer, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our names with the published tensors, for everything but the codebooks."""
    config = model.config
    width, depth, positions = config.embed_dim, model.depth, model.positions
    foreign = ForeignTensors(state_dict)

    def take(name: str, *shape: int) -> Tensor:
        return foreign.take(name, shape)

    def take_layer(ours: str, published: str, *weight_shape: int, bias: bool = True) -> dict[str, Tensor]:
        layer = {f"{ours}.weight": take(f"{published}.weight", *weight_shape)}
        if bias:
            layer[f"{ours}.bias"] = take(f"{published}.bias", weight_shape[0])
        return layer

    tensors = {
        "condition_positions": take("pos_emb_cond", 1, config.condition_length, width)[0],
        # The published table has a row for the last position's stack, which is not an input.
        "spatial_positions": take("pos_emb_hw", 1, positions, width)[0, : positions - 1],
        "depth_positions": take("pos_emb_d", 1, depth, width)[0],
        "condition_embedding.weight": take("cond_emb.weight", max(config.condition_vocab_size, 1), width),
    }
    if config.spatial_embedding == "codebook":
        tensors |= take_layer("spatial_projection", "input_mlp", width, config.code_dim)
        # Published: the sum over depths of a linear layer. Ours: a linear layer of the sum.
        tensors["spatial_projection.bias"] = tensors["spatial_projection.bias"] * depth
    if config.depth_embedding == "codebook":
        tensors |= take_layer("depth_projection", "head_mlp", width, config.code_dim)
    if "table" in (config.spatial_embedding, config.depth_embedding):
        tables = 1 if config.shared_table else depth
        tensors["table.weight"] = take("tok_emb.weight", tables * config.codebook_size, width)
        if not config.shared_table:
            foreign.drop("tok_emb.offsets", (depth,), lambda offsets: _fault_of_offsets(offsets, config.codebook_size))

    tensors |= take_layer("classifier.norm", "classifier.layer_norm", width)
    size = config.codebook_size
    if config.shared_classifier:
        tensors |= take_layer("classifier", "classifier.linear", size, width)
    else:
        tensors["classifier.weight"] = take("classifier.linear.weight", depth, width, size).transpose(1, 2)
        tensors["classifier.bias"] = take("classifier.linear.bias", depth, size)
    if config.condition == "tokens":
        tensors |= take_layer("condition_classifier.0", "cond_classifier.layer_norm", width)
        tensors |= take_layer("condition_classifier.1", "cond_classifier.linear", config.condition_vocab_size, width)
    for ours, published, stack in (
        ("spatial_transformer", "body_transformer", config.spatial),
        ("depth_transformer", "head_transformer", config.depth),
    ):
        for layer in range(stack.layers):
            our, their = f"{ours}.blocks.{layer}.", f"{published}.blocks.{layer}."
            tensors |= take_layer(our + "attention_norm", their + "ln1", width)
            tensors |= take_layer(our + "mlp_norm", their + "ln2", width)
            qkv = [
                take_layer("qkv", f"{their}attn.{part}", width, width, bias=stack.attention_bias)
                for part in ("query", "key", "value")
            ]
            for name in qkv[0]:
                tensors[f"{our}attention.{name}"] = torch.cat([part[name] for part in qkv])
            attention_bias, mlp_bias = stack.attention_bias, stack.mlp_bias
            tensors |= take_layer(our + "attention.out", their + "attn.proj", width, width, bias=attention_bias)
            tensors |= take_layer(our + "mlp.0", their + "mlp.0", 4 * width, width, bias=mlp_bias)
            tensors |= take_layer(our + "mlp.2", their + "mlp.2", width, 4 * width, bias=mlp_bias)
    foreign.finish("arch")
    return tensors


def _fault_of_offsets(offsets: Tensor, codebook_size: int) -> str | None:
    found = offsets.tolist()
    expected = [d * codebook_size for d in range(len(found))]
    return None if found == expected else f"expected multiples of vocab_size, got {shorten(found)}"
