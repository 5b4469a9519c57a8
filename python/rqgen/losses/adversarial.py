"""Stage 1 against a discriminator: the tokenizer's own loss, a perceptual distance and an adversarial loss, balanced as
in VQ-GAN (Esser et al. 2021) and the published RQ-VAE (Lee et al. 2022)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from rqgen.checks import check_integer, check_nonnegative
from rqgen.config import one_of

from .batches import check_batch, check_finite, check_pair
from .discriminator import PatchDiscriminator

DISC_LOSSES = ("hinge", "vanilla", "non_saturating")
_WEIGHT_EPSILON = 1e-4
# Gradients at the reconstruction go through the networks times a power of two, which is exact: per pixel they are of
# the order of 1 / pixels, which float16 cannot hold. Where an image's distance is differentiated it is at most this.
_LARGEST_SCALE = 2**14


class TokenizerOutput(Protocol):
    """Output of a tokenizer's call."""

    @property
    def reconstruction(self) -> Tensor:
        """Images (B, C, H, W), with their graph."""


class TokenizerLoss(Protocol):
    """Result of a tokenizer's `loss`, such as `rqgen.models.rqvae.RQVAELoss`."""

    @property
    def total(self) -> Tensor:
        """The loss to differentiate."""

    @property
    def output(self) -> Any:
        """A `TokenizerOutput`."""


class GeneratorLoss(NamedTuple):
    """Result of `AdversarialLoss.generator`: scalars, float32 or float64, all but the total detached."""

    total: Tensor
    """To differentiate: the tokenizer's + perceptual_weight * perceptual + adaptive_weight * disc_weight *
    adversarial."""
    perceptual: Tensor
    """Mean over the images; 0 without a perceptual distance."""
    adversarial: Tensor
    """-mean(logits), or mean(softplus(-logits)) if non-saturating; 0 before the discriminator's start."""
    adaptive_weight: Tensor
    """The weight that balances the two, times the warm-up's; 0 before the start, or without gradient."""


class DiscriminatorLoss(NamedTuple):
    """Result of `AdversarialLoss.discriminator`: scalars, float32 or float64, all but the total detached."""

    total: Tensor
    """To differentiate: disc_weight * the loss + r1_weight / 2 * r1 + lecam_weight * lecam."""
    real: Tensor
    """Mean logit of the images."""
    fake: Tensor
    """Mean logit of the reconstructions."""
    r1: Tensor
    """Mean squared gradient norm at the images; 0 where r1_weight is."""
    lecam: Tensor
    """LeCam's regulariser; 0 where lecam_weight is."""


