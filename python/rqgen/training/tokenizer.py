"""Stage 1: training of a tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rqgen.data.grid import image_grid
from rqgen.data.stream import Batch
from rqgen.losses import AdversarialLoss
from rqgen.models import Tokenizer

from .loop import StepResult
from .losses import AdversarialConfig
from .optim import OptimizerConfig

# A state of the discriminator is said in the log once it has lasted this number of steps.
_LASTING = 200
# A difference of mean logits, real less fake, from which the discriminator has won: the hinge loss has no gradient
# where every real logit is above 1 and every fake one below -1; of the others 4 is a probability of 0.88 for each.
_WON = {"hinge": 2.0, "vanilla": 4.0, "non_saturating": 4.0}


class TokenizerStage:
    """Training by the tokenizer's own `loss`: reconstruction and commitment for an RQ-VAE (Lee et al. 2022, equations
    6-7; moving averages inside the model update the codebook), and the codebook loss too for a multi-scale VQ-VAE.

    ``examples`` (N, channels, H, W), if given, are shown with their reconstructions while training.
    """

    name = "tokenizer"

    def __init__(self, model: Tokenizer, examples: Tensor | None = None) -> None:
        self.model = model
        self.axis = model.layout.axis
        self._examples = examples

    def to(self, device: torch.device) -> None:
        if self._examples is not None:
            self._examples = self._examples.to(device)

    def step(self, batch: Batch) -> StepResult:
        loss = self.model.loss(batch.inputs)
        return StepResult(loss.total, _own_terms(loss))

    def usage(self) -> dict[str, Tensor]:
        usage = self.model.usage
        return {} if usage is None else {"codes_used": usage.codes_used(), "perplexity": usage.perplexity()}

    def previews(self, model: Tokenizer) -> dict[str, Tensor]:
        if self._examples is None:
            return {}
        both = torch.cat([self._examples, model(self._examples).reconstruction.float()])
        return {"reconstructions": image_grid(both, columns=len(self._examples))}


class PerceptualTokenizerStage(TokenizerStage):
    """Training by the tokenizer's own loss + ``weight`` * the mean of ``perceptual`` (images, reconstructions) -> (B,),
    a frozen distance."""

    def __init__(self, model: Tokenizer, examples: Tensor | None, perceptual: nn.Module, weight: float) -> None:
        super().__init__(model, examples)
        self._perceptual, self._weight = perceptual, weight

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._perceptual.to(device)

    def step(self, batch: Batch) -> StepResult:
        loss = self.model.loss(batch.inputs)
        distance = self._perceptual(batch.inputs, loss.output.reconstruction).mean()
        return StepResult(loss.total + self._weight * distance, _own_terms(loss) | {"perceptual": distance.detach()})


class AdversarialTokenizerStage(TokenizerStage):
    """Training against a discriminator, by `rqgen.losses.AdversarialLoss`, which may hold a perceptual distance; the
    discriminator's weights are updated after the tokenizer's, on the same images and reconstructions.

    ``optimizer``: settings of the discriminator's.
    """

    def __init__(
        self, model: Tokenizer, examples: Tensor | None, losses: AdversarialLoss, optimizer: OptimizerConfig
    ) -> None:
        super().__init__(model, examples)
        self.adversary = losses
        self.adversary_optimizer = optimizer
        self._losses = losses
        self._step = 0
        self._last: tuple[Tensor, Tensor] | None = None  # images and reconstructions of the last batch
        self._since: dict[str, float] = {}
        self._said: set[str] = set()

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._losses.to(device)

    def start(self, step: int) -> None:
        self._step = step

    def step(self, batch: Batch) -> StepResult:
        loss = self.model.loss(batch.inputs)
        reconstruction = loss.output.reconstruction
        _check_finite(reconstruction)
        generator = self._losses.generator(loss, batch.inputs, last_layer=self.model.last_layer, step=self._step)
        terms = _own_terms(loss)
        if self._losses.perceptual is not None:
            terms["perceptual"] = generator.perceptual
        if self._losses.is_active(self._step):
            terms |= {"adversarial": generator.adversarial, "adaptive_weight": generator.adaptive_weight}
            self._last = batch.inputs, reconstruction.detach()
        return StepResult(generator.total, terms)

    def oppose(self) -> StepResult | None:
        if self._last is None:
            return None
        (images, reconstruction), self._last = self._last, None
        judged = self._losses.discriminator(images, reconstruction, step=self._step)
        terms = {"discriminator": judged.total.detach(), "real_logits": judged.real, "fake_logits": judged.fake}
        if self._losses.r1_weight > 0:
            terms["r1"] = judged.r1
        if self._losses.lecam_weight > 0:
            terms["lecam"] = judged.lecam
        return StepResult(judged.total, terms)

    def remarks(self, record: dict[str, float]) -> list[str]:
        if "real_logits" not in record:
            return []
        step, real, fake = record["step"], record["real_logits"], record["fake_logits"]
        states = {
            "won": real - fake >= _WON[self._losses.disc_loss],
            "clamped": record["adaptive_weight"] >= 0.99 * self._losses.max_weight,
        }
        since = {name: self._since.get(name, step) for name, holds in states.items() if holds}
        self._since = since
        lasting = [name for name in since if step - since[name] >= _LASTING and name not in self._said]
        self._said.update(lasting)
        texts = {
            "won": (
                f"the discriminator has won: for {_LASTING} steps or more its logits are far apart (real {real:.3g}, "
                f"fake {fake:.3g}); a lower adversarial.optimizer.learning_rate, adversarial.r1_weight, "
                "adversarial.lecam_weight or adversarial.augment hold it back"
            ),
            "clamped": (
                f"the adaptive weight is at adversarial.max_weight ({self._losses.max_weight:g}) for {_LASTING} steps "
                "or more: the discriminator gives the tokenizer next to no gradient"
            ),
        }
        return [texts[name] for name in lasting]


def tokenizer_stage(
    model: Tokenizer,
    examples: Tensor | None = None,
    *,
    perceptual: nn.Module | None = None,
    perceptual_weight: float = 1.0,
    adversarial: AdversarialConfig | None = None,
    seed: int = 0,
) -> TokenizerStage:
    """Return the stage that trains a tokenizer by its own loss and those given.

    Args:
        perceptual: distance (images, reconstructions) -> (B,); None: none.
        adversarial: settings of a new discriminator, whose weights come from torch's global generator; None: none.
        seed: of the discriminator's ``augment``.
    """
    if adversarial is not None:
        losses = adversarial.build(
            model.image_channels, perceptual=perceptual, perceptual_weight=perceptual_weight, seed=seed
        )
        return AdversarialTokenizerStage(model, examples, losses, adversarial.optimizer)
    if perceptual is not None:
        return PerceptualTokenizerStage(model, examples, perceptual, perceptual_weight)
    return TokenizerStage(model, examples)


def _own_terms(loss: Any) -> dict[str, Tensor]:
    """The terms of a tokenizer's loss to log."""
    return {name: term for name, term in loss._asdict().items() if name not in ("total", "output")}


def _check_finite(reconstruction: Tensor) -> None:
    """Raise FloatingPointError before NaN reaches the running statistics and averages of other networks."""
    if not bool(reconstruction.detach().isfinite().all()):
        raise FloatingPointError("a reconstruction is not finite")
