"""The published VAR and its tokenizer (Tian et al. 2024): constructor arguments and tensor names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rqgen.config import from_dict
from rqgen.models import VAR, MultiScaleVQVAE, MultiScaleVQVAEConfig, VARConfig
from rqgen.models.pickles import check_state_dict, unpickle
from rqgen.models.pretrained import sketch
from rqgen.models.state_dict import ForeignTensors
from rqgen.quantizers import MultiScaleConfig
from rqgen.reading import name_some, read_json, require_file, shorten

from .published import VAR_PRIOR, VAR_TOKENIZER, expect_model, published_name

PathLike = str | os.PathLike[str]

# Channels of every published checkpoint for 256x256; the constructor has another default.
_CH_256 = 160
# Hides the scales after a token's own: 0 or minus infinity.
MASK = "attn_bias_for_masking"
# Below this the published code leaves the refinements out.
_NO_REFINEMENT = 1e-6


def _published_scales() -> list[int]:
    return [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


@dataclass
class PublishedVQVAE:
    """Arguments of the published tokenizer's constructor, with its defaults."""

    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 128
    dropout: float = 0.0
    beta: float = 0.25
    using_znorm: bool = False
    quant_conv_ks: int = 3
    quant_resi: float = 0.5
    share_quant_resi: int = 4
    default_qresi_counts: int = 0
    v_patch_nums: list[int] = field(default_factory=_published_scales)
    test_mode: bool = True  # sets requires_grad=False; ours is set by the training

    def config(self) -> MultiScaleVQVAEConfig:
        count = self.share_quant_resi or self.default_qresi_counts or len(self.v_patch_nums)
        ratio = abs(self.quant_resi)
        quantizer = MultiScaleConfig(
            codebook_size=self.vocab_size,
            scales=list(self.v_patch_nums),
            normalize=self.using_znorm,
            refinements=count if ratio > _NO_REFINEMENT else 0,
            refinement_ratio=ratio,
        )
        return MultiScaleVQVAEConfig(
            base_channels=self.ch,
            z_channels=self.z_channels,
            latent_kernel=self.quant_conv_ks,
            dropout=self.dropout,
            commitment_weight=self.beta,
            quantizer=quantizer,
        )


@dataclass
class PublishedVAR:
    """Arguments of the published prior's constructor (but the tokenizer), with its defaults."""

    num_classes: int = 1000
    depth: int = 16
    embed_dim: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    norm_eps: float = 1e-6
    shared_aln: bool = False
    cond_drop_rate: float = 0.1
    attn_l2_norm: bool = False
    patch_nums: list[int] = field(default_factory=_published_scales)
    flash_if_available: bool = True  # which of several equal kernels the published code calls
    fused_if_available: bool = True

    def config(self, vae: MultiScaleVQVAEConfig) -> VARConfig:
        return VARConfig(
            quantizer=vae.quantizer,
            code_dim=vae.z_channels,
            embed_dim=self.embed_dim,
            layers=self.depth,
            heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            dropout=self.drop_rate,
            attention_dropout=self.attn_drop_rate,
            drop_path=self.drop_path_rate,
            norm_epsilon=self.norm_eps,
            shared_adaptive_norm=self.shared_aln,
            normalize_attention=self.attn_l2_norm,
            num_classes=self.num_classes,
            condition_dropout=self.cond_drop_rate,
        )


