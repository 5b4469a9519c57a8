"""AdversarialLoss against the published step written out plainly: every pass run, every gradient taken by itself."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rqgen
from rqgen.losses import AdversarialLoss, PatchDiscriminator
from rqgen.models import MultiScaleVQVAE, MultiScaleVQVAEConfig
from rqgen.quantizers import MultiScaleConfig


class Output(NamedTuple):
    reconstruction: Tensor


class Loss(NamedTuple):
    total: Tensor
    output: Output


class Tokenizer(nn.Module):
    """The least that a tokenizer of this step is: two convolutions and a loss."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3, padding=1)
        self.last = nn.Conv2d(4, channels, 3, padding=1)

    def loss(self, images: Tensor) -> Loss:
        hidden = self.first(images).tanh()
        reconstruction = self.last(hidden)
        # With a term that does not pass by the last layer, as a commitment loss.
        total = F.mse_loss(reconstruction.float(), images.float()) + 0.1 * hidden.float().square().mean()
        return Loss(total, Output(reconstruction))

    @property
    def last_layer(self) -> Tensor:
        return self.last.weight


class Blurred(nn.Module):
    """A perceptual distance with weights, and a dropout that must never be active."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.filter = nn.Conv2d(channels, 2, 3, stride=2)
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        difference = self.dropout(self.filter(x)) - self.dropout(self.filter(y))
        return difference.square().mean(dim=(1, 2, 3))


D_LOSSES = {
    "hinge": lambda real, fake: 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()),
    "vanilla": lambda real, fake: 0.5 * ((1 + (-real).exp()).log().mean() + (1 + fake.exp()).log().mean()),
    "non_saturating": lambda real, fake: 0.5 * ((1 + (-real).exp()).log().mean() + (1 + fake.exp()).log().mean()),
}
G_LOSSES = {
    "hinge": lambda fake: -fake.mean(),
    "vanilla": lambda fake: -fake.mean(),
    "non_saturating": lambda fake: -fake.sigmoid().log().mean(),
}


class Step(NamedTuple):
    """Results of one training step."""

    total: Tensor
    perceptual: Tensor
    adversarial: Tensor
    weight: Tensor
    judged: Tensor
    real: Tensor
    fake: Tensor


def plain_step(
    tokenizer: Any, critic: nn.Module, perceptual: nn.Module | None, images: Tensor, **settings: Any
) -> Step:
    """The published step; leaves gradients in the tokenizer's parameters and in the discriminator's."""
    kind, d, p = settings["disc_loss"], settings["disc_weight"], settings["perceptual_weight"]
    loss = tokenizer.loss(images)
    reconstruction = loss.output.reconstruction
    distance = torch.zeros(()) if perceptual is None else perceptual(images, reconstruction).mean()
    adversarial = G_LOSSES[kind](critic(reconstruction))
    nll = torch.autograd.grad(loss.total + p * distance, tokenizer.last_layer, retain_graph=True)[0].norm()
    gen = torch.autograd.grad(adversarial, tokenizer.last_layer, retain_graph=True)[0].norm()
    weight = (nll / (gen + 1e-4)).clamp(0, settings.get("max_weight", 1e4)).detach()
    total = loss.total + p * distance + weight * d * adversarial
    for parameter, gradient in zip(
        tokenizer.parameters(),
        torch.autograd.grad(total, list(tokenizer.parameters()), allow_unused=True),
        strict=True,
    ):
        parameter.grad = gradient
    fake, real = critic(reconstruction.detach()), critic(images)
    judged = d * D_LOSSES[kind](real, fake)
    critic.zero_grad()
    judged.backward()
    return Step(total, distance, adversarial, weight, judged, real.mean(), fake.mean())


def our_step(tokenizer: Any, loss_module: AdversarialLoss, images: Tensor, step: int | None = None) -> Step:
    loss = tokenizer.loss(images)
    generator = loss_module.generator(loss, images, last_layer=tokenizer.last_layer, step=step)
    tokenizer.zero_grad()
    loss_module.critic.zero_grad()
    generator.total.backward()
    assert all(parameter.grad is None for parameter in loss_module.critic.parameters())
    of_tokenizer = copy.deepcopy([parameter.grad for parameter in tokenizer.parameters()])
    judged = loss_module.discriminator(images, loss.output.reconstruction, step=step)
    judged.total.backward()
    torch.testing.assert_close([parameter.grad for parameter in tokenizer.parameters()], of_tokenizer, rtol=0, atol=0)
    return Step(*generator, *judged[:3])


def assert_same(ours: Step, plain: Step, modules: tuple[tuple[nn.Module, nn.Module], ...]) -> None:
    for name, found, expected in zip(Step._fields, ours, plain, strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), msg=lambda text, name=name: f"{name}: {text}")
        assert found.requires_grad == (name in ("total", "judged")) and found.shape == ()
    for one, other in modules:
        for (name, found), expected in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("perceptual", [True, False])
@pytest.mark.parametrize("norm", ["batch", "actnorm"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("disc_loss", ["hinge", "vanilla", "non_saturating"])
def test_two_steps_as_published(images: Tensor, disc_loss: str, layers: int, norm: str, perceptual: bool) -> None:
    """Values, gradients and running statistics, in float64, over two steps with an optimizer's step after each."""
    settings = {"disc_loss": disc_loss, "disc_weight": 0.6, "perceptual_weight": 0.7}
    tokenizer, critic = Tokenizer().double(), PatchDiscriminator(3, 4, layers, norm).double()
    distance = Blurred().double().eval() if perceptual else None
    theirs, their_critic = copy.deepcopy(tokenizer), copy.deepcopy(critic)
    ours = AdversarialLoss(critic, distance, **settings)
    pairs = ((tokenizer, theirs), (critic, their_critic))
    optimizers = [torch.optim.Adam(module.parameters(), lr=1e-3) for pair in pairs for module in pair]
    for batch in (images.double(), images.double().flip(3) * 0.5):
        found = our_step(tokenizer, ours, batch)
        assert_same(found, plain_step(theirs, their_critic, distance, batch, **settings), pairs)
        for optimizer in optimizers:
            optimizer.step()


