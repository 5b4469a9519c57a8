"""RQ-VAE: images to stacks of codes and back (Lee et al. 2022, section 3.1)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import rqkernels
from rqgen.checks import check_flag, check_integer, check_number, check_range_without_waiting, check_tensor
from rqgen.config import check_bounds
from rqgen.quantizers import CodeLayout, CodeUsage, Convolution, QuantizerConfig, ResidualQuantizer

from .autoencoder import RECONSTRUCTION_LOSSES, AutoencoderLayout, Decoder, Encoder, check_settings
from .images import check_images, check_latents, check_some
from .interfaces import Tokenizer
from .pretrained import eval_mode


@dataclass
class RQVAEConfig:
    """Everything that describes an `RQVAE`. The defaults are the published 256x256 model.

    Attributes:
        image_channels: channels of an image.
        resolution: the side that the levels are counted from: a level's resolution is resolution / 2^level,
            and a level has attention if that number is in `attention_resolutions`.
        image_size: [height, width] of the images where they are not resolution x resolution.
        base_channels: channels of the finest level, before its multiplier.
        channel_multipliers: one per level, from the finest; levels are joined by factors of two.
        num_res_blocks: ResNet blocks per level (the decoder has one more).
        attention_resolutions: see `resolution`. None: that of the coarsest level alone.
        z_channels: channels between encoder or decoder and the 1x1 convolutions at the quantizer.
        embed_dim: channels of a latent.
        dropout: inside the ResNet blocks.
        resample_with_conv: convolutions at the joints; otherwise plain averaging and repeating.
        norm_groups: groups of every GroupNorm; must divide all channel counts.
        code_shape: [h, w, D] of the codes of one image. h and w divide the latents' height and width; where
            they are smaller, a code vector covers several latents, laid one after another. None: a code vector for
            each latent, and the quantizer's depth.
        quantizer: see `QuantizerConfig`; its depth must be D.
        reconstruction_loss: "mse" or "l1".
        commitment_weight: beta of equation (6).
        gradient_checkpointing: recompute ResNet blocks in backward, to save memory.
        class_names: of the images it was trained on.
    """

    image_channels: int = 3
    resolution: int = 256
    image_size: list[int] | None = None
    base_channels: int = 128
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4, 4])
    num_res_blocks: int = 2
    attention_resolutions: list[int] | None = None
    z_channels: int = 256
    embed_dim: int = 256
    dropout: float = 0.0
    resample_with_conv: bool = True
    norm_groups: int = 32
    code_shape: list[int] | None = None
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    reconstruction_loss: str = "mse"
    commitment_weight: float = 0.25
    gradient_checkpointing: bool = False
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_bounds(self, resolution=(1, 2**16), embed_dim=(1, 2**16))
        check_settings(self)
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ValueError(f"image_size: expected [height, width], got {self.image_size}")
        if max(self.image_shape) > 2**16:
            raise ValueError(f"image_size: expected at most {2**16} pixels a side, got {self.image_size}")
        if self.attention_resolutions is None:
            self.attention_resolutions = [self.resolution // self.stride]
        if self.code_shape is None:
            # At least 1: a size that the levels do not divide is refused below, by its own name.
            latents = [max(side // self.stride, 1) for side in self.image_shape]
            self.code_shape = [*latents, self.quantizer.depth]
        if len(self.code_shape) != 3 or min(self.code_shape) < 1:
            raise ValueError(f"code_shape: expected [h, w, depth], got {self.code_shape}")
        for name, sides in (("resolution", (self.resolution,)), ("image_size", self.image_shape)):
            if any(side % self.stride for side in sides):
                raise ValueError(
                    f"{name}: expected a multiple of {self.stride} "
                    f"({len(self.channel_multipliers)} levels), got {getattr(self, name) or self.resolution}"
                )
        latents, codes = list(self.latent_shape[:2]), self.code_shape[:2]
        if any(latent % code for latent, code in zip(latents, codes, strict=True)):
            raise ValueError(f"code_shape: expected h and w to divide the latents' {latents}, got {codes}")
        if self.quantizer.depth != self.code_shape[2]:
            raise ValueError(
                f"quantizer.depth: expected the depth of code_shape, {self.code_shape[2]}, got {self.quantizer.depth}"
            )

    @property
    def stride(self) -> int:
        """Image pixels per latent, along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of an image."""
        height, width = self.image_size or (self.resolution, self.resolution)
        return height, width

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, embed_dim) of the latents of an image."""
        height, width = self.image_shape
        return height // self.stride, width // self.stride, self.embed_dim

    @property
    def codes_hwd(self) -> tuple[int, int, int]:
        """`code_shape` as (h, w, D)."""
        assert self.code_shape is not None  # filled in at the start
        h, w, depth = self.code_shape
        return h, w, depth

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Latents that one code vector covers, (down, across)."""
        height, width, _ = self.latent_shape
        h, w, _ = self.codes_hwd
        return height // h, width // w

    @property
    def code_dim(self) -> int:
        """C of a code vector: embed_dim times the latents it covers."""
        down, across = self.patch_shape
        return self.embed_dim * down * across

    @property
    def attention_levels(self) -> list[bool]:
        """A flag for each level, from the finest: True if it has attention."""
        levels = range(len(self.channel_multipliers))
        resolutions = self.attention_resolutions or []
        return [self.resolution // 2**level in resolutions for level in levels]


class RQVAEOutput(NamedTuple):
    """Result of calling an `RQVAE`."""

    reconstruction: Tensor  # (B, channels, H, W), not clamped to [-1, 1]
    commitment_loss: Tensor  # float32 scalar
    codes: Tensor  # int64 (B, h, w, D)


class RQVAELoss(NamedTuple):
    """Result of `RQVAE.loss`."""

    total: Tensor  # reconstruction + commitment_weight * commitment
    reconstruction: Tensor
    commitment: Tensor
    output: RQVAEOutput


class RQVAE(Tokenizer):
    """Encoder, residual quantizer, decoder.

    Images are (B, channels, height, width) in [-1, 1], of any floating-point dtype (they are cast to the model's; see
    `rqgen.models.images` for values that are refused), codes int64 (B, h, w, D), latents "in code shape" (B, h, w,
    code_dim). The convolutions take any size: images of other sizes work where height and width are multiples of stride
    * patch, and give codes of a proportional map.

    `encode`, `decode`, `decode_partial` and `soft_codes` run without gradient and dropout in any mode, and never change
    state; calling the model in train mode updates the codebooks. An empty batch gives empty results, in eval mode.
    """

    model_type = "rqvae"
    config_class = RQVAEConfig
    config: RQVAEConfig

    def __init__(self, config: RQVAEConfig) -> None:
        super().__init__(config)
        layout = AutoencoderLayout(
            image_channels=config.image_channels,
            z_channels=config.z_channels,
            base_channels=config.base_channels,
            channel_multipliers=config.channel_multipliers,
            num_res_blocks=config.num_res_blocks,
            attention=config.attention_levels,
            resample_with_conv=config.resample_with_conv,
            dropout=config.dropout,
            norm_groups=config.norm_groups,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.encoder = Encoder(layout)
        self.to_latents = Convolution(config.z_channels, config.embed_dim, 1)
        self.quantizer = ResidualQuantizer(config.quantizer, config.code_dim)
        self.from_latents = Convolution(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(layout)

    @property
    def codebooks(self) -> Tensor:
        """float32 (K, code_dim) shared by all depths, or (D, K, code_dim)."""
        return self.quantizer.codebooks

    @property
    def layout(self) -> CodeLayout:
        """Stacks of D codes, of images of the configured size."""
        return CodeLayout.stacks(self.code_shape, self.config.quantizer.codebook_size)

    @property
    def usage(self) -> CodeUsage:
        """Counts of the codes chosen in training."""
        return self.quantizer.usage

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution."""
        return self.decoder.conv_out.weight

    def code_tensors(self) -> list[Tensor]:
        """Return all tensors that decide what a code stands for."""
        return self.quantizer.code_tensors()

    @property
    def depth(self) -> int:
        """D, codes per position."""
        return self.code_shape[2]

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(h, w, D) of the codes of one image of the configured size."""
        return self.config.codes_hwd

    def forward(self, images: Tensor) -> RQVAEOutput:
        """Encode, quantize (straight-through gradient) and decode; in train mode update the codebooks.

        Raises:
            TypeError, ValueError: as `encode_latents`; no images in train mode.
        """
        latents = self.encode_latents(images)
        if self.training:
            check_some(images)
        quantized, codes, commitment_loss = self.quantizer(latents)
        if len(images) == 0:
            commitment_loss = latents.float().sum()  # 0: a mean over nothing is NaN
        return RQVAEOutput(self.decode_latents(quantized), commitment_loss, codes)

    def loss(self, images: Tensor) -> RQVAELoss:
        """Return the loss of equation (6): `reconstruction + commitment_weight * commitment`, means over elements, in
        float32.

        `reconstruction` is the mean of |x - x'|^2 ("mse") or |x - x'| ("l1"); `commitment` is described at
        `ResidualQuantizer.forward`.

        Raises:
            TypeError, ValueError: as `encode_latents`; no images.
        """
        output = self(images)
        check_some(images)
        measure = RECONSTRUCTION_LOSSES[self.config.reconstruction_loss]
        reconstruction = measure(output.reconstruction.float(), images.float())
        total = reconstruction + self.config.commitment_weight * output.commitment_loss
        return RQVAELoss(total, reconstruction, output.commitment_loss, output)

    def encode_latents(self, images: Tensor, *, check: bool = True) -> Tensor:
        """Return the vectors that are quantized: latents in code shape (B, h, w, code_dim). Differentiable.

        Args:
            check: refuse images far outside [-1, 1].

        Raises:
            TypeError, ValueError: images that `check_images` refuses, that are not (B, image_channels, height, width),
                or whose height and width are not multiples of stride * patch.
        """
        check_images(images, values=check)
        check_tensor(images, "images", self.device)
        down, across = self.config.patch_shape
        steps = (self.config.stride * down, self.config.stride * across)
        if images.ndim != 4 or images.shape[1] != self.config.image_channels:
            raise ValueError(
                f"images: expected (B, {self.config.image_channels}, height, width), got shape {tuple(images.shape)}"
            )
        if images.shape[2] % steps[0] or images.shape[3] % steps[1] or 0 in images.shape[2:]:
            raise ValueError(
                f"images: expected height and width in multiples of {steps[0]} and {steps[1]}, "
                f"got {tuple(images.shape[2:])}"
            )
        latents_bchw = self.to_latents(self.encoder(images.to(self.dtype)))
        b, c, height, width = latents_bchw.shape
        h, w = height // down, width // across
        patches = latents_bchw.reshape(b, c, h, down, w, across).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(b, h, w, down * across * c)

    def decode_latents(self, latents_bhwc: Tensor) -> Tensor:
        """Return images (B, channels, H, W) from latents in code shape (B, h, w, code_dim). Differentiable."""
        check_latents(latents_bhwc, "latents_bhwc", (None, None, self.config.code_dim), self.device)
        down, across = self.config.patch_shape
        b, h, w, _ = latents_bhwc.shape
        patches = latents_bhwc.reshape(b, h, w, down, across, self.config.embed_dim)
        latents_bchw = patches.permute(0, 5, 1, 3, 2, 4).reshape(b, self.config.embed_dim, h * down, w * across)
        return self.decoder(self.from_latents(latents_bchw.to(self.dtype)))

    @torch.no_grad()
    def encode(self, images: Tensor, packed: rqkernels.PackedCodebook | None = None) -> Tensor:
        """Return codes int64 (B, h, w, D) of images (B, channels, H, W) in [-1, 1]; faster with `packed`, see
        `pack_codebook`. Errors as `encode_latents`. Images whose latents are not finite get codes -1, which `decode`
        refuses."""
        with eval_mode(self):
            return self.quantizer.encode(self.encode_latents(images), packed)

    def pack_codebook(self, num_images: int) -> rqkernels.PackedCodebook | None:
        """Pack the current codebook for encoding about `num_images` images; None if packing would not be faster (see
        `ResidualQuantizer.pack_codebook`)."""
        h, w, _ = self.code_shape
        return self.quantizer.pack_codebook(num_images * h * w)

    def encoder_for(self, num_images: int) -> Callable[[Tensor], Tensor]:
        """Return `encode` for about `num_images` images, with a packed codebook where that is faster."""
        return functools.partial(self.encode, packed=self.pack_codebook(num_images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return images (B, channels, H, W) of codes int64 (B, h, w, D). Raise IndexError for a code outside [0, K).

        The decoder's output as it is, like the published `decode_code`: values may leave [-1, 1], and a loss needs to
        see that. `rqgen.generate` and `rqgen.edit` clamp.
        """
        self._check_codes(codes)
        with eval_mode(self):
            return self.decode_latents(self.quantizer.decode(codes))

    @torch.no_grad()
    def decode_partial(self, codes: Tensor, depth: int) -> Tensor:
        """Return images from the codes of depths 1..depth only: coarse to fine (figure 5).

        codes and result as for `decode`. Raise TypeError if depth is not an integer, ValueError if it is not in [1, D].
        """
        depth = check_integer(depth, "decode_partial: depth", 1, self.depth)
        self._check_codes(codes)
        with eval_mode(self):
            return self.decode_latents(self.quantizer.decode(codes, depth))

    @torch.no_grad()
    def soft_codes(
        self, images: Tensor, tau: float, *, stochastic: bool = False, seed: int = 0, offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return the code distributions of every depth, `Q_tau(k | r_{d-1}) ~ exp(-|r_{d-1} - e(k)|^2 / tau)`.

        Equation (15). For inspection: the distributions are materialised, while training computes its loss from the
        residuals.

        Args:
            images: (B, channels, H, W) in [-1, 1].
            tau: temperature, > 0.
            stochastic: sample the codes from the distributions (by `seed`, and `offset`, the index of the first
                position) instead of taking the nearest.

        Returns:
            float32 (B, h, w, D, K) and the codes int64 (B, h, w, D).
        """
        tau = check_number(tau, "tau")
        if not 0 < tau < math.inf:
            raise ValueError(f"tau: expected a finite number > 0, got {tau}")
        seed, offset = check_integer(seed, "seed", 0, 2**64 - 1), check_integer(offset, "offset", 0, 2**62)
        with eval_mode(self):
            latents = self.encode_latents(images).float()
        if check_flag(stochastic, "stochastic"):
            found = rqkernels.stochastic_residual_search(
                latents, self.codebooks, self.depth, tau=tau, seed=seed, offset=offset, return_residuals=True
            )
        else:
            found = rqkernels.residual_search(latents, self.codebooks, self.depth, return_residuals=True)
        assert found.residuals is not None  # asked for
        shared = self.config.quantizer.shared_codebook
        soft = [
            rqkernels.distance_softmax(residual, self.codebooks if shared else self.codebooks[d], tau)
            for d, residual in enumerate(found.residuals.unbind(-2))
        ]
        return torch.stack(soft, dim=-2), found.codes

    def _check_codes(self, codes: Tensor) -> None:
        check_tensor(codes, "codes", self.codebooks.device, "codebook")
        if codes.dtype != torch.int64:
            raise TypeError(f"codes: expected int64, got {codes.dtype}")
        if codes.ndim != 4 or codes.shape[-1] != self.depth:
            raise ValueError(f"codes: expected (B, h, w, {self.depth}), got shape {tuple(codes.shape)}")
        check_range_without_waiting(codes, self.config.quantizer.codebook_size, "codes")
