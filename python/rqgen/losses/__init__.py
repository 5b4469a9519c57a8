"""Losses of stage 1 beyond the pixels' own: perceptual distances and a discriminator, balanced against the tokenizer's
loss."""

from .adversarial import AdversarialLoss, DiscriminatorLoss, GeneratorLoss
from .augment import DiffAugment
from .discriminator import ActNorm, PatchDiscriminator
from .features import ExportedFeatures
from .lpips import LPIPS

__all__ = [
    "LPIPS",
    "ActNorm",
    "AdversarialLoss",
    "DiffAugment",
    "DiscriminatorLoss",
    "ExportedFeatures",
    "GeneratorLoss",
    "PatchDiscriminator",
]