def test_with_spectral_norm_every_pass_is_run(images: Tensor) -> None:
    """A power iteration per pass: the second pass over the reconstruction has other weights."""
    settings = {"disc_loss": "hinge", "disc_weight": 1.0, "perceptual_weight": 1.0}
    tokenizer = Tokenizer().double()
    critic = PatchDiscriminator(3, 4, 2, spectral_norm=True).double()
    theirs, their_critic = copy.deepcopy(tokenizer), copy.deepcopy(critic)
    ours = AdversarialLoss(critic, **settings)
    for _ in range(2):
        found = our_step(tokenizer, ours, images.double())
        expected = plain_step(theirs, their_critic, None, images.double(), **settings)
        assert_same(found, expected, ((tokenizer, theirs), (critic, their_critic)))


class Counting(PatchDiscriminator):
    """Counts its passes."""

    passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(images)


def test_two_passes_in_the_place_of_three(images: Tensor) -> None:
    critic = Counting(3, 4, 2)
    our_step(Tokenizer(), AdversarialLoss(critic), images)
    assert critic.passes == 2


@pytest.mark.parametrize("change", ["weights", "pass", "mode", "images", "autocast", "hook", "data", "none"])
def test_what_changed_in_between_is_computed_again(images: Tensor, change: str) -> None:
    """The discriminator's loss is that of the discriminator as it is, on the reconstruction as it is."""
    tokenizer, critic = Tokenizer(), Counting(3, 4, 2)
    ours = AdversarialLoss(critic, disc_weight=1.0)
    loss = tokenizer.loss(images)
    ours.generator(loss, images, last_layer=tokenizer.last_layer)
    reconstruction = loss.output.reconstruction.detach()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast")
    if change == "weights":
        with torch.no_grad():
            critic.main[0].weight.mul_(1.5)
    elif change == "data":
        critic.main[0].weight.data = critic.main[0].weight.data * 1.5
    elif change == "pass":
        critic(images * 0.1)
    elif change == "mode":
        critic.eval()
    elif change == "images":
        reconstruction.mul_(0.5)  # in place: the same memory
    elif change == "hook":
        critic.register_forward_hook(lambda module, inputs, logits: logits * 2)
    expected_critic, before = copy.deepcopy(critic), critic.passes
    with autocast:
        found = ours.discriminator(images, reconstruction)
        fake, real = expected_critic(reconstruction), expected_critic(images)
    assert critic.passes - before == (1 if change == "none" else 2)
    torch.testing.assert_close(found.total, D_LOSSES["hinge"](real.float(), fake.float()))
    torch.testing.assert_close(critic.state_dict(), expected_critic.state_dict())


