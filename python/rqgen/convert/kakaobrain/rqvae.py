"""The published RQ-VAE: its `arch` section and its tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rqgen.config import from_dict
from rqgen.models import RQVAE, RQVAEConfig

from ..published import published_name

REQUIRED = object()


def build_rqvae(arch: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, where: str) -> RQVAE:
    """An `RQVAE` with the published weights; `where` begins every error message.

    Raises:
        ValueError: an option of `arch` that is unknown, missing, or not reproducible; a tensor that is
            missing, unknown or of another shape, by its published name.
    """
    with torch.device("cpu"):  # whatever torch's default device is
        model = RQVAE(rqvae_config(arch, where=where))
        tensors = _translate(model, state_dict, where=where)
        model.load_state_dict({**model.state_dict(), **tensors})
    return model


def rqvae_config(arch: Mapping[str, Any], *, where: str) -> RQVAEConfig:
    """Our config of a published `arch` section, with the published defaults for options left out."""
    sections = _Section(arch, "arch", where)
    sections.take("type")
    hparams = _Section(sections.take("hparams"), "arch.hparams", where)
    ddconfig = _Section(sections.take("ddconfig"), "arch.ddconfig", where)
    gradient_checkpointing = sections.take("checkpointing", False)
    for name in ("ema", "code_hier"):  # of the published trainer; the model does not depend on them
        sections.take(name, None)
    sections.finish()

    hparams.expect("bottleneck_type", "rq", default="rq")
    for name in ("use_padding_idx", "masked_dropout"):  # defaults that the published model never reads
        hparams.take(name, None)
    latent_shape = hparams.take_shape("latent_shape")
    code_shape = hparams.take_shape("code_shape")
    embed_dim = hparams.take("embed_dim", 64)
    shared_codebook = hparams.take("shared_codebook")
    if latent_shape[2] != embed_dim:
        raise ValueError(
            f"{where}: arch.hparams.latent_shape: expected embed_dim, {embed_dim}, last; got {latent_shape}"
        )
    quantizer = {
        "codebook_size": hparams.take_per_depth("n_embed", 512, code_shape[2], shared_codebook),
        "depth": code_shape[2],
        "shared_codebook": shared_codebook,
        "decay": hparams.take_per_depth("decay", 0.99, code_shape[2], shared_codebook),
        "restart_dead_codes": hparams.take("restart_unused_codes", False),
        "ema_update": "per_depth",
    }
    reconstruction_loss = hparams.take("loss_type", "l1")
    commitment_weight = hparams.take("latent_loss_weight", 0.25)
    hparams.finish()

    ddconfig.expect("double_z", False, default=True)  # with True the published quantizer gets 2x the channels
    ddconfig.expect("give_pre_end", False, default=False)
    image_channels = ddconfig.take("in_channels")
    ddconfig.expect("out_ch", image_channels)
    channel_multipliers = ddconfig.take("ch_mult", [1, 2, 4, 8])
    resolution = ddconfig.take("resolution")
    stride = 2 ** (len(channel_multipliers) - 1)
    settings = {
        "image_channels": image_channels,
        "resolution": resolution,
        "image_size": [latent_shape[0] * stride, latent_shape[1] * stride],
        "base_channels": ddconfig.take("ch"),
        "channel_multipliers": channel_multipliers,
        "num_res_blocks": ddconfig.take("num_res_blocks"),
        "attention_resolutions": ddconfig.take("attn_resolutions"),
        "z_channels": ddconfig.take("z_channels"),
        "embed_dim": embed_dim,
        "dropout": ddconfig.take("dropout", 0.0),
        "resample_with_conv": ddconfig.take("resamp_with_conv", True),
        "code_shape": code_shape,
        "quantizer": quantizer,
        "reconstruction_loss": reconstruction_loss,
        "commitment_weight": commitment_weight,
        "gradient_checkpointing": gradient_checkpointing,
    }
    ddconfig.finish()
    return from_dict(RQVAEConfig, settings, where=where)


def _translate(model: RQVAE, state_dict: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Our names with published tensors, for everything but the usage counts."""
    config = model.config
    num_codes, code_dim = config.quantizer.codebook_size, config.code_dim
    remaining = dict(state_dict)
    problems: list[str] = []

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = remaining.pop(name, None)
        if tensor is None:
            problems.append(f"missing {name}")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        else:
            return tensor
        return torch.empty(shape, device="meta")

    tensors = {
        name: take(published_name(name, len(config.channel_multipliers)), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if not name.startswith("quantizer.")
    }
    books: dict[str, list[Tensor]] = {"codebook": [], "ema_count": [], "ema_sum": []}
    for d in range(model.depth):
        prefix = f"quantizer.codebooks.{d}."
        # The last row stands for padding, is zero and is never chosen.
        books["codebook"].append(take(f"{prefix}weight", (num_codes + 1, code_dim))[:-1])
        books["ema_count"].append(take(f"{prefix}cluster_size_ema", (num_codes,)))
        books["ema_sum"].append(take(f"{prefix}embed_ema", (num_codes, code_dim)))
    problems += [f"unknown {name}" for name in sorted(remaining)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where}: tensors do not fit arch: {'; '.join(problems[:5])}{more}")
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

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        if name in self.options:
            return self.options.pop(name)
        if default is REQUIRED:
            raise ValueError(f"{self.label}.{name}: missing")
        return default

    def expect(self, name: str, value: Any, default: Any = REQUIRED) -> None:
        found = self.take(name, default)
        if found != value:
            raise ValueError(f"{self.label}.{name}: only {value!r} can be reproduced, got {found!r}")

    def take_shape(self, name: str) -> list[int]:
        shape = self.take(name)
        if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(n, int) for n in shape):
            raise ValueError(f"{self.label}.{name}: expected three integers, got {shape!r}")
        return shape

    def take_per_depth(self, name: str, default: Any, depth: int, shared_codebook: bool) -> Any:
        """One value for all depths, published as such or as a list of one per depth."""
        value = self.take(name, default)
        if not isinstance(value, list):
            return value
        if shared_codebook:
            raise ValueError(f"{self.label}.{name}: a shared codebook takes one value, got {value}")
        if len(value) != depth:
            raise ValueError(f"{self.label}.{name}: expected one value per depth ({depth}), got {value}")
        if any(other != value[0] for other in value):
            raise ValueError(f"{self.label}.{name}: values that differ by depth are not supported, got {value}")
        return value[0]

    def finish(self) -> None:
        if self.options:
            raise ValueError(f"{self.label}: unknown options {sorted(map(str, self.options))}")
