"""DiffAugment image by image against its formula, its counters, and its place before a discriminator."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rqgen.losses import AdversarialLoss, DiffAugment, PatchDiscriminator


def uniforms(seed: int, index: int) -> list[float]:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, index, 0, 0])).random(7).tolist()


def plain(image: Tensor, u: list[float], policies: tuple[str, ...]) -> Tensor:
    """One image, pixel by pixel."""
    _, height, width = image.shape
    if "colour" in policies:
        image = image + u[0] - 0.5
        image = 2 * u[1] * (image - image.mean(0)) + image.mean(0)
        image = (u[2] + 0.5) * (image - image.mean()) + image.mean()
    if "translation" in policies:
        moved = torch.zeros_like(image)
        far_y, far_x = round(height / 8), round(width / 8)
        down, across = int(u[3] * (2 * far_y + 1)) - far_y, int(u[4] * (2 * far_x + 1)) - far_x
        for y in range(height):
            for x in range(width):
                if 0 <= y - down < height and 0 <= x - across < width:
                    moved[:, y, x] = image[:, y - down, x - across]
        image = moved
    if "cutout" in policies:
        image = image.clone()
        tall, wide = round(height / 2), round(width / 2)
        top = int(u[5] * (height + 1 - tall % 2)) - tall // 2
        left = int(u[6] * (width + 1 - wide % 2)) - wide // 2
        image[:, max(top, 0) : max(top + tall, 0), max(left, 0) : max(left + wide, 0)] = 0
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "policies", [("colour",), ("translation",), ("cutout",), ("colour", "translation", "cutout"), ()]
)
def test_images_by_the_formula(policies: tuple[str, ...], channels: int) -> None:
    images = torch.rand(40, channels, 18, 9, dtype=torch.float64) * 2 - 1
    found = DiffAugment(policies, seed=7)(images)
    for index, image in enumerate(images):
        torch.testing.assert_close(found[index], plain(image, uniforms(7, index), policies))
    assert torch.equal(found, images) == (policies == ())


def test_uniforms_depend_on_seed_and_count_alone(images: Tensor) -> None:
    whole = DiffAugment(seed=3)(images)
    parts = DiffAugment(seed=3)
    assert torch.equal(torch.cat([parts(images[:1]), parts(images[1:1]), parts(images[1:])]), whole)
    assert parts.seen == 4
    assert not torch.equal(DiffAugment(seed=4)(images), whole) and not torch.equal(parts(images), whole)


def test_training_resumes_with_the_same_ones(images: Tensor) -> None:
    one = DiffAugment(seed=3)
    one(images)
    state = copy.deepcopy(one.state_dict())
    expected = one(images)
    other = DiffAugment(seed=3)
    other.load_state_dict(state)
    assert torch.equal(other(images), expected)


def test_eval_mode_changes_nothing(images: Tensor) -> None:
    augment = DiffAugment().eval()
    assert augment(images) is images and augment.seen == 0


def test_gradients_pass(images: Tensor) -> None:
    small = images[:1, :, :8, :8].double().requires_grad_()

    def augmented(x: Tensor) -> Tensor:
        return DiffAugment(seed=1)(x)

    assert torch.autograd.gradcheck(augmented, (small,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_stay(images: Tensor, dtype: torch.dtype) -> None:
    found = DiffAugment(seed=2)(images.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), DiffAugment(seed=2)(images), atol=0.05, rtol=0.05)


def test_before_a_discriminator(images: Tensor) -> None:
    """Every pass has its own uniforms, in the published order of passes."""
    tokenizer = nn.Conv2d(3, 3, 3, padding=1)
    discriminator = PatchDiscriminator(3, 4, 2, "actnorm")
    discriminator(images)

    class Loss:
        class output:
            reconstruction = tokenizer(images)

        total = (output.reconstruction - images).square().mean()

    ours = AdversarialLoss(nn.Sequential(DiffAugment(seed=5), discriminator), disc_weight=1.0)
    found = ours.generator(Loss, images, last_layer=tokenizer.weight)
    judged = ours.discriminator(images, Loss.output.reconstruction)
    augment, reconstruction = DiffAugment(seed=5), Loss.output.reconstruction
    torch.testing.assert_close(found.adversarial, -discriminator(augment(reconstruction)).mean().detach())
    fake, real = discriminator(augment(reconstruction)), discriminator(augment(images))
    torch.testing.assert_close(judged.total, 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean()))
    found.total.backward()
    assert tokenizer.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"policies": ["blur"]}, ValueError, r"policies: expected some of colour, translation, cutout, got \['blur'\]"),
        ({"policies": "colour"}, ValueError, "policies: expected some of colour, translation, cutout, got 'colour'"),
        ({"seed": -1}, ValueError, "seed: expected an integer in"),
    ],
)
def test_arguments_that_are_refused(arguments: Any, error: type[Exception], message: str, images: Tensor) -> None:
    with pytest.raises(error, match=message):
        DiffAugment(**arguments)
    with pytest.raises(TypeError, match="images: expected a floating-point tensor"):
        DiffAugment()(images.int())