def test_a_pass_serves_once(images: Tensor) -> None:
    tokenizer, critic = Tokenizer(), Counting(3, 4, 2)
    ours = AdversarialLoss(critic)
    loss = tokenizer.loss(images)
    ours.generator(loss, images, last_layer=tokenizer.last_layer)
    ours.discriminator(images, loss.output.reconstruction).total.backward()
    before = critic.passes
    ours.discriminator(images, loss.output.reconstruction).total.backward()
    assert critic.passes - before == 2


def test_micro_batches(images: Tensor) -> None:
    """Gradients of several batches add up, whichever order the two losses are called in."""
    tokenizer, critic = Tokenizer().double(), PatchDiscriminator(3, 4, 1, "actnorm").double()
    ours = AdversarialLoss(critic)
    critic(images.double())
    found, expected = [], []
    for order in ("in turns", "generator first"):
        for module in (tokenizer, critic):
            module.zero_grad()
        batches = images.double().split(2)
        losses = [tokenizer.loss(batch) for batch in batches]
        for batch, loss in zip(batches, losses, strict=True):
            ours.generator(loss, batch, last_layer=tokenizer.last_layer).total.backward()
            if order == "in turns":
                ours.discriminator(batch, loss.output.reconstruction).total.backward()
        if order == "generator first":
            for batch, loss in zip(batches, losses, strict=True):
                ours.discriminator(batch, loss.output.reconstruction).total.backward()
        gradients = [p.grad.clone() for module in (tokenizer, critic) for p in module.parameters()]
        found, expected = expected, gradients
    torch.testing.assert_close(found, expected)


# --- the weight


def test_the_weight_is_clamped(images: Tensor) -> None:
    tokenizer, critic = Tokenizer(), PatchDiscriminator(3, 4, 2)
    loss = tokenizer.loss(images)
    free = AdversarialLoss(critic).generator(loss, images, last_layer=tokenizer.last_layer).adaptive_weight
    half = float(free) / 2
    clamped = AdversarialLoss(critic, max_weight=half).generator(loss, images, last_layer=tokenizer.last_layer)
    assert clamped.adaptive_weight == pytest.approx(half)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.zero_()
    # A discriminator without an opinion: |grad nll| / 1e-4.
    loss = tokenizer.loss(images)
    nll = torch.autograd.grad(loss.total, tokenizer.last_layer, retain_graph=True)[0].norm()
    flat = AdversarialLoss(critic).generator(loss, images, last_layer=tokenizer.last_layer).adaptive_weight
    torch.testing.assert_close(flat, (nll / 1e-4).clamp(max=1e4))


