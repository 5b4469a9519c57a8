"""The two kinds of models that a system consists of: a tokenizer, and a prior over its codes.

Everything that trains, samples, evaluates or saves works with these interfaces alone. A new system implements them in
its own files and is registered in `rqgen.systems`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rqgen.quantizers import CodeLayout, Codes, code_fingerprint
from rqgen.quantizers.usage import UsageCounts

from .pretrained import PretrainedModel


class TokenizerConfig(Protocol):
    """The settings that every tokenizer's config has."""

    class_names: tuple[str, ...]

    @property
    def image_channels(self) -> int:
        """Channels of an image."""
        ...

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of an image."""
        ...


class PriorConfig(Protocol):
    """The settings that every prior's config has."""

    class_names: tuple[str, ...]


class Tokenizer(PretrainedModel, ABC):
    """Images to codes and back.

    Images are (B, image_channels, *image_shape) in [-1, 1]; codes are laid out as `layout` says. `encode`, `decode` and
    `decode_partial` run without gradient and dropout in any mode and never change state. Calling a tokenizer gives an
    output with `.reconstruction`; in train mode this may update its codebooks. Its config has `image_channels`,
    `image_shape` and `class_names`.
    """

    config: TokenizerConfig

    @property
    @abstractmethod
    def layout(self) -> CodeLayout:
        """The shape of an image's codes."""

    @abstractmethod
    def encode(self, images: Tensor) -> Codes:
        """Return codes of images."""

    @abstractmethod
    def decode(self, codes: Any) -> Tensor:
        """Return images of codes. Raise IndexError for a code outside [0, K)."""

    @abstractmethod
    def decode_partial(self, codes: Any, levels: int, /) -> Tensor:
        """Return images of the first `levels` depths or scales alone: coarse to fine. Raise ValueError unless 1 <=
        levels <= their number."""

    @abstractmethod
    def encode_latents(self, images: Tensor, *, check: bool = True) -> Tensor:
        """Return the latents that are quantized. Images are checked unless `check` is off."""

    @abstractmethod
    def decode_latents(self, latents: Tensor, /) -> Tensor:
        """Return images of latents."""

    def decode_vectors(self, vectors: list[Tensor]) -> Tensor:
        """Return images of vectors in the place of codes, such as mixtures of code vectors, laid out as codes are; for
        priors with smooth sampling.

        Raises:
            NotImplementedError: a tokenizer that has no use for them.
        """
        raise NotImplementedError(f"decode_vectors: a {type(self).__name__} decodes codes alone")

    @abstractmethod
    def loss(self, images: Tensor) -> Any:
        """Return a named tuple with the loss to differentiate, `.total`, the `.output` of the call, and all other
        terms, which are logged by their names."""

    @abstractmethod
    def code_tensors(self) -> list[Tensor]:
        """Return all tensors that decide what a code stands for."""

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, by which an adversarial loss is balanced.

        Raises:
            NotImplementedError: a tokenizer without such a convolution.
        """
        raise NotImplementedError(f"last_layer: a {type(self).__name__} has no last convolution")

    @property
    def usage(self) -> UsageCounts | None:
        """Counts of the codes chosen in training; None where none are kept."""
        return None

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.layout.codebook_size

    @property
    def image_channels(self) -> int:
        """Channels of an image."""
        return self.config.image_channels

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of an image."""
        return self.config.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """Classes of the images it was trained on; empty where unknown."""
        return self.config.class_names

    def fingerprint(self) -> str:
        """Identify the meaning of the codes: see `rqgen.quantizers.code_fingerprint`."""
        return code_fingerprint(*self.code_tensors())

    def encoder_for(self, num_images: int) -> Callable[[Tensor], Codes]:
        """Return `encode`, prepared for about `num_images` images with the codebook as it is now: the same codes,
        faster."""
        return self.encode


class LevelLoss(NamedTuple):
    """Negative log-likelihood of codes, float32."""

    total: Tensor
    """The loss to differentiate."""
    per_level: Tensor
    """(levels,): the mean over each depth's or scale's codes, detached."""


class CodeLosses(NamedTuple):
    """Predictions of each code of some images from the codes before it."""

    nll: Tensor
    """float32 (N, L): `-log p(code | the codes before it, condition)`, in nats; L as in `CodeLayout.flatten`."""
    correct: Tensor
    """bool (N, L): whether the code is the likeliest one."""


