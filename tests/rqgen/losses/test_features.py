"""ExportedFeatures against the plain formula, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rqgen.losses import AdversarialLoss, ExportedFeatures, PatchDiscriminator
from rqgen.losses.features import unit


class Network(nn.Module):
    """A small convolutional network that gives its feature maps in one of several ways."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any] = lambda a, b: (a, b)) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 5, 3, stride=2)
        self.dropout = nn.Dropout(0.5)
        self.give = give

    def forward(self, images: Tensor) -> Any:
        first = self.dropout(self.norm(self.first(images)).relu())
        return self.give(first, self.second(first))


def export(network: nn.Module, path: Path, *, dynamic: bool = True, train: bool = False) -> Path:
    example = torch.zeros(2, 3, 32, 32)
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    torch.export.save(torch.export.export(network.train(train), (example,), dynamic_shapes=shapes), path)
    return path


@pytest.fixture
def network() -> Network:
    network = Network()
    network(torch.rand(8, 3, 32, 32))  # running statistics that are not the initial ones
    return network


def plain_distance(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    network = copy.deepcopy(network).double().eval()
    totals = []
    for a, b in zip(network(x.double()), network(y.double()), strict=True):
        a, b = (f / ((f**2).sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        totals.append(((a - b) ** 2).sum(1).mean((1, 2)))
    return (totals[0] + totals[1]) / 2


def test_distances_by_the_formula(network: Network, images: Tensor, tmp_path: Path) -> None:
    path = export(network, tmp_path / "network.pt2")
    features = ExportedFeatures(str(path))
    x, y = images[:3], images[1:].clone().requires_grad_()
    found = features(x, y)
    assert found.shape == (3,) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain_distance(network, x, y), atol=1e-6, rtol=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), y)
    (expected,) = torch.autograd.grad(plain_distance(network, x, y).sum(), y)
    torch.testing.assert_close(gradient, expected.float(), atol=1e-6, rtol=1e-3)
    assert torch.equal(features(x, x), torch.zeros(3))
    assert features.checksum == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(features.parameters()) == [] and features.state_dict() == {}
    assert not features.train().training


@pytest.mark.parametrize(
    "give",
    [lambda a, b: [a, b], lambda a, b: {"first": a, "second": b}, lambda a, b: (a, {"deep": [b]})],
)
def test_outputs_in_any_container(give: Any, images: Tensor, tmp_path: Path) -> None:
    network = Network(give)
    features = ExportedFeatures(export(network, tmp_path / "network.pt2"))
    first = network.norm(network.first(images)).relu()
    torch.testing.assert_close(features.maps(images), [first, network.second(first)])


def test_one_map_and_half_images(images: Tensor, tmp_path: Path) -> None:
    network = Network(lambda a, b: b)
    features = ExportedFeatures(export(network, tmp_path / "network.pt2"))
    x, y = images[:2], images[2:]
    torch.testing.assert_close(features(x.bfloat16(), y.bfloat16()), features(x, y), atol=1e-2, rtol=0.05)
    features.to("cpu")


def test_in_an_adversarial_loss(network: Network, images: Tensor, tmp_path: Path) -> None:
    tokenizer = nn.Conv2d(3, 3, 3, padding=1)

    class Loss:
        class output:
            reconstruction = tokenizer(images)

        total = (output.reconstruction - images).square().mean()

    features = ExportedFeatures(export(network, tmp_path / "network.pt2"))
    ours = AdversarialLoss(PatchDiscriminator(3, 4, 2), features)
    found = ours.generator(Loss, images, last_layer=tokenizer.weight)
    torch.testing.assert_close(found.perceptual, features(images, Loss.output.reconstruction).mean().detach())
    found.total.backward()
    assert tokenizer.weight.grad.abs().max() > 0
    assert all(name.startswith(("critic.", "logit_")) for name in ours.state_dict())


def test_lengths_of_zero() -> None:
    f = torch.zeros(1, 2, 1, 3)
    f[0, :, 0, 1] = torch.tensor([3.0, 4.0])
    f.requires_grad_()
    found = unit(f)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([[0.0, 0.6, 0.0], [0.0, 0.8, 0.0]]))
    found.sum().backward()
    assert f.grad.isfinite().all() and f.grad[0, :, 0, 0].tolist() == [0, 0]


def test_files_that_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = tmp_path / "no.pt2"
    with pytest.raises(FileNotFoundError, match=rf"features: .*export.*{re.escape(str(missing))}.*features=PATH"):
        ExportedFeatures(missing)
    checkpoint = tmp_path / "weights.pt2"
    torch.save({"a": torch.zeros(1)}, checkpoint)
    with pytest.raises(ValueError, match=r"weights\.pt2: not a readable program of torch\.export: it is a"):
        ExportedFeatures(checkpoint)
    whole = export(Network(), tmp_path / "network.pt2").read_bytes()
    damaged = tmp_path / "damaged.pt2"
    for content in (whole[: len(whole) // 2], whole[:2000] + bytes(2000) + whole[4000:]):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.pt2: not a readable program of torch\.export"):
            ExportedFeatures(damaged)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_images_that_the_network_does_not_take(images: Tensor, tmp_path: Path) -> None:
    fixed = ExportedFeatures(export(Network(), tmp_path / "fixed.pt2", dynamic=False))
    assert fixed(images[:2], images[2:]).shape == (2,)
    for x in (images, images[:2, :1], images[:2, :, :16]):
        with pytest.raises(ValueError, match=r"fixed\.pt2: the exported network does not take images .*dynamic batch"):
            fixed(x, x)
    with pytest.raises(ValueError, match="y: expected the shape of x"):
        fixed(images[:2], images)
    with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
        fixed(images.int(), images)


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (
            lambda a, b: (a, b.mean((2, 3))),
            r"output 1: expected a feature map \(4, C, H, W\), .* \(4, 5\)",
        ),
        (
            lambda a, b: b.mean(0, keepdim=True),
            r"output 0: expected a feature map .* \(1, 5, 15, 15\)",
        ),
        (lambda a, b: b > 0, r"output 0: expected a feature map .* got torch.bool"),
    ],
)
def test_outputs_that_are_no_feature_maps(give: Any, message: str, images: Tensor, tmp_path: Path) -> None:
    features = ExportedFeatures(export(Network(give), tmp_path / "network.pt2"))
    with pytest.raises(ValueError, match=message):
        features(images, images)


def test_a_network_exported_in_train_mode_is_refused(tmp_path: Path) -> None:
    for network, operator in ((Network(), "batch_norm"), (nn.Sequential(nn.Dropout()), "dropout")):
        path = export(network, tmp_path / "network.pt2", train=True)
        with pytest.raises(
            ValueError, match=rf"network\.pt2: .*{operator}.* in train mode: export it after \.eval\(\)"
        ):
            ExportedFeatures(path)
