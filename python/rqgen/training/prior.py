"""Stage 2: training of an RQ-Transformer on the tokenizer's codes, with soft labels and stochastic codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

import rqkernels
from rqgen.checks import check_integer
from rqgen.config import MAX_SEED, check_bounds
from rqgen.data.codes import EncodedImages
from rqgen.data.datasets import ImageDataset
from rqgen.data.stream import Batch, TensorItems
from rqgen.models.rqtransformer import RQTransformer, RQTransformerConfig, SoftLabels, prior_loss
from rqgen.models.rqvae import RQVAE
from rqgen.models.transformer import TransformerConfig

from .encoding import check_labels, encode_dataset
from .loop import StepResult

# Images from which the temperature is measured.
TAU_IMAGES = 1024


def _spatial() -> TransformerConfig:
    return TransformerConfig(layers=6, heads=4)


def _depth() -> TransformerConfig:
    return TransformerConfig(layers=2, heads=4)


@dataclass
class PriorConfig:
    """Settings of an RQ-Transformer: its size, condition and labels. Shapes and codebooks are the tokenizer's."""

    preset: str | None = None
    """A published size, see `RQTransformerConfig.preset`; then ``embed_dim``, ``spatial`` and ``depth`` are
    ignored."""
    embed_dim: int = 256
    """Width of both transformers."""
    spatial: TransformerConfig = field(default_factory=_spatial)
    """Stack over positions."""
    depth: TransformerConfig = field(default_factory=_depth)
    """Stack over the codes of one position."""
    condition: Literal["none", "class"] = "class"
    """Condition of the prior: none, or the class of an image."""
    condition_dropout: float = 0.1
    """Probability that a label is replaced by the null label in training; 0: no guidance when sampling."""
    embedding_dropout: float = 0.0
    """Dropout of the inputs of the stack over positions."""
    soft_labels: bool = True
    """Use Q_tau(k | r_{d-1}) of every depth's residual (equation 15) as the label instead of the nearest code."""
    stochastic_codes: bool = True
    """Sample the codes from Q_tau, again each time an image is seen."""
    tau: float | None = None
    """Temperature of Q_tau, in squared units of the latents. None: half the mean squared norm of the residual
    after the last depth, measured on the training images."""
    fused_classifier: bool = True
    """With soft labels: compute classifier and loss for some rows at a time, so that the logits of all codes x K
    never exist. False: they exist, and their gradient overwrites them; the loss is the same up to rounding. Ignored
    with hard labels."""
    cache_latents: bool = True
    """Encode every training image once, before the first step; false: at every step, as random crops and flips need."""

    def __post_init__(self) -> None:
        check_bounds(self, embed_dim=(1, 2**17))
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"tau: expected a positive number or null, got {self.tau}")
        for name in ("condition_dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= dropout < 1, got {getattr(self, name)}")

    def build(self, vae: RQVAE, num_classes: int, class_names: Sequence[str] = ()) -> RQTransformer:
        """Return a prior for the codes of ``vae`` with the names of its classes. Raise ValueError for a class
        condition without classes."""
        return RQTransformer(self.model_config(vae, num_classes, class_names), vae.codebooks)

    def model_config(self, vae: RQVAE, num_classes: int, class_names: Sequence[str] = ()) -> RQTransformerConfig:
        """Return the config of the prior that `build` makes."""
        conditional = self.condition == "class"
        if conditional and num_classes < 1:
            raise ValueError("condition: 'class' needs images with classes; set prior.condition=none")
        shape: dict[str, Any] = {
            "code_shape": vae.code_shape,
            "codebook_size": vae.codebook_size,
            "code_dim": vae.codebooks.shape[-1],
        }
        common: dict[str, Any] = {
            "shared_codebook": vae.codebooks.ndim == 2,
            "condition": self.condition,
            "condition_vocab_size": num_classes if conditional else 0,
            "condition_dropout": self.condition_dropout if conditional else 0.0,
            "class_names": tuple(class_names) if conditional else (),
            "embedding_dropout": self.embedding_dropout,
        }
        if self.preset is not None:
            return RQTransformerConfig.preset(self.preset, **shape, **common)
        return RQTransformerConfig(**shape, **common, embed_dim=self.embed_dim, spatial=self.spatial, depth=self.depth)


class PriorData(NamedTuple):
    """Training data of a prior. ``kind``: the inputs of ``items``; ``tau`` is None if it is not needed (hard labels of
    the nearest codes)."""

    items: ImageDataset | TensorItems
    kind: Literal["images", "latents", "codes"]
    tau: float | None


