"""The convolutional encoder and decoder of VQ-GAN (Esser et al. 2021), as the published RQ-VAE uses them.

Every level has ResNet blocks and, where configured, single-head attention after each; levels are joined by factors
of two. A middle part (block, attention, block) works at the lowest resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rqgen.config import check_bounds, one_of
from rqgen.quantizers import Convolution, silu

from .attention import attention
from .condition import checked_class_names
from .normalization import GroupNorm

NORM_EPSILON = 1e-6
RECONSTRUCTION_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}


def check_settings(config: Any) -> None:
    """Raise ValueError for invalid settings, of those that RQVAEConfig and MultiScaleVQVAEConfig share."""
    widths = {name: (1, 2**16) for name in ("image_channels", "base_channels", "z_channels", "norm_groups")}
    check_bounds(config, **widths, num_res_blocks=(1, 256))
    if len(config.channel_multipliers) > 16 or max(config.channel_multipliers, default=1) > 2**16:
        raise ValueError(
            f"channel_multipliers: expected at most 16 levels of at most {2**16} times base_channels, "
            f"got {len(config.channel_multipliers)} levels up to {max(config.channel_multipliers)}"
        )
    if not config.channel_multipliers or min(config.channel_multipliers) < 1:
        raise ValueError(f"channel_multipliers: expected one number >= 1 per level, got {config.channel_multipliers}")
    for multiplier in (1, *config.channel_multipliers):
        if (config.base_channels * multiplier) % config.norm_groups:
            raise ValueError(
                f"norm_groups: expected a divisor of every level's channels, got {config.norm_groups} "
                f"for {config.base_channels * multiplier}"
            )
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout: expected 0 <= dropout < 1, got {config.dropout}")
    if not config.commitment_weight >= 0.0:
        raise ValueError(f"commitment_weight: expected a number >= 0, got {config.commitment_weight}")
    if config.reconstruction_loss not in RECONSTRUCTION_LOSSES:
        raise ValueError(f"reconstruction_loss: {one_of(RECONSTRUCTION_LOSSES, config.reconstruction_loss)}")
    config.class_names = checked_class_names(config.class_names)


class ResidualBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`, with a 1x1 convolution on x where channels change.

    Dropout comes before the second convolution. With `gradient_checkpointing` the block is recomputed in
    backward instead of keeping its activations (train mode only).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float,
        norm_groups: int,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.norm1 = GroupNorm(norm_groups, in_channels, eps=NORM_EPSILON)
        self.conv1 = Convolution(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Convolution(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else Convolution(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map, added to it."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=NORM_EPSILON)
        self.query = Convolution(channels, channels, 1)
        self.key = Convolution(channels, channels, 1)
        self.value = Convolution(channels, channels, 1)
        self.output = Convolution(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.query, self.key, self.value))
        attended_b1nc = attention(q, k, v)
        return x + self.output(attended_b1nc.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width: a strided convolution, or the mean of 2x2."""

    def __init__(self, channels: int, *, with_conv: bool) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        # Padded right and below only, as the published weights expect.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then a convolution if asked."""

    def __init__(self, channels: int, *, with_conv: bool) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where `attention` is set, then `resample`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        attention: bool,
        resample: nn.Module,
        dropout: float,
        norm_groups: int,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(
                in_channels if index == 0 else out_channels,
                out_channels,
                dropout=dropout,
                norm_groups=norm_groups,
                gradient_checkpointing=gradient_checkpointing,
            )
            for index in range(num_blocks)
        )
        self.attentions = nn.ModuleList(
            AttentionBlock(out_channels, norm_groups=norm_groups) for _ in range(num_blocks if attention else 0)
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[index](x)
        return self.resample(x)


def _middle(channels: int, *, dropout: float, norm_groups: int, gradient_checkpointing: bool) -> nn.Sequential:
    def block() -> ResidualBlock:
        return ResidualBlock(
            channels,
            channels,
            dropout=dropout,
            norm_groups=norm_groups,
            gradient_checkpointing=gradient_checkpointing,
        )

    return nn.Sequential(block(), AttentionBlock(channels, norm_groups=norm_groups), block())


@dataclass(frozen=True)
class AutoencoderLayout:
    """Settings that an encoder and its decoder have in common. Levels are counted from the finest.

    Attributes:
        channel_multipliers: one per level; a level has base_channels * multiplier channels.
        num_res_blocks: ResNet blocks per level of the encoder; the decoder has one more.
        attention: one flag per level.
        resample_with_conv: convolutions where levels join; otherwise averaging and repeating.
    """

    image_channels: int
    z_channels: int
    base_channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    attention: Sequence[bool]
    resample_with_conv: bool
    dropout: float
    norm_groups: int
    gradient_checkpointing: bool

    @property
    def channels(self) -> list[int]:
        """Channels of each level."""
        return [self.base_channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def block(self) -> dict[str, Any]:
        """Settings of every ResNet block."""
        return {
            "dropout": self.dropout,
            "norm_groups": self.norm_groups,
            "gradient_checkpointing": self.gradient_checkpointing,
        }


class Encoder(nn.Module):
    """Images (B, image_channels, H, W) to features (B, z_channels, H/s, W/s), s = 2^(levels - 1)."""

    def __init__(self, layout: AutoencoderLayout) -> None:
        super().__init__()
        channels = layout.channels
        coarsest = len(channels) - 1
        self.conv_in = Convolution(layout.image_channels, layout.base_channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                layout.base_channels if index == 0 else channels[index - 1],
                width,
                layout.num_res_blocks,
                attention=layout.attention[index],
                resample=nn.Identity() if index == coarsest else Downsample(width, with_conv=layout.resample_with_conv),
                **layout.block,
            )
            for index, width in enumerate(channels)
        )
        self.middle = _middle(channels[-1], **layout.block)
        self.norm_out = GroupNorm(layout.norm_groups, channels[-1], eps=NORM_EPSILON)
        self.conv_out = Convolution(channels[-1], layout.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.levels:
            h = level(h)
        return self.conv_out(silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Features (B, z_channels, H/s, W/s) to images (B, image_channels, H, W); the encoder's mirror.

    `levels` are kept from the coarsest, the order in which they run.
    """

    def __init__(self, layout: AutoencoderLayout) -> None:
        super().__init__()
        channels = layout.channels[::-1]
        finest = len(channels) - 1
        self.conv_in = Convolution(layout.z_channels, channels[0], 3, padding=1)
        self.middle = _middle(channels[0], **layout.block)
        self.levels = nn.ModuleList(
            Level(
                channels[max(index - 1, 0)],
                width,
                layout.num_res_blocks + 1,
                attention=layout.attention[finest - index],
                resample=nn.Identity() if index == finest else Upsample(width, with_conv=layout.resample_with_conv),
                **layout.block,
            )
            for index, width in enumerate(channels)
        )
        self.norm_out = GroupNorm(layout.norm_groups, channels[-1], eps=NORM_EPSILON)
        self.conv_out = Convolution(channels[-1], layout.image_channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        h = self.middle(self.conv_in(features))
        for level in self.levels:
            h = level(h)
        return self.conv_out(silu(self.norm_out(h)))