class AdversarialLoss(nn.Module):
    """Both losses of a training step of stage 1, one for the tokenizer (the generator), one for the discriminator:

        loss = tokenizer.loss(images)
        generator = adversarial.generator(loss, images, last_layer=tokenizer.last_layer)
        generator.total.backward()      # reaches the tokenizer alone
        ...                             # its optimizer steps
        discriminator = adversarial.discriminator(images, loss.output.reconstruction)
        discriminator.total.backward()  # reaches the discriminator alone
        ...                             # its optimizer steps

    With p = perceptual_weight, d = disc_weight, x the images, y their reconstructions and D the discriminator:

        generator:      tokenizer's total + p * mean perceptual(x, y) + w * d * g(D(y))
        w:              |grad(tokenizer's total + p * perceptual)| / (|grad g| + 1e-4), at most max_weight, a constant
                        (equation 7 of VQ-GAN); gradients at `last_layer`, the weight of the decoder's last convolution
        discriminator:  d * 1/2 (mean h(-D(x)) + mean h(D(y)))

        hinge:          h(t) = relu(1 + t),   g = -mean D(y)
        vanilla:        h(t) = softplus(t),   g = -mean D(y)            (as the published code names it)
        non_saturating: h(t) = softplus(t),   g = mean softplus(-D(y))

    Options of the discriminator, in its total:

        R1 (Mescheder et al. 2018):    r1_weight / 2 * mean over images of |grad_x sum of the patches' logits|^2
        LeCam (Tseng et al. 2021):     lecam_weight * (mean relu(D(x) - a_y)^2 + mean relu(a_x - D(y))^2), a_x and a_y
                                       averages of the mean logits with lecam_decay, the batch's included

    Values and running statistics are those of the published step, which runs D on y for the generator, then on y and x
    for the discriminator. Where nothing has changed in between the second pass over y is not computed (its statistics
    are), and perceptual distance and D are differentiated once each, down to y: the adaptive weight and the tokenizer's
    gradient both start from there. So the total of `generator` cannot be differentiated twice. Each rank of several
    processes finds its own weight, as in the published code.

    Computations run under the caller's autocast; losses and gradients at y are float32, and kept from underflow in
    float16. The state dict holds the discriminator (`critic.*`), LeCam's averages, and what `perceptual` keeps in its
    own (`LPIPS` and `ExportedFeatures` nothing).

    Args:
        discriminator: images (B, C, H, W) to logits of any shape, usually a `PatchDiscriminator`.
        perceptual: (x, y) to distances (B,): `LPIPS`, `ExportedFeatures` or any module; kept in eval mode. None: none.
            One with a number `images_at_once` is called for so many images at a time, as that of `LPIPS` says.
        disc_loss: "hinge", "vanilla" or "non_saturating".
        disc_weight: d.
        perceptual_weight: p.
        start_step: steps before the discriminator takes part; until then only the tokenizer learns.
        warmup_steps: steps from the start in which w rises linearly to its full value.
        max_weight: the largest w.
        r1_weight, lecam_weight: 0 leaves these out.
        lecam_decay: of LeCam's averages.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    logit_averages: Tensor
    logit_batches: Tensor

    def __init__(
        self,
        discriminator: nn.Module,
        perceptual: nn.Module | None = None,
        *,
        disc_loss: str = "hinge",
        disc_weight: float = 0.75,
        perceptual_weight: float = 1.0,
        start_step: int = 0,
        warmup_steps: int = 0,
        max_weight: float = 1e4,
        r1_weight: float = 0.0,
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.99,
    ) -> None:
        super().__init__()
        for name, module in (("discriminator", discriminator), ("perceptual", perceptual)):
            if not isinstance(module, nn.Module) and not (name == "perceptual" and module is None):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}")
        if disc_loss not in DISC_LOSSES:
            raise ValueError(f"disc_loss: {one_of(DISC_LOSSES, disc_loss)}")
        self.disc_loss = disc_loss
        self.disc_weight = check_nonnegative(disc_weight, "disc_weight")
        self.perceptual_weight = check_nonnegative(perceptual_weight, "perceptual_weight")
        self.start_step = check_integer(start_step, "start_step", 0)
        self.warmup_steps = check_integer(warmup_steps, "warmup_steps", 0)
        self.max_weight = check_nonnegative(max_weight, "max_weight")
        self.r1_weight = check_nonnegative(r1_weight, "r1_weight")
        self.lecam_weight = check_nonnegative(lecam_weight, "lecam_weight")
        self.lecam_decay = check_nonnegative(lecam_decay, "lecam_decay")
        if self.lecam_decay >= 1:
            raise ValueError(f"lecam_decay: expected 0 <= lecam_decay < 1, got {lecam_decay}")
        # Not `discriminator`, which is a method.
        self.critic = discriminator
        self.perceptual = perceptual
        # LeCam's, of real and fake, and how many batches they have seen.
        self.register_buffer("logit_averages", torch.zeros(2))
        self.register_buffer("logit_batches", torch.zeros((), dtype=torch.int64))
        self._pass: _FakePass | None = None
        if perceptual is not None:
            perceptual.eval()

    def train(self, mode: bool = True) -> AdversarialLoss:
        """Sets the mode of the discriminator; the perceptual distance stays in eval mode."""
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pass": None}  # a graph cannot be copied or pickled

    def is_active(self, step: int | None = None) -> bool:
        """True if the discriminator takes part in this step; before, its optimizer has nothing to do.

        Args:
            step: number of the training step, from 0. Needed where there is a start_step or warmup_steps.

        Raises:
            ValueError: step is needed and missing.
        """
        return self._ramp(step) is not None

    def generator(
        self, tokenizer_loss: TokenizerLoss, images: Tensor, *, last_layer: Tensor, step: int | None = None
    ) -> GeneratorLoss:
        """The tokenizer's loss of a step.

        Without gradient (in evaluation) the adaptive weight cannot be computed: it is 0, and the total leaves the
        adversarial loss out.

        Args:
            tokenizer_loss: of the tokenizer's `loss(images)`: `.total`, and `.output.reconstruction` with its graph.
            images: the same images (B, C, H, W), in [-1, 1].
            last_layer: the tokenizer's `last_layer`.
            step: see `is_active`.

        Raises:
            TypeError, ValueError: images or reconstruction of another dtype or shape, or not finite; a reconstruction
                without gradient, or one that does not depend on `last_layer`.
        """
        total, reconstruction = _parts(tokenizer_loss)
        _check_both(images, reconstruction)
        ramp = self._ramp(step)
        images = images.detach().to(_wide(reconstruction.dtype))
        zero = torch.zeros((), device=images.device)
        differentiable = torch.is_grad_enabled()
        if differentiable:
            _check_last_layer(last_layer, reconstruction)
        fake = reconstruction.detach().to(images.dtype).requires_grad_(differentiable)

        scale = _power_of_two(min(fake.numel(), len(fake) * _LARGEST_SCALE))
        perceptual, perceptual_grad = zero, torch.zeros_like(fake)
        if self.perceptual is not None and self.perceptual_weight > 0:
            perceptual, perceptual_grad = self._perceptual(images, fake, scale)
        adversarial, weight, adversarial_grad = zero, zero, torch.zeros_like(fake)
        if ramp is not None:
            logits, kept = self._judge_fake(fake, reconstruction)
            loss = self._fool(logits)
            adversarial = loss.detach()
            if differentiable:
                adversarial_grad = _gradient(loss, fake, scale, name="discriminator", retain_graph=kept)
                weight = ramp * self._adaptive_weight(
                    total, reconstruction, perceptual_grad, adversarial_grad, last_layer
                )

        strength = weight * self.disc_weight
        term = self.perceptual_weight * perceptual + strength * adversarial
        if differentiable:
            term = _GivenGradient.apply(reconstruction, perceptual_grad + strength * adversarial_grad, term)
        return GeneratorLoss(total + term, perceptual, adversarial, weight)

    def discriminator(self, images: Tensor, reconstruction: Tensor, *, step: int | None = None) -> DiscriminatorLoss:
        """The discriminator's loss of a step; `reconstruction` is taken without its graph.

        Before its start the total is 0 and gives no gradient.

        Args:
            images: (B, C, H, W), in [-1, 1].
            reconstruction: of the same images.
            step: see `is_active`.

        Raises:
            TypeError, ValueError: images or reconstruction of another dtype or shape, or not finite.
        """
        _check_both(images, reconstruction)
        dtype = _wide(reconstruction.dtype)
        zero = torch.zeros((), device=images.device)
        if self._ramp(step) is None:
            return DiscriminatorLoss(zero.clone().requires_grad_(torch.is_grad_enabled()), zero, zero, zero, zero)
        with_r1 = self.r1_weight > 0 and torch.is_grad_enabled()
        images = images.detach().to(dtype).requires_grad_(with_r1)
        fake = self._logits_of_fake(reconstruction)
        real = _wide_tensor(self.critic(images))
        one_sided = self._one_sided
        total = self.disc_weight * 0.5 * (one_sided(-real).mean() + one_sided(fake).mean())
        r1 = lecam = zero
        if with_r1:
            (gradient,) = torch.autograd.grad(real.sum(), images, create_graph=True)
            squared = gradient.square().flatten(1).sum(dim=1).mean()
            total = total + self.r1_weight / 2 * squared
            r1 = squared.detach()
        if self.lecam_weight > 0:
            of_real, of_fake = self._averages(real, fake)
            regulariser = F.relu(real - of_fake).square().mean() + F.relu(of_real - fake).square().mean()
            total = total + self.lecam_weight * regulariser
            lecam = regulariser.detach()
        return DiscriminatorLoss(total, real.detach().mean(), fake.detach().mean(), r1, lecam)

    # --- terms

    def _ramp(self, step: int | None) -> float | None:
        """The warm-up's factor of the adaptive weight at a step; None before the start."""
        if step is None:
            if self.start_step or self.warmup_steps:
                raise ValueError(
                    "step: expected the number of the training step, from 0, as start_step or warmup_steps is given"
                )
            return 1.0
        done = check_integer(step, "step", 0) - self.start_step
        if done < 0:
            return None
        return min(1.0, (done + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def _one_sided(self, logits: Tensor) -> Tensor:
        """The discriminator's loss of logits that should be low."""
        return F.relu(1 + logits) if self.disc_loss == "hinge" else F.softplus(logits)

    def _fool(self, logits: Tensor) -> Tensor:
        """The generator's loss of the logits of its images."""
        return F.softplus(-logits).mean() if self.disc_loss == "non_saturating" else -logits.mean()

    def _perceptual(self, images: Tensor, fake: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The mean distance, and its gradient at `fake` times the weight; zeros without gradient. Images go through the
        network a few at a time where it says so, so that only their features are kept."""
        network, count = self.perceptual, len(images)
        assert network is not None
        at_once = getattr(network, "images_at_once", None) or count
        distances, gradients = [], []
        for some, of_fake in zip(images.split(at_once), fake.detach().split(at_once), strict=True):
            of_fake = of_fake.requires_grad_(fake.requires_grad)
            found = network(some, of_fake)
            if not isinstance(found, Tensor) or tuple(found.shape) != (len(some),):
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"perceptual: expected distances of shape ({len(some)},), got {got}")
            part = _wide_tensor(found).sum() / count
            if fake.requires_grad:
                gradients.append(_gradient(part, of_fake, scale, name="perceptual") * self.perceptual_weight)
            distances.append(part.detach())
        gradient = torch.cat(gradients) if gradients else torch.zeros_like(fake)
        return torch.stack(distances).sum(), gradient

    def _adaptive_weight(
        self,
        total: Tensor,
        reconstruction: Tensor,
        perceptual_grad: Tensor,
        adversarial_grad: Tensor,
        last_layer: Tensor,
    ) -> Tensor:
        # Times a power of two for half types: less than above, because the weight's gradient sums over all pixels.
        scale = _power_of_two(math.sqrt(reconstruction.numel()))
        dtype = reconstruction.dtype
        # A sum of gradients from two starts.
        (nll_grad,) = torch.autograd.grad(
            (total, reconstruction),
            last_layer,
            (torch.full_like(total, scale), (perceptual_grad * scale).to(dtype)),
            retain_graph=True,
            allow_unused=True,
        )
        (gen_grad,) = torch.autograd.grad(
            reconstruction, last_layer, (adversarial_grad * scale).to(dtype), retain_graph=True, allow_unused=True
        )
        if nll_grad is None or gen_grad is None:
            raise ValueError(
                "last_layer: expected a weight that the reconstruction was computed with, got another tensor"
            )
        lengths = [_wide_tensor(gradient).norm() / scale for gradient in (nll_grad, gen_grad)]
        return (lengths[0] / (lengths[1] + _WEIGHT_EPSILON)).clamp(0, self.max_weight)

    @torch.no_grad()
    def _averages(self, real: Tensor, fake: Tensor) -> Tensor:
        """LeCam's averages of the mean logits, (2,); in train mode this batch's are taken in first."""
        batch = torch.stack([real.mean(), fake.mean()]).to(self.logit_averages.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(batch)
            batch /= dist.get_world_size()
        unset = self.logit_batches == 0
        if not self.training:
            return torch.where(unset, batch, self.logit_averages)
        averages = torch.where(unset, batch, torch.lerp(batch, self.logit_averages, self.lecam_decay))
        self.logit_averages.copy_(averages)
        self.logit_batches.add_(1)
        return averages

    # --- the discriminator's passes over the reconstruction

    def _judge_fake(self, fake: Tensor, reconstruction: Tensor) -> tuple[Tensor, bool]:
        """Logits of the reconstruction for the generator, and whether their graph is kept for the discriminator."""
        critic = self.critic
        self._pass = None
        if not (torch.is_grad_enabled() and isinstance(critic, PatchDiscriminator)):
            return _wide_tensor(critic(fake)), False
        before = critic.running_statistics()
        logits = _wide_tensor(critic(fake))
        if not critic.is_repeatable:
            return logits, False
        self._pass = _FakePass(logits, reconstruction.detach(), before, _state_of(critic, reconstruction))
        return logits, True

    def _logits_of_fake(self, reconstruction: Tensor) -> Tensor:
        """Logits of the reconstruction for the discriminator: a second pass over it, unless it would give the same."""
        kept, self._pass = self._pass, None
        critic = self.critic
        if (
            kept is not None
            and isinstance(critic, PatchDiscriminator)
            and torch.is_grad_enabled()
            and _is_same(kept.reconstruction, reconstruction)
            and kept.state == _state_of(critic, reconstruction)
        ):
            critic.repeat_statistics(kept.statistics)
            return kept.logits
        return _wide_tensor(critic(reconstruction.detach().to(_wide(reconstruction.dtype))))


class _FakePass(NamedTuple):
    """A pass of the discriminator over a reconstruction, whose graph has not been used for the discriminator yet."""

    logits: Tensor
    reconstruction: Tensor  # detached: holds the memory, so that the address stays its own
    statistics: list[Tensor]  # the running statistics before the pass
    state: tuple[Any, ...]


def _state_of(critic: PatchDiscriminator, reconstruction: Tensor) -> tuple[Any, ...]:
    """Everything that a pass depends on and that may change between two: identities and versions of the discriminator's
    tensors, of the reconstruction, the modes and autocast."""
    device = reconstruction.device.type
    tensors = [*critic.parameters(), *critic.buffers()]
    return (
        [(id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad) for tensor in tensors],
        [module.training for module in critic.modules()],
        reconstruction._version,
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        critic.is_repeatable,
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """True if two tensors are the same elements of the same memory."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.device == other.device
    )


class _GivenGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to a tensor has been computed already."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = tensor.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None, None


def _gradient(loss: Tensor, images: Tensor, scale: float, *, name: str, retain_graph: bool = False) -> Tensor:
    """d loss / d images, through values times `scale`."""
    if not loss.requires_grad:
        raise ValueError(f"{name}: expected a result that depends on its images by a gradient, got one without")
    (gradient,) = torch.autograd.grad(loss * scale, images, retain_graph=retain_graph, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{name}: expected a result that depends on its images by a gradient, got one without")
    return gradient / scale


def _power_of_two(number: float) -> float:
    """The largest power of two up to a number >= 1."""
    return 2.0 ** math.floor(math.log2(number))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for half types."""
    return torch.promote_types(dtype, torch.float32)


def _wide_tensor(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor.dtype))


def _parts(tokenizer_loss: TokenizerLoss) -> tuple[Tensor, Tensor]:
    total = getattr(tokenizer_loss, "total", None)
    reconstruction = getattr(getattr(tokenizer_loss, "output", None), "reconstruction", None)
    if not (isinstance(total, Tensor) and isinstance(reconstruction, Tensor)):
        raise TypeError(
            "tokenizer_loss: expected what a tokenizer's `loss` gives, with .total and .output.reconstruction, got "
            f"{type(tokenizer_loss).__name__}"
        )
    if total.numel() != 1:
        raise ValueError(f"tokenizer_loss.total: expected one number, got shape {tuple(total.shape)}")
    return total.reshape(()), reconstruction


def _check_both(images: Tensor, reconstruction: Tensor) -> None:
    check_batch(images, "images")
    check_batch(reconstruction, "reconstruction")
    check_pair(images, reconstruction, ("images", "reconstruction"))
    if len(images) == 0:
        raise ValueError(f"images: expected at least one to train on, got shape {tuple(images.shape)}")
    check_finite(images, "images")
    check_finite(reconstruction, "reconstruction")


def _check_last_layer(last_layer: Tensor, reconstruction: Tensor) -> None:
    if not reconstruction.requires_grad:
        raise ValueError(
            "tokenizer_loss.output.reconstruction: expected one with its graph, got one without gradient; evaluate "
            "under torch.no_grad()"
        )
    if not isinstance(last_layer, Tensor):
        raise TypeError(
            f"last_layer: expected the weight of the decoder's last convolution, got {type(last_layer).__name__}"
        )
    if not last_layer.requires_grad:
        raise ValueError("last_layer: expected a weight that is trained, got one that requires no gradient")
