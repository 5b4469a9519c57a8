"""The published RQ-VAE: its `arch` section and its tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rqgen.config import from_dict
from rqgen.models import RQVAE, RQVAEConfig
from rqgen.models.pretrained import sketch
from rqgen.models.state_dict import ForeignTensors
from rqgen.reading import shorten

from ..published import published_name

REQUIRED = object()
_KINDS: dict[type, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_MAX_LEVELS = 16


def build_rqvae(arch: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, where: str) -> RQVAE:
    """Return an `RQVAE` with the published weights; `where` begins every error message.

    Raises:
        ValueError: an option of `arch` that is unknown, missing, or not reproducible; a tensor that is
            missing, unknown or of another shape, by its published name.
    """
    config = rqvae_config(arch, where=where)
    tensors = _translate(sketch(RQVAE, config, len(state_dict), where=where), state_dict, where=where)
    with torch.device("cpu"):  # whatever torch's default device is
        model = RQVAE(config)
        model.load_state_dict({**model.state_dict(), **tensors})
    return model


def rqvae_config(arch: Mapping[str, Any], *, where: str) -> RQVAEConfig:
    """Return our config of a published `arch` section, with the published defaults for options left out."""
    sections = _Section(arch, "arch", where)
    sections.take("type")
    hparams = _Section(sections.take("hparams"), "arch.hparams", where)
    ddconfig = _Section(sections.take("ddconfig"), "arch.ddconfig", where)
    gradient_checkpointing = sections.take("checkpointing", bool, False)
    for name in ("ema", "code_hier"):  # of the published trainer; the model does not depend on them
        sections.take(name, default=None)
    sections.finish()

    hparams.expect("bottleneck_type", "rq", default="rq")
    for name in ("use_padding_idx", "masked_dropout"):  # defaults that the published model never reads
        hparams.take(name, default=None)
    latent_shape = hparams.take_integers("latent_shape", length=3)
    code_shape = hparams.take_integers("code_shape", length=3)
    embed_dim = hparams.take("embed_dim", int, 64)
    shared_codebook = hparams.take("shared_codebook", bool)
    if latent_shape[2] != embed_dim:
        raise ValueError(
            f"{where}: arch.hparams.latent_shape: expected embed_dim, {embed_dim}, last; got {latent_shape}"
        )
    quantizer = {
        "codebook_size": hparams.take_per_depth("n_embed", int, 512, code_shape[2], shared_codebook),
        "depth": code_shape[2],
        "shared_codebook": shared_codebook,
        "decay": hparams.take_per_depth("decay", float, 0.99, code_shape[2], shared_codebook),
        "restart_dead_codes": hparams.take("restart_unused_codes", bool, False),
        "ema_update": "per_depth",
    }
    reconstruction_loss = hparams.take("loss_type", str, "l1")
    commitment_weight = hparams.take("latent_loss_weight", float, 0.25)
    hparams.finish()

    ddconfig.expect("double_z", False, default=True)  # with True the published quantizer gets 2x the channels
    ddconfig.expect("give_pre_end", False, default=False)
    image_channels = ddconfig.take("in_channels", int)
    ddconfig.expect("out_ch", image_channels)
    channel_multipliers = ddconfig.take_integers("ch_mult", [1, 2, 4, 8])
    if not 1 <= len(channel_multipliers) <= _MAX_LEVELS:
        raise ValueError(
            f"{where}: arch.ddconfig.ch_mult: expected 1 to {_MAX_LEVELS} levels, got {len(channel_multipliers)}"
        )
    resolution = ddconfig.take("resolution", int)
    stride = 2 ** (len(channel_multipliers) - 1)
    settings = {
        "image_channels": image_channels,
        "resolution": resolution,
        "image_size": [latent_shape[0] * stride, latent_shape[1] * stride],
        "base_channels": ddconfig.take("ch", int),
        "channel_multipliers": channel_multipliers,
        "num_res_blocks": ddconfig.take("num_res_blocks", int),
        "attention_resolutions": ddconfig.take_integers("attn_resolutions"),
        "z_channels": ddconfig.take("z_channels", int),
        "embed_dim": embed_dim,
        "dropout": ddconfig.take("dropout", float, 0.0),
        "resample_with_conv": ddconfig.take("resamp_with_conv", bool, True),
        "code_shape": code_shape,
        "quantizer": quantizer,
        "reconstruction_loss": reconstruction_loss,
        "commitment_weight": commitment_weight,
        "gradient_checkpointing": gradient_checkpointing,
    }
    ddconfig.finish()
    return from_dict(RQVAEConfig, settings, where=where)


def _translate(model: RQVAE, state_dict: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Return our names with published tensors, for everything but the usage counts."""
    config = model.config
    num_codes, code_dim = config.quantizer.codebook_size, config.code_dim
    published = ForeignTensors(state_dict)
    tensors = {
        name: published.take(published_name(name, len(config.channel_multipliers)), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if not name.startswith("quantizer.")
    }
    books: dict[str, list[Tensor]] = {"codebook": [], "ema_count": [], "ema_sum": []}
    # One more than there can be is reported as missing; a config may ask for billions.
    for d in range(min(model.depth, len(state_dict) + 1)):
        prefix = f"quantizer.codebooks.{d}."
        # The last row stands for padding, is zero and is never chosen.
        books["codebook"].append(published.take(f"{prefix}weight", (num_codes + 1, code_dim))[:-1])
        books["ema_count"].append(published.take(f"{prefix}cluster_size_ema", (num_codes,)))
        books["ema_sum"].append(published.take(f"{prefix}embed_ema", (num_codes, code_dim)))
    published.finish("arch", where=where)
    for name, per_depth in books.items():
        if not config.quantizer.shared_codebook:
            tensors[f"quantizer.{name}"] = torch.stack(per_depth)
            continue
        for d, tensor in enumerate(per_depth):
            if not torch.equal(tensor, per_depth[0]):
                raise ValueError(
                    f"{where}: arch.hparams.shared_codebook is set, but {name} differs at depths 0 and {d}"
                )
        tensors[f"quantizer.{name}"] = per_depth[0]
    tensors["quantizer.initialized"] = torch.tensor(True)
    return tensors


class _Section:
    """One section of a published config: every option is taken once, and what is left over is refused."""

    def __init__(self, options: Any, name: str, where: str) -> None:
        self.label = f"{where}: {name}"
        if not isinstance(options, Mapping):
            raise ValueError(f"{self.label}: expected a mapping, got {type(options).__name__}")
        self.options = dict(options)

    def take(self, name: str, kind: type | None = None, default: Any = REQUIRED) -> Any:
        """Return the option's value, which must be of this kind (None: any); `default` where it is left out."""
        if name not in self.options:
            if default is REQUIRED:
                raise ValueError(f"{self.label}.{name}: missing")
            return default
        value = self.options.pop(name)
        if kind is not None and not _is_a(kind, value):
            raise ValueError(f"{self.label}.{name}: expected {_KINDS[kind]}, got {shorten(value)}")
        return value

    def expect(self, name: str, value: Any, default: Any = REQUIRED) -> None:
        found = self.take(name, default=default)
        if found != value:
            raise ValueError(f"{self.label}.{name}: only {value!r} can be reproduced, got {shorten(found)}")

    def take_integers(self, name: str, default: Any = REQUIRED, *, length: int | None = None) -> list[int]:
        """Return a list of integers >= 1, of this length if one is given."""
        found = self.take(name, default=default)
        fits = isinstance(found, list) and all(_is_a(int, n) and n >= 1 for n in found)
        if not fits or length not in (None, len(found)):
            wanted = "a list of integers" if length is None else "three integers"
            raise ValueError(f"{self.label}.{name}: expected {wanted} >= 1, got {shorten(found)}")
        return found

    def take_per_depth(self, name: str, kind: type, default: Any, depth: int, shared_codebook: bool) -> Any:
        """Return one value for all depths, published as such or as a list of one per depth."""
        value = self.take(name, default=default)
        values = value if isinstance(value, list) else [value]
        if not all(_is_a(kind, one) for one in values):
            raise ValueError(f"{self.label}.{name}: expected {_KINDS[kind]}, or one per depth, got {shorten(value)}")
        if isinstance(value, list) and shared_codebook:
            raise ValueError(f"{self.label}.{name}: a shared codebook takes one value, got {shorten(value)}")
        if isinstance(value, list) and len(value) != depth:
            raise ValueError(f"{self.label}.{name}: expected one value per depth ({depth}), got {shorten(value)}")
        if any(other != values[0] for other in values):
            raise ValueError(
                f"{self.label}.{name}: values that differ by depth are not supported, got {shorten(value)}"
            )
        return values[0]

    def finish(self) -> None:
        if self.options:
            raise ValueError(f"{self.label}: unknown options {sorted(map(str, self.options))}")


def _is_a(kind: type, value: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
