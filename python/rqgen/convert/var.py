"""The published VAR and its tokenizer (Tian et al. 2024): constructor arguments and tensor names."""

from __future__ import annotations

import json
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
from rqgen.quantizers import MultiScaleConfig

from .published import published_name, unpickle

PathLike = str | os.PathLike[str]

# What every published checkpoint for 256x256 was made with, beyond the constructors' own defaults.
_CH_256 = 160
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
    test_mode: bool = True  # freezes the weights; ours are frozen where they are not trained

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
    """Reads the published tokenizer and prior into a `MultiScaleVQVAE` and a `VAR`.

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
    vae_tensors, var_tensors = _read_state_dict(Path(vae), "vae"), _read_state_dict(Path(var), "var")
    if config is None:
        where = "config"
        depth = 1 + max((int(m[1]) for name in var_tensors if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
        if depth == 0:
            raise ValueError(f"{var}: expected the tensors of a VAR, found none named blocks.*")
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
        where, published = str(config), _read_json(Path(config))
    if unknown := sorted(map(str, published.keys() - {"vae", "var"})):
        raise ValueError(f"{where}: expected the sections vae and var, got {', '.join(unknown)}")
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
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    with torch.device("cpu"):  # whatever torch's default device is
        tokenizer = _build_tokenizer(vae_config, vae_arguments, vae_tensors, where=str(vae))
        prior = _build_prior(var_config, var_tensors, where=str(var))
        prior.set_quantizer(tokenizer.quantizer)
    return tokenizer.eval(), prior.eval()


class _Tensors:
    """A published state dict, of which every tensor is to be taken once; gathers all that does not fit."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self._remaining, self._where = dict(tensors), where
        self._problems: list[str] = []

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._remaining.pop(name, None)
        if tensor is None:
            self._problems.append(f"missing {name}")
        elif tuple(tensor.shape) != shape:
            self._problems.append(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        else:
            return tensor
        return torch.zeros(shape)

    def drop(self, name: str, problem_of: Callable[[Tensor], str | None]) -> None:
        """Takes a tensor that our model has no place for, once it is what it must be."""
        tensor = self._remaining.pop(name, None)
        problem = "missing" if tensor is None else problem_of(tensor)
        if problem is not None:
            self._problems.append(f"{name}: {problem}")

    def finish(self) -> None:
        problems = self._problems + [f"unknown {name}" for name in sorted(self._remaining)]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"{self._where}: tensors do not fit the configuration: {'; '.join(problems[:5])}{more}")


def _build_tokenizer(
    config: MultiScaleVQVAEConfig, arguments: PublishedVQVAE, tensors: Mapping[str, Tensor], *, where: str
) -> MultiScaleVQVAE:
    model = MultiScaleVQVAE(config)
    published = _Tensors(tensors, where)
    levels = len(config.channel_multipliers)
    filled: dict[str, Tensor] = {}
    attention: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        projection = re.fullmatch(r"(.*)\.(query|key|value)\.(weight|bias)", name)
        if name.startswith(("quantizer.usage.", "quantizer.initialized")):
            filled[name] = torch.tensor(True) if name.endswith("initialized") else tensor
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

    def problem_of_hits(hits: Tensor) -> str | None:
        size = config.quantizer.codebook_size
        return None if hits.ndim == 2 and hits.shape[1] == size else f"expected shape (scales, {size})"

    published.drop("quantize.ema_vocab_hit_SV", problem_of_hits)  # how often codes were used in training
    published.finish()
    model.load_state_dict(filled)
    return model


def _build_prior(config: VARConfig, tensors: Mapping[str, Tensor], *, where: str) -> VAR:
    model = VAR(config)
    published = _Tensors(tensors, where)
    filled: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("quantizer."):
            filled[name] = tensor
            continue
        theirs, shape = _published_prior_name(name), tuple(tensor.shape)
        # Published with leading dimensions of one.
        if name in ("start_positions", "positions") or name.endswith(".log_scale"):
            filled[name] = published.take(theirs, (1, *shape))[0]
        elif name.endswith(".modulation"):
            filled[name] = published.take(theirs, (1, 1, *shape))[0, 0]
        else:
            filled[name] = published.take(theirs, shape)

    levels = torch.cat([torch.full((count,), k) for k, count in enumerate(config.quantizer.tokens)])

    def problem_unless(expected: Tensor) -> Callable[[Tensor], str | None]:
        return lambda found: (
            None
            if torch.equal(found.squeeze().to(expected.dtype), expected.squeeze())
            else ("not what the configuration implies")
        )

    hidden = torch.where(levels[:, None] >= levels, 0.0, -torch.inf)
    published.drop("lvl_1L", problem_unless(levels))
    published.drop("attn_bias_for_masking", problem_unless(hidden))
    for layer in range(config.layers):
        published.drop(f"blocks.{layer}.attn.zero_k_bias", problem_unless(torch.zeros(config.embed_dim)))
    published.finish()
    model.load_state_dict(filled)
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


def _read_state_dict(path: Path, name: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no file {path}")
    content = unpickle(path)
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        found = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: expected a state dict, tensors by name, got {found}")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"config: no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