class Prior(PretrainedModel, ABC):
    """A distribution over the codes of a tokenizer, given a condition.

        p(codes | condition) = prod_s p(codes of step s | codes of the steps before, condition)

    `prior(codes, condition)` gives an output with `.logits`, float32 (N, .., K): of every code of `layout`, in the
    order of `CodeLayout.flatten`, given the codes of the steps before its own. A prior carries the tensors that it
    embeds codes with: no tokenizer is needed to call it.
    """

    config: PriorConfig
    tokenizer_class: ClassVar[type[Tokenizer]]
    """The tokenizer whose codes it models."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    """The precisions it can be sampled in, see `rqgen.generate`."""
    edits: ClassVar[Literal["nothing", "rows", "regions"]] = "nothing"
    """The parts of an image that `rqgen.edit` can sample again: all rows from one on, or any region."""
    has_smooth_sampling: ClassVar[bool] = False
    """True if mixtures of codes can stand for codes, see `rqgen.generate`."""

    @property
    @abstractmethod
    def layout(self) -> CodeLayout:
        """The shape of an image's codes."""

    @property
    @abstractmethod
    def condition_kind(self) -> str:
        """ "none", "class" or "tokens"."""

    @property
    @abstractmethod
    def condition_size(self) -> int:
        """Classes, or token ids, that a condition may hold; 0 without a condition."""

    @property
    @abstractmethod
    def has_null_condition(self) -> bool:
        """True if the prior learned the unconditional distribution too, which guidance needs."""

    @abstractmethod
    def condition_ids(self, condition: Tensor | None, batch: int) -> Tensor:
        """Return the condition as int64 (B, L) ids; None is the null condition. Errors: see
        `rqgen.models.condition`."""

    @property
    def levels(self) -> int:
        """Depths or scales of the codes."""
        return self.layout.levels

    @property
    def steps(self) -> list[tuple[int, slice]]:
        """The codes that are predicted at once, in order: see `CodeLayout.steps`."""
        return self.layout.steps

    @property
    def num_classes(self) -> int:
        """Classes that it can be asked for; 0 without a class condition."""
        return self.condition_size if self.condition_kind == "class" else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels; empty where unknown."""
        return self.config.class_names

    def cfg_scale_per_level(self, cfg_scale: float) -> list[float]:
        """Return the guidance of each level for this `cfg_scale`; here the same for all."""
        return [cfg_scale] * self.levels

    def check_values(self) -> None:
        """Raise ValueError on the meta device, where shapes can be computed but nothing sampled."""
        if self.device.type == "meta":
            raise ValueError("prior: it is on the meta device and has no values; load them first")

    def check_codebooks(self) -> None:
        """Raise ValueError while the prior waits for the codebooks that it embeds with."""

    def codebook_pairs(self, vae: Any) -> list[tuple[Tensor, Tensor]]:
        """Return the prior's own copies of the tokenizer's tensors, each with the tokenizer's; none where it has
        none."""
        return []

    def check_tokenizer(self, vae: Any) -> None:
        """Raise TypeError or ValueError unless `vae` is of the prior's system, has the codes that the prior was made
        with, and is on the same device."""
        if not isinstance(vae, self.tokenizer_class):
            raise TypeError(f"vae: expected an {self.tokenizer_class.__name__}, got {type(vae).__name__}")
        ours, theirs = self.layout, vae.layout
        for name, expected, got in (
            (_SHAPE_NAMES[ours.kind], ours.to_json(), theirs.to_json()),
            ("codebook_size", ours.codebook_size, theirs.codebook_size),
            ("device", self.device, vae.device),
        ):
            if got != expected:
                raise ValueError(f"vae: expected the prior's {name}, {expected}, got {got}")
        self.check_values()
        self.check_codebooks()
        for mine, other in self.codebook_pairs(vae):
            if mine.shape != other.shape or not _same_but_rounded(mine, other):
                raise ValueError("vae: expected the codebooks that the prior was made with, got others")

    def loss(self, codes: Any, condition: Tensor | None = None) -> LevelLoss:
        """Return the cross-entropy of all codes given the codes before them: the mean over all of them, and over each
        level's."""
        nll = self.code_losses(codes, condition).nll
        return LevelLoss(nll.mean(), level_means(self.layout, nll.detach()))

    def code_losses(self, codes: Any, condition: Tensor | None = None) -> CodeLosses:
        """Return the losses of all codes of these images, given the codes before each, and the hits."""
        logits_nlk = self(codes, condition).logits
        logits_nlk = logits_nlk.flatten(1, -2)
        codes_nl = self.layout.flatten(codes)
        nll = F.cross_entropy(logits_nlk.transpose(1, 2), codes_nl, reduction="none")
        return CodeLosses(nll, logits_nlk.argmax(-1) == codes_nl)


# Names of the codes' shape in messages and configs.
_SHAPE_NAMES = {"stacks": "code_shape", "maps": "scales"}


def _same_but_rounded(mine: Tensor, other: Tensor) -> bool:
    """Return True if the tensors are equal, or one is the other rounded to a shorter type: it may have that type still,
    or have been cast (or saved and read) back to a longer one."""
    if torch.equal(mine.to(other.dtype), other) or torch.equal(mine, other.to(mine.dtype)):
        return True
    return any(
        torch.equal(mine, other.to(short).to(mine.dtype)) or torch.equal(other, mine.to(short).to(other.dtype))
        for short in (torch.float16, torch.bfloat16)
    )


def level_means(layout: CodeLayout, values_nl: Tensor) -> Tensor:
    """Return means, (levels,), of (N, L) values, one for each code, over each level."""
    return torch.stack([part.mean() for part in layout.by_level(layout.unflatten(values_nl))])
