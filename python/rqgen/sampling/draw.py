"""How a code is drawn from the logits of an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import rqkernels


def finished_images(images: Tensor, first_image: int) -> Tensor:
    """Images as `generate` and `edit` return them, in [-1, 1].

    Raises:
        ValueError: a value that is not finite; a clamped one would look like a picture.
    """
    bad = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"vae: what it decodes for image {first_image + bad[0]} is not finite (NaN or infinity)")
    return images.clamp(-1, 1)


class DrawSettings(NamedTuple):
    """What `generate` was asked for; the lists hold one entry per depth, of a VAR per scale."""

    temperature: list[float]
    top_k: list[int | None]
    top_p: list[float | None]
    guidance: float
    seed: int

    @property
    def copies(self) -> int:
        """Rows of each image: with guidance the null condition follows the condition, in a second half."""
        return 2 if self.guidance else 1

    def guided(self, logits: Tensor, strength: float) -> Tensor:
        """(copies * B, ..., K) to (B, ..., K): `(1 + strength) conditional - strength null`, with guidance."""
        if not self.guidance:
            return logits
        conditional, null = logits.chunk(2)
        return (1 + strength) * conditional - strength * null

    def draw(self, logits: Tensor, entry: int, *, first_image: int, first_stream: int) -> Tensor:
        """Codes (B, l) from guided logits (B, l, K); `entry` is the scale, `first_stream` its first token's index."""
        return rqkernels.sample_logits(
            logits,
            temperature=self.temperature[entry],
            top_k=self.top_k[entry],
            top_p=self.top_p[entry],
            seed=self.seed,
            offset=first_image,
            stream=first_stream,
            streams=logits.shape[1],
        )

    def kept(self, logits: Tensor, entry: int) -> Tensor:
        """Logits (..., K) over the temperature, -inf where top-k or top-p leave a code out."""
        ordered, order = logits.double().sort(dim=-1, descending=True, stable=True)
        temperature, top_k = self.temperature[entry], self.top_k[entry]
        if temperature == 0:
            temperature, top_k = 1.0, 1
        scores = ordered / temperature
        if top_k is not None:
            scores[..., top_k:] = -torch.inf
        if self.top_p[entry] is not None:
            mass = torch.softmax(scores, dim=-1)
            scores = scores.masked_fill(mass.cumsum(dim=-1) - mass >= self.top_p[entry], -torch.inf)
        return torch.empty_like(scores).scatter(-1, order, scores)