def load_var(
    vae: PathLike, var: PathLike, config: Mapping[str, Any] | PathLike | None = None
) -> tuple[MultiScaleVQVAE, VAR]:
    """Read the published tokenizer and prior into a `MultiScaleVQVAE` and a `VAR`.

    The pickles are read with `torch.load(weights_only=True)`. Both models come back in eval mode, on the CPU; the
    prior carries the tokenizer's codebook and refinements.

    Args:
        vae, var: the published state dicts ("vae_ch160v4096z32.pth", "var_d16.pth", ...).
        config: {"vae": {...}, "var": {...}}, the published constructors' arguments, as a mapping or the path of a
            JSON file; what it leaves out has the constructor's default. None: the published models for 256x256, the
            prior's depth d read from its weights (width 64 d, d heads, drop path 0.1 d / 24).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file, a pickle with anything but tensors, an argument that is unknown or of the wrong
            type (named), or tensors that do not fit the configuration (named).
    """
    vae_tensors = _read_state_dict(Path(vae), "vae", VAR_TOKENIZER)
    var_tensors = _read_state_dict(Path(var), "var", VAR_PRIOR)
    published: dict[str, Any]
    if config is None:
        where = "config"
        blocks = {m[1] for name in var_tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
        if not blocks:
            raise ValueError(f"{var}: expected the tensors of a VAR, found none named blocks.*")
        depth = len(blocks)
        if lacking := sorted({str(layer) for layer in range(depth)} - blocks, key=int):
            raise ValueError(f"{var}: of {depth} blocks, those named blocks.{name_some(lacking)} are missing")
        published = {
            "vae": {"ch": _CH_256},
            "var": {
                "depth": depth,
                "embed_dim": 64 * depth,
                "num_heads": depth,
                "drop_path_rate": 0.1 * depth / 24,
                "attn_l2_norm": True,
            },
        }
    elif isinstance(config, Mapping):
        where, published = "config", dict(config)
    else:
        require_file(Path(config), "config")
        where, published = str(config), read_json(Path(config))
    if unknown := sorted(map(str, published.keys() - {"vae", "var"})):
        raise ValueError(f"{where}: expected the sections vae and var, got {', '.join(unknown)}")
    for name, arguments in published.items():
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{where}: {name}: expected a mapping of arguments, got {shorten(arguments)}")
    vae_arguments = from_dict(PublishedVQVAE, published.get("vae", {}), where=f"{where}: vae")
    var_arguments = from_dict(PublishedVAR, published.get("var", {}), where=f"{where}: var")
    if var_arguments.patch_nums != vae_arguments.v_patch_nums:
        raise ValueError(
            f"{where}: var.patch_nums: expected the tokenizer's v_patch_nums, {vae_arguments.v_patch_nums}, "
            f"got {var_arguments.patch_nums}"
        )
    try:
        vae_config = vae_arguments.config()
        var_config = var_arguments.config(vae_config)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: {error}") from error
    with torch.device("cpu"):  # whatever torch's default device is
        tokenizer = _build_tokenizer(vae_config, vae_arguments, vae_tensors, where=str(vae))
        prior = _build_prior(var_config, var_tensors, where=str(var))
        prior.set_quantizer(tokenizer.quantizer)
    return tokenizer.eval(), prior.eval()


def _build_tokenizer(
    config: MultiScaleVQVAEConfig, arguments: PublishedVQVAE, tensors: Mapping[str, Tensor], *, where: str
) -> MultiScaleVQVAE:
    expected = sketch(MultiScaleVQVAE, config, len(tensors), where=where).state_dict()
    published = ForeignTensors(tensors)
    levels = len(config.channel_multipliers)
    filled: dict[str, Tensor] = {}
    attention: dict[str, Tensor] = {}
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        projection = re.fullmatch(r"(.*)\.(query|key|value)\.(weight|bias)", name)
        if name == "quantizer.initialized":
            filled[name] = torch.tensor(True)
        elif name.startswith("quantizer.usage."):
            continue  # counts of training, which starts again
        elif name == "quantizer.codebook":
            filled[name] = published.take("quantize.embedding.weight", shape)
        elif name.startswith("quantizer.refinements."):
            index, part = name.split(".")[2:]
            inner = {0: index, 1: "qresi"}.get(arguments.share_quant_resi, f"qresi_ls.{index}")
            filled[name] = published.take(f"quantize.quant_resi.{inner}.{part}", shape)
        elif projection is not None:
            # The published attention makes query, key and value in one convolution.
            block, which, part = projection.groups()
            fused = published_name(f"{block}.qkv.{part}", levels)
            if fused not in attention:
                attention[fused] = published.take(fused, (3 * shape[0], *shape[1:]))
            filled[name] = attention[fused].chunk(3)[("query", "key", "value").index(which)]
        else:
            filled[name] = published.take(published_name(name, levels), shape)

    # How often codes were used in training, by scale.
    published.drop("quantize.ema_vocab_hit_SV", (None, config.quantizer.codebook_size))
    published.finish("the configuration", where=where)
    model = MultiScaleVQVAE(config)
    model.load_state_dict({**model.state_dict(), **filled})
    return model


def _build_prior(config: VARConfig, tensors: Mapping[str, Tensor], *, where: str) -> VAR:
    expected = sketch(VAR, config, len(tensors), where=where).state_dict()
    published = ForeignTensors(tensors)
    filled: dict[str, Tensor] = {}
    for name, tensor in expected.items():
        if name.startswith("quantizer."):
            continue  # the tokenizer's
        theirs, shape = _published_prior_name(name), tuple(tensor.shape)
        # Published with leading dimensions of one.
        if name in ("start_positions", "positions") or name.endswith(".log_scale"):
            filled[name] = published.take(theirs, (1, *shape))[0]
        elif name.endswith(".modulation"):
            filled[name] = published.take(theirs, (1, 1, *shape))[0, 0]
        else:
            filled[name] = published.take(theirs, shape)

    length = sum(config.quantizer.tokens)

    def fault_unless(expected: Callable[[], Tensor]) -> Callable[[Tensor], str | None]:
        # Made only for a tensor of its shape: a configuration may imply any size.
        return lambda found: (
            None
            if torch.equal(found.squeeze().to(expected().dtype), expected().squeeze())
            else "not what the configuration implies"
        )

    def levels() -> Tensor:
        return torch.cat([torch.full((count,), k) for k, count in enumerate(config.quantizer.tokens)])

    def hidden() -> Tensor:
        return torch.where(levels()[:, None] >= levels(), 0.0, -torch.inf)

    published.drop("lvl_1L", (1, length), fault_unless(levels))
    published.drop(MASK, (1, 1, length, length), fault_unless(hidden))
    no_bias = fault_unless(lambda: torch.zeros(config.embed_dim))
    for layer in range(config.layers):
        published.drop(f"blocks.{layer}.attn.zero_k_bias", (config.embed_dim,), no_bias)
    published.finish("the configuration", where=where)
    model = VAR(config)
    model.load_state_dict({**model.state_dict(), **filled})
    return model


# Our names to the published ones, applied in this order.
_RENAMES = (
    (r"^word_embedding\.", "word_embed."),
    (r"^class_embedding\.", "class_emb."),
    (r"^level_embedding\.", "lvl_embed."),
    (r"^start_positions$", "pos_start"),
    (r"^positions$", "pos_1LC"),
    (r"^shared_modulation\.", "shared_ada_lin.1."),
    (r"^modulation_out\.", "head_nm.ada_lin.1."),
    (r"^classifier\.", "head."),
    (r"\.attention\.qkv\.", ".attn.mat_qkv."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.attention\.log_scale$", ".attn.scale_mul_1H11"),
    (r"\.attention\.", ".attn."),
    (r"\.mlp\.0\.", ".ffn.fc1."),
    (r"\.mlp\.2\.", ".ffn.fc2."),
    (r"\.modulation$", ".ada_gss"),
    (r"\.modulation\.", ".ada_lin.1."),
)


def _published_prior_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _read_state_dict(path: Path, name: str, model: str) -> Mapping[str, Tensor]:
    require_file(path, name)
    content = unpickle(path)
    if isinstance(content, Mapping) and not all(isinstance(tensor, Tensor) for tensor in content.values()):
        found = sorted(map(shorten, content))[:8]
        raise ValueError(f"{path}: expected a state dict, tensors by name, got [{', '.join(found)}]")
    tensors = check_state_dict(content, path, infinite=(MASK,))
    expect_model(tensors, model, path)
    return tensors