def prior_data(
    config: PriorConfig,
    vae: RQVAE,
    source: ImageDataset | EncodedImages,
    *,
    batch_size: int,
    console: Console | None = None,
) -> PriorData:
    """Prepare the images, or the codes on disk, for training a prior over the codes of ``vae``.

    Raise ValueError for codes of another tokenizer, for invalid labels if they are the condition, for
    soft labels or stochastic codes from codes alone (those are made of residuals, which codes on disk do not have), and
    for cached latents of varying images.
    """
    if isinstance(source, EncodedImages):
        source.check_tokenizer(vae.layout, vae.fingerprint())
        if config.condition == "class":
            check_labels(source.labels, source.class_names)
        if config.soft_labels or config.stochastic_codes:
            raise ValueError(
                "codes on disk have no residuals: set prior.soft_labels=false and "
                "prior.stochastic_codes=false, or train from images"
            )
        if not isinstance(source.codes, Tensor):
            raise ValueError(f"codes: expected stacks of codes, got {source.layout.in_words()}")
        return PriorData(TensorItems(source.codes, source.labels), "codes", None)
    needs_tau = config.soft_labels or config.stochastic_codes
    if config.cache_latents:
        if source.varies:
            raise ValueError(
                "prior.cache_latents: the images differ from epoch to epoch (crops, flips): set it to false"
            )
        latents, labels = encode_dataset(vae, source, batch_size=batch_size, codes=False, console=console)
        if config.condition == "class":
            check_labels(labels, source.class_names)
        tau = (config.tau or measure_tau(vae, latents)) if needs_tau else None
        return PriorData(TensorItems(latents, labels), "latents", tau)
    tau = config.tau
    if needs_tau and tau is None:
        count = min(len(source), TAU_IMAGES)
        latents, _ = encode_dataset(vae, source, batch_size=batch_size, codes=False, count=count, console=console)
        tau = measure_tau(vae, latents)
    return PriorData(source, "images", tau if needs_tau else None)


@torch.no_grad()
def measure_tau(vae: RQVAE, latents_nhwc: Tensor) -> float:
    """Return half the mean of |r_D|^2: soft labels then spread over codes whose distances differ by as little as the
    quantization error, at any scale of the latents.

    Raises:
        ValueError: no latents; a mean that is 0 or not finite.
    """
    if len(latents_nhwc) == 0:
        raise ValueError("latents: expected those of at least one image, got none")
    packed = vae.pack_codebook(len(latents_nhwc))
    codebooks = vae.codebooks if packed is None else packed
    norms = rqkernels.residual_search(latents_nhwc.to(vae.device), codebooks, vae.depth).residual_sq_norms
    tau = 0.5 * norms[..., -1].mean().item()
    if not 0 < tau < float("inf"):
        raise ValueError(f"tau: cannot be measured, half the mean of |r_D|^2 is {tau}; give a number")
    return tau


class PriorStage:
    """Training by the cross-entropy over all codes, with soft or hard labels, on stochastic or nearest codes.

    ``kind``: the inputs of a batch. The codes of a batch and the residuals of its soft labels come from one
    search. Every sample has its own counter (seed, position in the run), so a resumed run samples the same codes.
    """

    name = "prior"
    axis = "depth"

    def __init__(
        self,
        model: RQTransformer,
        vae: RQVAE,
        config: PriorConfig,
        *,
        kind: Literal["images", "latents", "codes"],
        tau: float | None,
        seed: int,
        preview: Callable[[RQTransformer, RQVAE], dict[str, Tensor]] | None = None,
    ) -> None:
        if kind not in ("images", "latents", "codes"):
            raise ValueError(f"kind: expected 'images', 'latents' or 'codes', got {kind!r}")
        check_integer(seed, "seed", 0, MAX_SEED)
        if config.soft_labels or config.stochastic_codes:
            if tau is None or not tau > 0:
                raise ValueError(f"tau: expected a positive number, got {tau}")
            if kind == "codes":
                raise ValueError("kind: soft labels and stochastic codes need 'images' or 'latents', got 'codes'")
        self.model = model
        self._vae = vae.eval().requires_grad_(False)
        self._config, self._kind, self._seed, self._preview = config, kind, seed, preview
        self._soft_tau = tau if config.soft_labels else None
        self._stochastic_tau = tau if config.stochastic_codes else None

    def to(self, device: torch.device) -> None:
        self._vae.to(device)

    def step(self, batch: Batch) -> StepResult:
        codes_bhwd, residuals_bhwdc = self._codes(batch)
        condition = batch.labels if self._config.condition == "class" else None
        if self._soft_tau is None or residuals_bhwdc is None:
            loss = prior_loss(self.model(codes_bhwd, condition), codes=codes_bhwd)
        else:
            labels = SoftLabels(residuals_bhwdc, self._vae.codebooks, self._soft_tau)
            if self._config.fused_classifier:
                loss = prior_loss(self.model(codes_bhwd, condition, labels))
            else:
                loss = prior_loss(self.model(codes_bhwd, condition), **labels._asdict(), inplace=True)
        return StepResult(loss.total, {f"loss/depth_{d + 1}": term for d, term in enumerate(loss.per_depth)})

    @torch.no_grad()
    def _codes(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        if self._kind == "codes":
            return batch.inputs, None
        latents_bhwc = self._vae.encode_latents(batch.inputs) if self._kind == "images" else batch.inputs
        soft = self._soft_tau is not None
        if self._stochastic_tau is None:
            found = rqkernels.residual_search(latents_bhwc, self._vae.codebooks, self._vae.depth, return_residuals=soft)
        else:
            height, width, _ = self._vae.code_shape
            found = rqkernels.stochastic_residual_search(
                latents_bhwc,
                self._vae.codebooks,
                self._vae.depth,
                tau=self._stochastic_tau,
                seed=self._seed,
                offset=batch.first_row * height * width,
                return_residuals=soft,
            )
        return found.codes, found.residuals

    def usage(self) -> dict[str, Tensor]:
        return {}

    def previews(self, model: RQTransformer) -> dict[str, Tensor]:
        if self._preview is None:
            return {}
        return self._preview(model, self._vae)
