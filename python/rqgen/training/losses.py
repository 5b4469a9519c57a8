"""Settings of the losses that a tokenizer's own is trained with: a perceptual distance and a discriminator."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import nn

from rqgen.config import check_bounds, check_fields
from rqgen.losses import LPIPS, AdversarialLoss, DiffAugment, ExportedFeatures, PatchDiscriminator
from rqgen.losses.features import FEATURES_FILE, require_weights

from .optim import OptimizerConfig

PERCEPTUAL, ADVERSARIAL = "perceptual", "adversarial"
"""The sections of a run's settings."""


@dataclass
class PerceptualConfig:
    """Settings of a perceptual distance, whose network is read from local files."""

    weight: float = 1.0
    """Factor of the distance, which is added to the tokenizer's loss."""
    vgg: Path | None = None
    """File of torchvision's VGG16, usually vgg16-397923af.pth: the distance is then LPIPS."""
    heads: Path | None = None
    """File of the LPIPS heads for VGG, usually vgg.pth; null: those of the lpips package, if it is installed."""
    features: Path | None = None
    """File of a network of your own, saved by torch.export: the distance is then that of its feature maps. It takes
    the place of ``vgg``."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.weight > 0:
            raise ValueError(f"weight: expected a positive number, got {self.weight}")
        other = "vgg" if self.vgg is not None else "heads" if self.heads is not None else None
        if self.features is not None and other is not None:
            raise ValueError(f"features: expected none with {other}, which is of another distance, got {self.features}")

    def check_resolution(self, resolution: int) -> None:
        """Raise ValueError for images too small for the distance."""
        if self.features is None and resolution < LPIPS.smallest:
            raise ValueError(
                f"{PERCEPTUAL}.vgg: expected images of at least {LPIPS.smallest} pixels a side, got {resolution}"
            )

    def files(self) -> dict[str, Path]:
        """The files to read, by setting. FileNotFoundError names a missing one, its usual name and its setting."""
        if self.features is not None:
            return {"features": require_weights(self.features, f"{PERCEPTUAL}.features", FEATURES_FILE)}
        return LPIPS.find_files(self.vgg, self.heads, prefix=f"{PERCEPTUAL}.")

    def build(self) -> tuple[nn.Module, dict[str, str]]:
        """Return the distance, and the SHA-256 of its files by setting: what they are, wherever they lie. Errors as
        `files`, and ValueError for a file that is damaged or does not fit."""
        if self.features is not None:
            network = ExportedFeatures(self.features, option=f"{PERCEPTUAL}.features")
            return network, {"features": network.checksum}
        lpips = LPIPS.from_files(self.vgg, self.heads, prefix=f"{PERCEPTUAL}.")
        return lpips, dict(lpips.checksums)


@dataclass
class DiscriminatorOptimizerConfig(OptimizerConfig):
    """Settings of the discriminator's AdamW. Its learning rate counts steps from the discriminator's start."""

    learning_rate: float = 4e-5
    """Peak learning rate."""
    final_lr_fraction: float = 1.0
    """Learning rate at the last step, as a fraction of the peak; 1: it stays."""
    warmup_steps: int = 0
    """Steps of linear warm-up to the peak."""
    beta1: float = 0.5
    """Decay of AdamW's average of gradients."""
    beta2: float = 0.9
    """Decay of AdamW's average of squared gradients."""
    clip_norm: float | None = None
    """Largest global norm of the gradients, which are scaled down to it; None: no clipping."""


@dataclass
class AdversarialConfig:
    """Settings of a discriminator that the tokenizer is trained against, and of its loss."""

    weight: float = 0.75
    """Factor of both adversarial losses; that of the tokenizer is multiplied by the adaptive weight, too."""
    loss: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    """The adversarial loss, see docs/losses.md."""
    start_step: int = 0
    """Steps of the run before the discriminator takes part."""
    warmup_steps: int = 0
    """Steps from there in which the adaptive weight rises linearly to its full value."""
    max_weight: float = 1e4
    """Largest adaptive weight."""
    r1_weight: float = 0.0
    """Weight of the penalty R1 on the discriminator's gradient at the images; 0: none."""
    lecam_weight: float = 0.0
    """Weight of LeCam's regularizer, which keeps logits near averages of the other side's; 0: none."""
    lecam_decay: float = 0.99
    """Decay of LeCam's averages."""
    augment: list[Literal["colour", "translation", "cutout"]] = field(default_factory=list)
    """Random changes of all images that the discriminator sees, for small sets of images, such as
    [colour, translation, cutout]; none by default."""
    base_channels: int = 64
    """Channels after the discriminator's first convolution."""
    layers: int = 3
    """Convolutions of stride 2 in the discriminator: images have at least 3 * 2^layers pixels a side."""
    norm: Literal["batch", "actnorm"] = "batch"
    """Norm in the discriminator; actnorm does not mix the images of a batch."""
    spectral_norm: bool = False
    """Divide the discriminator's weights by their largest singular values."""
    optimizer: DiscriminatorOptimizerConfig = field(default_factory=DiscriminatorOptimizerConfig)
    """Settings of the discriminator's AdamW and its learning rate."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            start_step=(0, 2**31),
            warmup_steps=(0, 2**31),
            max_weight=(0, 2.0**64),
            r1_weight=(0, 2.0**64),
            lecam_weight=(0, 2.0**64),
            base_channels=(1, 2**16),
            layers=(1, 16),
        )
        if not self.weight > 0:
            raise ValueError(f"weight: expected a positive number, got {self.weight}")
        if not 0 <= self.lecam_decay < 1:
            raise ValueError(f"lecam_decay: expected 0 <= lecam_decay < 1, got {self.lecam_decay}")

    def check_resolution(self, resolution: int) -> None:
        """Raise ValueError for images too small for the discriminator."""
        most = (resolution // 3).bit_length() - 1
        if self.layers > most:
            raise ValueError(
                f"{ADVERSARIAL}.layers: expected at most {most} for images of {resolution} pixels, which are at least "
                f"3 * 2^layers a side, got {self.layers}"
            )

    def build(
        self, channels: int, *, perceptual: nn.Module | None, perceptual_weight: float, seed: int
    ) -> AdversarialLoss:
        """Return the loss with a new discriminator for images of so many channels, its weights from torch's global
        generator; ``seed``: of ``augment``."""
        discriminator: nn.Module = PatchDiscriminator(
            channels, self.base_channels, self.layers, self.norm, spectral_norm=self.spectral_norm
        )
        if self.augment:
            discriminator = nn.Sequential(DiffAugment(self.augment, seed=seed), discriminator)
        return AdversarialLoss(
            discriminator,
            perceptual,
            disc_loss=self.loss,
            disc_weight=self.weight,
            perceptual_weight=perceptual_weight,
            start_step=self.start_step,
            warmup_steps=self.warmup_steps,
            max_weight=self.max_weight,
            r1_weight=self.r1_weight,
            lecam_weight=self.lecam_weight,
            lecam_decay=self.lecam_decay,
        )
