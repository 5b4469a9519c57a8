"""The tokenizer of VAR: images to token maps of several scales and back (Tian et al. 2024, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rqgen.checks import check_integer, check_tensor
from rqgen.quantizers import CodeLayout, Convolution, MultiScaleConfig, MultiScaleQuantizer
from rqgen.quantizers.multiscale import ScaleUsage

from .autoencoder import RECONSTRUCTION_LOSSES, AutoencoderLayout, Decoder, Encoder, check_settings
from .images import check_images, check_latents, check_some
from .interfaces import Tokenizer
from .pretrained import eval_mode


@dataclass
class MultiScaleVQVAEConfig:
    """Everything that describes a `MultiScaleVQVAE`. The defaults are the published 256x256 model.

    Attributes:
        image_channels: channels of an image.
        base_channels: channels of the finest level, before its multiplier.
        channel_multipliers: one per level, from the finest; levels are joined by factors of two.
        num_res_blocks: ResNet blocks per level (the decoder has one more).
        attention: True if the coarsest level has attention after each block.
        z_channels: C, channels of the features that are quantized.
        latent_kernel: side of the convolutions before and after the quantizer, odd.
        dropout: inside the ResNet blocks.
        norm_groups: groups of every GroupNorm; must divide all channel counts.
        quantizer: see `MultiScaleConfig`; its last scale is the size of the features, and with the levels decides
            the size of the images.
        reconstruction_loss: "mse" or "l1".
        commitment_weight: beta, of the commitment term.
        gradient_checkpointing: recompute ResNet blocks in backward, to save memory.
        class_names: of the images it was trained on.
    """

    image_channels: int = 3
    base_channels: int = 160
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    num_res_blocks: int = 2
    attention: bool = True
    z_channels: int = 32
    latent_kernel: int = 3
    dropout: float = 0.0
    norm_groups: int = 32
    quantizer: MultiScaleConfig = field(default_factory=MultiScaleConfig)
    reconstruction_loss: str = "mse"
    commitment_weight: float = 0.25
    gradient_checkpointing: bool = False
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        if not 1 <= self.latent_kernel < 256 or self.latent_kernel % 2 == 0:
            raise ValueError(f"latent_kernel: expected an odd number below 256, got {self.latent_kernel}")

    @property
    def stride(self) -> int:
        """Image pixels per place of the features, along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of an image."""
        height, width = scale_sizes(self.quantizer)[-1]
        return height * self.stride, width * self.stride


def scale_sizes(quantizer: MultiScaleConfig) -> list[list[int]]:
    """Return [h_k, w_k] of each token map."""
    return [[scale, scale] if isinstance(scale, int) else scale for scale in quantizer.scales]


class MultiScaleVQVAEOutput(NamedTuple):
    """Result of calling a `MultiScaleVQVAE`."""

    reconstruction: Tensor  # (B, channels, H, W), not clamped to [-1, 1]
    commitment_loss: Tensor  # float32 scalar
    codes: list[Tensor]  # int64 (B, h_k, w_k), one per scale
    codebook_loss: Tensor  # float32 scalar


class MultiScaleVQVAELoss(NamedTuple):
    """Result of `MultiScaleVQVAE.loss`."""

    total: Tensor  # reconstruction + codebook + commitment_weight * commitment
    reconstruction: Tensor
    commitment: Tensor
    codebook: Tensor
    output: MultiScaleVQVAEOutput


class MultiScaleVQVAE(Tokenizer):
    """Encoder, multi-scale quantizer, decoder.

    Images are (B, channels, height, width) in [-1, 1], of the one size that the scales decide and of any floating-point
    dtype (they are cast to the model's; see `rqgen.models.images` for values that are refused); codes are a
    list of token maps int64 (B, h_k, w_k), from coarse to fine. `encode`, `decode` and `decode_partial` run without
    gradient and dropout in any mode, and never change state. An empty batch gives empty results, in eval mode.
    """

    model_type = "multiscale_vqvae"
    config_class = MultiScaleVQVAEConfig
    config: MultiScaleVQVAEConfig

    def __init__(self, config: MultiScaleVQVAEConfig) -> None:
        super().__init__(config)
        coarsest = len(config.channel_multipliers) - 1
        layout = AutoencoderLayout(
            image_channels=config.image_channels,
            z_channels=config.z_channels,
            base_channels=config.base_channels,
            channel_multipliers=config.channel_multipliers,
            num_res_blocks=config.num_res_blocks,
            attention=[config.attention and level == coarsest for level in range(coarsest + 1)],
            resample_with_conv=True,
            dropout=config.dropout,
            norm_groups=config.norm_groups,
            gradient_checkpointing=config.gradient_checkpointing,
        )

        def latent_convolution() -> Convolution:
            kernel = config.latent_kernel
            return Convolution(config.z_channels, config.z_channels, kernel, padding=kernel // 2)

        self.encoder = Encoder(layout)
        self.to_latents = latent_convolution()
        self.quantizer = MultiScaleQuantizer(config.quantizer, config.z_channels)
        self.from_latents = latent_convolution()
        self.decoder = Decoder(layout)

    @property
    def codebooks(self) -> Tensor:
        """(K, C), shared by all scales."""
        return self.quantizer.codebook

    @property
    def layout(self) -> CodeLayout:
        """A token map per scale."""
        return self.quantizer.layout

    @property
    def usage(self) -> ScaleUsage:
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
    def scales(self) -> list[list[int]]:
        """[h_k, w_k] of each token map."""
        return scale_sizes(self.config.quantizer)

    def forward(self, images: Tensor) -> MultiScaleVQVAEOutput:
        """Encode, quantize (straight-through gradient) and decode.

        Raises:
            TypeError, ValueError: as `encode_latents`; no images in train mode.
        """
        features = self.encode_latents(images)
        if self.training:
            check_some(images)
        quantized, codes, commitment, codebook = self.quantizer(features)
        if len(images) == 0:
            commitment = codebook = features.float().sum()  # 0: a mean over nothing is NaN
        return MultiScaleVQVAEOutput(self.decode_latents(quantized), commitment, codes, codebook)

    def loss(self, images: Tensor) -> MultiScaleVQVAELoss:
        """Return `reconstruction + codebook + commitment_weight * commitment`, means over elements and scales, in
        float32.

        Raises:
            TypeError, ValueError: as `encode_latents`; no images.
        """
        output = self(images)
        check_some(images)
        measure = RECONSTRUCTION_LOSSES[self.config.reconstruction_loss]
        reconstruction = measure(output.reconstruction.float(), images.float())
        total = reconstruction + output.codebook_loss + self.config.commitment_weight * output.commitment_loss
        return MultiScaleVQVAELoss(total, reconstruction, output.commitment_loss, output.codebook_loss, output)

    def encode_latents(self, images: Tensor, *, check: bool = True) -> Tensor:
        """Return the features that are quantized, (B, C, H, W). Differentiable.

        Args:
            check: refuse images far outside [-1, 1].

        Raises:
            TypeError, ValueError: images that `check_images` refuses, or of another shape.
        """
        check_images(images, values=check)
        check_tensor(images, "images", self.device)
        expected = (self.config.image_channels, *self.config.image_shape)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images: expected (B, {', '.join(map(str, expected))}), got shape {tuple(images.shape)}")
        return self.to_latents(self.encoder(images.to(self.dtype)))

    def decode_latents(self, features: Tensor) -> Tensor:
        """Return images (B, channels, H, W) from features (B, C, H, W). Differentiable."""
        check_latents(features, "features", (self.config.z_channels, None, None), self.device)
        return self.decoder(self.from_latents(features.to(self.dtype)))

    def decode_vectors(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return images of vectors (B, h_k, w_k, C) for every scale, codes' own or mixtures of them. Differentiable."""
        return self.decode_latents(self.quantizer.combine(vectors))

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Return token maps int64 (B, h_k, w_k), from coarse to fine, of images (B, channels, H, W) in [-1, 1]. Errors
        as `encode_latents`. Where an image is not finite it gets tokens -1, which `decode` refuses."""
        with eval_mode(self):
            return self.quantizer.encode(self.encode_latents(images))

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Return images (B, channels, H, W), clamped to [-1, 1], of token maps. Errors:
        `MultiScaleQuantizer.check_codes`."""
        with eval_mode(self):
            return _clamped(self.decode_latents(self.quantizer.decode(codes)))

    @torch.no_grad()
    def decode_partial(self, codes: Sequence[Tensor], scales: int) -> Tensor:
        """Return images of the first `scales` token maps alone: coarse to fine. Raise TypeError if scales is not an
        integer, ValueError if it is not in [1, K]."""
        scales = check_integer(scales, "decode_partial: scales", 1, self.layout.levels)
        with eval_mode(self):
            return _clamped(self.decode_latents(self.quantizer.decode(codes, scales)))


def _clamped(images: Tensor) -> Tensor:
    """Return images within [-1, 1]; infinite values become NaN, because a clamped one would look like a colour."""
    return torch.where(images.isinf(), torch.nan, images.clamp(-1, 1))
