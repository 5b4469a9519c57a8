"""PatchDiscriminator against plain formulas: layers, norms, spectral norm, initial weights, and what is refused."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rqgen.losses import ActNorm, PatchDiscriminator

# Indices in `main` of the convolutions, for 1, 2 and 3 layers.
CONVOLUTIONS = {1: (0, 2, 5), 2: (0, 2, 5, 8), 3: (0, 2, 5, 8, 11)}


def plain_logits(state: dict[str, Tensor], images: Tensor, *, layers: int, norm: str) -> Tensor:
    """The published network, from its state dict alone, in train mode."""
    x, indices = images, CONVOLUTIONS[layers]
    for position, index in enumerate(indices):
        stride = 2 if position < layers else 1
        x = F.conv2d(x, state[f"main.{index}.weight"], state.get(f"main.{index}.bias"), stride=stride, padding=1)
        if 0 < position < len(indices) - 1:
            after = f"main.{index + 1}."
            if norm == "batch":
                mean, var = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), keepdim=True, correction=0)
                x = (x - mean) / (var + 1e-5).sqrt()
                x = x * state[after + "weight"].view(1, -1, 1, 1) + state[after + "bias"].view(1, -1, 1, 1)
            else:
                x = state[after + "scale"] * (x + state[after + "loc"])
        if position < len(indices) - 1:
            x = torch.where(x > 0, x, 0.2 * x)
    return x


def double_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in copy.deepcopy(module.state_dict()).items()}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("norm", ["batch", "actnorm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_by_the_formula(images: Tensor, layers: int, norm: str, channels: int) -> None:
    discriminator = PatchDiscriminator(channels, 6, layers, norm)
    images = images[:, :channels]
    if norm == "actnorm":
        discriminator(images)  # sets scales and shifts
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    state = double_state(discriminator)
    expected = plain_logits(state, images.double(), layers=layers, norm=norm)
    logits = discriminator(images)
    side = 32 // 2**layers - 2
    assert logits.shape == (4, 1, side, side)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=1e-4)


def test_names_and_shapes_are_the_published_ones() -> None:
    batch = PatchDiscriminator(3, 64, 3).state_dict()
    assert {name: tuple(t.shape) for name, t in batch.items() if t.ndim == 4} == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4),
        "main.11.weight": (1, 512, 4, 4),
    }
    assert {name for name in batch if name.endswith("bias")} == {f"main.{i}.bias" for i in (0, 3, 6, 9, 11)}
    actnorm = PatchDiscriminator(3, 8, 2, "actnorm").state_dict()
    assert {name for name in actnorm if name.startswith("main.3.")} == {
        f"main.3.{n}" for n in ("loc", "scale", "initialized")
    }
    assert actnorm["main.2.bias"].shape == (16,) and actnorm["main.3.loc"].shape == (1, 16, 1, 1)
    assert actnorm["main.3.initialized"].dtype == torch.uint8
    # Never more than eight times the base.
    assert PatchDiscriminator(3, 2, 5).state_dict()["main.14.weight"].shape == (16, 16, 4, 4)


@pytest.mark.parametrize("norm", ["batch", "actnorm"])
def test_initial_weights_for_a_seed_are_the_published_ones(norm: str) -> None:
    """The published order: all layers as torch makes them, then one after another again."""
    torch.manual_seed(5)
    ours = PatchDiscriminator(3, 4, 2, norm).state_dict()
    torch.manual_seed(5)
    bias = norm == "actnorm"
    layers: dict[int, nn.Module] = {0: nn.Conv2d(3, 4, 4)}
    for index, (before, after) in {2: (4, 8), 5: (8, 16)}.items():
        layers[index] = nn.Conv2d(before, after, 4, bias=bias)
        if norm == "batch":
            layers[index + 1] = nn.BatchNorm2d(after)
    layers[8] = nn.Conv2d(16, 1, 4)
    for layer in layers.values():
        nn.init.normal_(layer.weight, 0.0 if isinstance(layer, nn.Conv2d) else 1.0, 0.02)
    for index, layer in layers.items():
        for name, tensor in layer.state_dict().items():
            assert torch.equal(ours[f"main.{index}.{name}"], tensor), (index, name)


# --- ActNorm


def test_actnorm_is_set_by_the_first_batch_in_train_mode() -> None:
    norm = ActNorm(5)
    x = torch.randn(3, 5, 4, 6) * 3 + 2
    assert torch.equal(norm.eval()(x), x) and norm.initialized == 0
    y = norm.train()(x)
    assert norm.initialized == 1 and norm.initialized.dtype == torch.uint8
    rows = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.loc.detach().double().flatten(), -rows.mean(1))
    torch.testing.assert_close(norm.scale.detach().double().flatten(), 1 / (rows.std(1) + 1e-6))
    torch.testing.assert_close(y.transpose(0, 1).flatten(1).std(1), torch.ones(5), atol=1e-4, rtol=0)
    before = copy.deepcopy(norm.state_dict())
    norm(x * 5)
    assert all(torch.equal(norm.state_dict()[name], tensor) for name, tensor in before.items())
    assert norm.scale.requires_grad and norm.loc.requires_grad


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 2, 1, 1), r"x: expected at least two values of each channel .*, got shape \(1, 2, 1, 1\)"),
        (torch.zeros(0, 2, 4, 4), r"x: expected at least two values of each channel .*, got shape \(0, 2, 4, 4\)"),
        (torch.full((2, 2, 4, 4), torch.nan), "x: expected finite values to start from"),
    ],
)
def test_actnorm_does_not_start_from_nothing(x: Tensor, message: str) -> None:
    """Its scale and shift were NaN from then on."""
    norm = ActNorm(2)
    before = double_state(norm)
    with pytest.raises(ValueError, match=message):
        norm(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in double_state(norm).items())


def test_actnorm_keeps_a_loaded_state() -> None:
    trained, x = ActNorm(5), torch.randn(3, 5, 4, 6)
    trained(x)
    state = copy.deepcopy(trained.state_dict())
    loaded = ActNorm(5)
    loaded.load_state_dict(state)
    loaded.train()(x * 7 + 1)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
    # And the other way round: a state that is not set yet, loaded into a module that was.
    loaded.load_state_dict(ActNorm(5).state_dict())
    loaded(x)
    torch.testing.assert_close(loaded.state_dict(), state)


def test_actnorm_survives_copies_and_casts() -> None:
    norm, x = ActNorm(2), torch.randn(3, 2, 4, 4)
    norm(x)
    copied = copy.deepcopy(norm)
    copied(x + 4)
    assert torch.equal(copied.loc, norm.loc)
    assert norm.double()(x.double()).dtype == torch.float64 and norm.initialized == 1


def worker(store: str, rank: str, out: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=2, timeout=timedelta(seconds=60)
    )
    norm = ActNorm(3)
    norm(parts()[int(rank)])
    torch.save({"loc": norm.loc.detach(), "scale": norm.scale.detach()}, out)
    torch.distributed.destroy_process_group()


def parts() -> list[Tensor]:
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 + 1
    return [x[:2], x[2:]]


def test_actnorm_starts_alike_on_all_ranks(two_processes: Callable[[str], list[Any]]) -> None:
    first, second = two_processes(__file__)
    assert torch.equal(first["loc"], second["loc"]) and torch.equal(first["scale"], second["scale"])
    alone = ActNorm(3)
    alone(torch.cat(parts()))
    torch.testing.assert_close(first["loc"], alone.loc.detach())
    torch.testing.assert_close(first["scale"], alone.scale.detach())


# --- spectral norm


def test_spectral_norm() -> None:
    discriminator = PatchDiscriminator(3, 4, 2, "actnorm", spectral_norm=True)
    images = torch.rand(2, 3, 16, 16)
    for _ in range(100):
        discriminator(images)
    for layer in discriminator.eval().main:
        if isinstance(layer, nn.Conv2d):
            largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
            torch.testing.assert_close(largest, torch.ones(()), atol=1e-2, rtol=0)


def test_which_passes_are_repeatable() -> None:
    assert PatchDiscriminator(3, 4, 2).is_repeatable and PatchDiscriminator(3, 4, 2, "actnorm").is_repeatable
    assert not PatchDiscriminator(3, 4, 2, spectral_norm=True).is_repeatable  # a power iteration per pass

    def changed(change: Callable[[PatchDiscriminator], Any]) -> bool:
        discriminator = PatchDiscriminator(3, 4, 2)
        change(discriminator)
        return discriminator.is_repeatable

    assert not changed(lambda one: one.main.insert(2, nn.Dropout()))
    assert not changed(lambda one: setattr(one.main[3], "momentum", None))
    assert not changed(lambda one: one.main[0].register_forward_hook(lambda *arguments: None))
    assert not changed(lambda one: one.register_forward_pre_hook(lambda *arguments: None))
    assert not changed(lambda one: nn.utils.spectral_norm(one.main[0]))


# --- modes, dtypes, what is refused


def test_running_statistics_in_eval_mode(images: Tensor) -> None:
    discriminator = PatchDiscriminator(3, 4, 2)
    discriminator(images)
    discriminator.eval()
    before = copy.deepcopy(discriminator.state_dict())
    # One image by itself, and none: as within the batch.
    torch.testing.assert_close(discriminator(images)[1:2], discriminator(images[1:2]))
    assert discriminator(images[:0]).shape == (0, 1, 6, 6)
    torch.testing.assert_close(discriminator.state_dict(), before)


@pytest.mark.parametrize("norm", ["batch", "actnorm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_images(images: Tensor, norm: str, dtype: torch.dtype) -> None:
    discriminator = PatchDiscriminator(3, 4, 2, norm)
    discriminator(images)
    expected = discriminator(images)
    torch.testing.assert_close(discriminator(images.to(dtype)), expected, atol=2e-2, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = discriminator(images.to(dtype))
    torch.testing.assert_close(half.float(), expected, atol=5e-2, rtol=0)
    assert discriminator.double()(images).dtype == torch.float64


def test_a_batch_of_one_warns(images: Tensor) -> None:
    with pytest.warns(UserWarning, match="batch norm over a batch of one"):
        PatchDiscriminator(3, 4, 2)(images[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PatchDiscriminator(3, 4, 2)(images[:2])
        PatchDiscriminator(3, 4, 2, "actnorm")(images[:1])
        PatchDiscriminator(3, 4, 2).eval()(images[:1])


def test_a_second_pass_of_the_statistics(images: Tensor) -> None:
    one, two = PatchDiscriminator(3, 4, 2), PatchDiscriminator(3, 4, 2)
    two.load_state_dict(one.state_dict())
    for batch in (images, images * 0.5 + 0.2):
        before = one.running_statistics()
        one(batch)
        one.repeat_statistics(before)
        two(batch)
        two(batch)
    torch.testing.assert_close(one.state_dict(), two.state_dict())
    one.eval().repeat_statistics(before)
    torch.testing.assert_close(one.state_dict(), two.state_dict())


def test_sync_batch_norm_keeps_the_names() -> None:
    discriminator = PatchDiscriminator(3, 4, 2)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(discriminator))
    assert isinstance(converted.main[3], nn.SyncBatchNorm)
    torch.testing.assert_close(converted.state_dict(), discriminator.state_dict())
    assert len(converted.running_statistics()) == len(discriminator.running_statistics()) == 4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"channels": 0}, ValueError, r"channels: expected an integer in \[1, 65536\], got 0"),
        ({"base_channels": 2.5}, TypeError, "base_channels: expected an integer, got 2.5"),
        ({"num_layers": 0}, ValueError, r"num_layers: expected an integer in \[1, 16\], got 0"),
        ({"norm": "group"}, ValueError, "norm: expected one of batch, actnorm, got 'group'"),
        ({"spectral_norm": 1}, TypeError, "spectral_norm: expected True or False, got 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PatchDiscriminator(**settings)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([0.0], TypeError, r"images: expected a tensor \(B, C, H, W\), got list"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "images: expected a floating-point tensor"),
        (torch.zeros(3, 32, 32), ValueError, r"images: expected \(B, 3, H, W\), got shape \(3, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32), ValueError, r"images: expected \(B, 3, H, W\), got shape \(2, 1, 32, 32\)"),
        (torch.zeros(2, 3, 32, 11), ValueError, "images: expected at least 12 x 12 pixels, got 32 x 11"),
        (torch.zeros(0, 3, 32, 32), ValueError, "images: expected at least one to train on"),
        (torch.full((2, 3, 32, 32), torch.nan), ValueError, "images: expected finite values, got NaN or infinity"),
        (torch.full((2, 3, 32, 32), torch.inf), ValueError, "images: expected finite values, got NaN or infinity"),
        (torch.zeros(2, 3, 32, 32, device="meta"), ValueError, "images: expected on cpu, where the discriminator is"),
        (torch.zeros(2, 3, 32, 32).to_sparse(), TypeError, "images: expected a dense tensor, got sparse_coo"),
    ],
)
def test_images_that_are_refused_change_nothing(images: Any, error: type[Exception], message: str) -> None:
    discriminator = PatchDiscriminator(3, 4, 2)
    before = copy.deepcopy(discriminator.state_dict())
    with pytest.raises(error, match=message):
        discriminator(images)
    torch.testing.assert_close(discriminator.state_dict(), before)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_images(layers: int) -> None:
    discriminator = PatchDiscriminator(3, 4, layers)
    assert discriminator(torch.rand(2, 3, discriminator.smallest, discriminator.smallest)).shape == (2, 1, 1, 1)


if __name__ == "__main__":
    worker(*sys.argv[1:])