def test_start_and_warm_up(images: Tensor) -> None:
    tokenizer, critic = Tokenizer(), Counting(3, 4, 2)
    ours = AdversarialLoss(critic, Blurred(), start_step=3, warmup_steps=4)
    before = copy.deepcopy(critic.state_dict())
    full = None
    for step, factor in ((0, None), (2, None), (3, 0.25), (4, 0.5), (6, 1.0), (7, 1.0), (1000, 1.0)):
        loss = tokenizer.loss(images)
        found = ours.generator(loss, images, last_layer=tokenizer.last_layer, step=step)
        assert ours.is_active(step) == (factor is not None)
        if factor is None:
            torch.testing.assert_close(found.total, loss.total + found.perceptual)
            assert found.adversarial == found.adaptive_weight == 0
            judged = ours.discriminator(images, loss.output.reconstruction, step=step)
            judged.total.backward()
            assert judged.total == judged.real == judged.fake == 0
            assert all(parameter.grad is None for parameter in critic.parameters()) and critic.passes == 0
            torch.testing.assert_close(critic.state_dict(), before)
        else:
            full = full or found.adaptive_weight / factor
            torch.testing.assert_close(found.adaptive_weight, full * factor)
            expected = loss.total + found.perceptual + found.adaptive_weight * 0.75 * found.adversarial
            torch.testing.assert_close(found.total, expected)
    for call in (
        lambda: ours.generator(loss, images, last_layer=tokenizer.last_layer),
        lambda: ours.discriminator(images, loss.output.reconstruction),
        lambda: ours.is_active(),
    ):
        with pytest.raises(ValueError, match="step: expected the number of the training step"):
            call()
    with pytest.raises(ValueError, match="step: expected an integer >= 0, got -1"):
        ours.is_active(-1)
    assert AdversarialLoss(critic).is_active()


def test_without_gradient_the_adversarial_loss_is_only_reported(images: Tensor) -> None:
    tokenizer, critic = Tokenizer(), PatchDiscriminator(3, 4, 2)
    critic(images)
    ours = AdversarialLoss(critic, Blurred()).eval()
    before = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        loss = tokenizer.loss(images)
        found = ours.generator(loss, images, last_layer=tokenizer.last_layer)
        judged = ours.discriminator(images, loss.output.reconstruction)
        torch.testing.assert_close(found.adversarial, -critic(loss.output.reconstruction).mean())
    assert found.adaptive_weight == 0 and not found.total.requires_grad and not judged.total.requires_grad
    torch.testing.assert_close(found.total, loss.total + found.perceptual)
    torch.testing.assert_close(ours.state_dict(), before)


@pytest.mark.parametrize("at_once", [1, 3, 4, 9])
def test_perceptual_distance_of_a_few_images_at_a_time(images: Tensor, at_once: int) -> None:
    seen = []

    class Few(Blurred):
        images_at_once = at_once

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x, y)

    tokenizer, critic, distance = Tokenizer().double(), PatchDiscriminator(3, 4, 2).double(), Few().double()
    theirs, their_critic = copy.deepcopy(tokenizer), copy.deepcopy(critic)
    settings = {"disc_loss": "hinge", "disc_weight": 0.6, "perceptual_weight": 0.7}
    found = our_step(tokenizer, AdversarialLoss(critic, distance, **settings), images.double())
    assert seen == {1: [1] * 4, 3: [3, 1], 4: [4], 9: [4]}[at_once]
    expected = plain_step(theirs, their_critic, distance, images.double(), **settings)
    assert_same(found, expected, ((tokenizer, theirs), (critic, their_critic)))


def test_no_perceptual_weight_computes_no_perceptual_distance(images: Tensor) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            raise AssertionError

    tokenizer = Tokenizer()
    ours = AdversarialLoss(PatchDiscriminator(3, 4, 2), Failing(), perceptual_weight=0.0)
    loss = tokenizer.loss(images)
    assert ours.generator(loss, images, last_layer=tokenizer.last_layer).perceptual == 0


# --- options of the discriminator


@pytest.mark.parametrize("norm", ["batch", "actnorm"])
def test_r1(images: Tensor, norm: str) -> None:
    critic = PatchDiscriminator(3, 4, 2, norm).double()
    images, reconstruction = images.double(), images.double().flip(2) * 0.7
    critic(images)
    plain = copy.deepcopy(critic)
    ours = AdversarialLoss(critic, r1_weight=3.0, disc_weight=0.5)
    found = ours.discriminator(images, reconstruction)
    found.total.backward()
    fake = plain(reconstruction)
    inputs = images.clone().requires_grad_()
    real = plain(inputs)
    gradient = torch.autograd.grad(real.sum(), inputs, create_graph=True)[0]
    r1 = sum(one.pow(2).sum() for one in gradient) / len(gradient)
    torch.testing.assert_close(found.r1, r1.detach())
    expected = 0.5 * D_LOSSES["hinge"](real, fake) + 1.5 * r1
    torch.testing.assert_close(found.total, expected)
    expected.backward()
    for one, other in zip(critic.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_lecam(images: Tensor) -> None:
    critic = PatchDiscriminator(3, 4, 2, "actnorm")
    critic(images)
    ours = AdversarialLoss(critic, lecam_weight=2.0, lecam_decay=0.9, disc_weight=1.0)
    averages = None
    for scale in (1.0, 0.5):
        batch, reconstruction = images * scale, images.flip(2) * scale
        real, fake = critic(batch), critic(reconstruction)
        means = torch.stack([real.mean(), fake.mean()])
        averages = means if averages is None else 0.9 * averages + 0.1 * means
        regulariser = F.relu(real - averages[1]).pow(2).mean() + F.relu(averages[0] - fake).pow(2).mean()
        found = ours.discriminator(batch, reconstruction)
        torch.testing.assert_close(found.lecam, regulariser.detach())
        torch.testing.assert_close(found.total, D_LOSSES["hinge"](real, fake) + 2 * regulariser)
        averages = averages.detach()
        torch.testing.assert_close(ours.logit_averages, averages)
    restored = AdversarialLoss(copy.deepcopy(critic), lecam_weight=2.0)
    restored.load_state_dict(ours.state_dict())
    assert torch.equal(restored.logit_averages, ours.logit_averages)
    ours.eval().discriminator(images, images)
    torch.testing.assert_close(ours.logit_averages, averages)


# --- tokenizers, dtypes


def test_a_multi_scale_tokenizer_of_one_channel(images: Tensor) -> None:
    config = MultiScaleVQVAEConfig(
        image_channels=1,
        base_channels=8,
        channel_multipliers=[1, 1, 1],
        num_res_blocks=1,
        z_channels=8,
        norm_groups=4,
        quantizer=MultiScaleConfig(codebook_size=16, scales=[[1, 1], [2, 2], [8, 8]]),
    )
    tokenizer = MultiScaleVQVAE(config).train()
    critic = PatchDiscriminator(1, 4, 2)
    theirs, their_critic = copy.deepcopy(tokenizer), copy.deepcopy(critic)
    settings = {"disc_loss": "hinge", "disc_weight": 0.75, "perceptual_weight": 1.0}
    distance = Blurred(1)
    torch.manual_seed(1)  # a codebook is sampled from the first batch
    found = our_step(tokenizer, AdversarialLoss(critic, distance, **settings), images[:, :1])
    torch.manual_seed(1)
    expected = plain_step(theirs, their_critic, distance, images[:, :1], **settings)
    for name, ours, plain in zip(Step._fields, found, expected, strict=True):
        torch.testing.assert_close(ours.detach(), plain.detach(), rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(tokenizer.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_on_each_device(images: Tensor, device: torch.device) -> None:
    """The step of a CPU, on this device."""
    tokenizer, critic, distance = Tokenizer(), PatchDiscriminator(3, 4, 2), Blurred()
    expected = our_step(copy.deepcopy(tokenizer), AdversarialLoss(copy.deepcopy(critic), distance), images)
    ours = AdversarialLoss(critic, distance).to(device)
    found = our_step(tokenizer.to(device), ours, images.to(device))
    for name, one, other in zip(Step._fields, found, expected, strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(images: Tensor, dtype: torch.dtype) -> None:
    """Half precision gives the same step, roughly; in float16 no gradient is lost to underflow."""
    tokenizer, critic, distance = Tokenizer(), PatchDiscriminator(3, 4, 2), Blurred()
    ours = AdversarialLoss(critic, distance)
    exact = our_step(tokenizer, ours, images)
    expected = [p.grad.clone() for p in tokenizer.parameters()]
    with torch.autocast("cpu", dtype):
        loss = tokenizer.loss(images)
        found = ours.generator(loss, images.to(dtype), last_layer=tokenizer.last_layer)
        judged = ours.discriminator(images, loss.output.reconstruction)
    assert loss.output.reconstruction.dtype == dtype
    assert {term.dtype for term in (*found, *judged)} == {torch.float32}
    torch.testing.assert_close(found.adaptive_weight, exact.weight, rtol=0.05, atol=0)
    torch.testing.assert_close(found.perceptual, exact.perceptual, rtol=0.05, atol=1e-4)
    torch.testing.assert_close(judged.total, exact.judged, rtol=0.05, atol=1e-3)
    tokenizer.zero_grad()
    (found.total * 1024).backward()
    judged.total.backward()
    for parameter, gradient in zip(tokenizer.parameters(), expected, strict=True):
        error = (parameter.grad / 1024 - gradient).norm() / gradient.norm()
        assert error < 0.05


def test_large_batches_in_float16_do_not_underflow() -> None:
    """Gradients of a mean over 2^20 pixels are below what float16 holds."""
    images = torch.rand(6, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokenizer, critic = Tokenizer(), PatchDiscriminator(3, 4, 1)
    ours = AdversarialLoss(critic, Blurred())
    exact = ours.generator(tokenizer.loss(images), images, last_layer=tokenizer.last_layer)
    with torch.autocast("cpu", torch.float16):
        found = ours.generator(tokenizer.loss(images), images, last_layer=tokenizer.last_layer)
    torch.testing.assert_close(found.adaptive_weight, exact.adaptive_weight, rtol=0.05, atol=0)


# --- the module


def test_copies_pickles_and_modes(images: Tensor) -> None:
    tokenizer, distance = Tokenizer(), Blurred()
    ours = AdversarialLoss(PatchDiscriminator(3, 4, 2), distance)
    ours.generator(tokenizer.loss(images), images, last_layer=tokenizer.last_layer)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(copied.state_dict(), ours.state_dict())
    assert ours.training and ours.critic.training and not distance.training
    ours.train()
    assert not distance.training
    assert not ours.eval().critic.training
    assert not any(parameter.grad is not None for parameter in distance.parameters())
    assert not AdversarialLoss(PatchDiscriminator(3, 4, 2).eval()).critic.training


def test_the_room_is_found_by_name() -> None:
    assert rqgen.losses.AdversarialLoss is AdversarialLoss


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"disc_loss": "wgan"}, ValueError, "disc_loss: expected one of hinge, vanilla, non_saturating, got 'wgan'"),
        ({"disc_weight": -1}, ValueError, r"disc_weight: expected a finite number >= 0, got -1\.0"),
        ({"perceptual_weight": math.nan}, ValueError, "perceptual_weight: expected a finite number >= 0, got nan"),
        ({"start_step": 1.5}, TypeError, r"start_step: expected an integer, got 1\.5"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: expected an integer >= 0, got -1"),
        ({"lecam_decay": 1.0}, ValueError, r"lecam_decay: expected 0 <= lecam_decay < 1, got 1\.0"),
        ({"perceptual": "lpips"}, TypeError, r"perceptual: expected a torch\.nn\.Module, got str"),
        ({"discriminator": None}, TypeError, r"discriminator: expected a torch\.nn\.Module, got NoneType"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdversarialLoss(**{"discriminator": PatchDiscriminator(3, 4, 2), **settings})


def test_what_is_refused(images: Tensor) -> None:
    tokenizer, critic = Tokenizer(), PatchDiscriminator(3, 4, 2)
    ours = AdversarialLoss(critic)
    before = copy.deepcopy(ours.state_dict())
    loss, layer = tokenizer.loss(images), tokenizer.last_layer
    nan = images.clone()
    nan[1, 0, 3, 3] = math.nan

    def other(reconstruction: Any) -> Loss:
        return loss._replace(output=Output(reconstruction))

    for tokenizer_loss, batch, last, error, message in (
        (loss, nan, layer, ValueError, "images: expected finite values, got NaN or infinity"),
        (other(nan), images, layer, ValueError, "reconstruction: expected finite values"),
        (
            loss,
            images[:2],
            layer,
            ValueError,
            r"reconstruction: expected the shape of images, \(2, 3, 32, 32\)",
        ),
        (loss, images.long(), layer, TypeError, "images: expected a floating-point tensor"),
        (loss, images.numpy(), layer, TypeError, "images: expected a tensor .*, got ndarray"),
        (loss, images[0], layer, ValueError, r"images: expected \(B, C, H, W\), got shape \(3, 32, 32\)"),
        (other(images[:0]), images[:0], layer, ValueError, "images: expected at least one to train on"),
        (other(images), images, layer, ValueError, "reconstruction: expected one with its graph"),
        (
            loss.total,
            images,
            layer,
            TypeError,
            "tokenizer_loss: expected what a tokenizer's `loss` gives",
        ),
        (loss._replace(total=images), images, layer, ValueError, r"tokenizer_loss\.total: expected one number"),
        (loss, images, torch.zeros(3, requires_grad=True), ValueError, "last_layer: expected a weight that the recons"),
        (loss, images, torch.zeros(3), ValueError, "last_layer: expected a weight that is trained"),
        (loss, images, None, TypeError, "last_layer: expected the weight of the decoder's last convolution, got None"),
    ):
        with pytest.raises(error, match=message):
            ours.generator(tokenizer_loss, batch, last_layer=last)
    for batch, reconstruction, error, message in (
        (nan, images, ValueError, "images: expected finite values"),
        (images, nan, ValueError, "reconstruction: expected finite values"),
        (images, images[:, :1], ValueError, "reconstruction: expected the shape of images"),
        (images, images.int(), TypeError, "reconstruction: expected a floating-point tensor"),
    ):
        with pytest.raises(error, match=message):
            ours.discriminator(batch, reconstruction)
    # A last layer is looked at after the discriminator's pass; nothing before it changes anything.
    state = ours.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, state[name])}
    assert all("running" in name or "num_batches" in name for name in changed)


def test_perceptual_distances_of_another_shape_are_refused(images: Tensor) -> None:
    tokenizer = Tokenizer()
    loss = tokenizer.loss(images)
    for module, found in ((nn.MSELoss(), r"\(\)"), (Wrong(), "str")):
        ours = AdversarialLoss(PatchDiscriminator(3, 4, 2), module)
        with pytest.raises(ValueError, match=rf"perceptual: expected distances of shape \(4,\), got {found}"):
            ours.generator(loss, images, last_layer=tokenizer.last_layer)
    with pytest.raises(ValueError, match="perceptual: expected a result that depends on its images by a gradient"):
        ours = AdversarialLoss(PatchDiscriminator(3, 4, 2), Constant())
        ours.generator(loss, images, last_layer=tokenizer.last_layer)


class Wrong(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> str:
        return "near"


class Constant(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(len(x))
