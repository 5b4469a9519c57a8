"""LPIPS against a plain formula in float64, its files, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import importlib.machinery
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from rqgen.losses import LPIPS
from rqgen.losses import lpips as room

SHIFT = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
SCALE = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)


def plain_features(vgg: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """torchvision's `features`, layer by layer, after its ReLUs 3, 8, 15, 22 and 29."""
    x, taken = (images.double() - SHIFT) / SCALE, []
    for index in range(30):
        if f"features.{index}.weight" in vgg:
            x = F.conv2d(x, vgg[f"features.{index}.weight"].double(), vgg[f"features.{index}.bias"].double(), padding=1)
        elif index in (4, 9, 16, 23):
            x = F.max_pool2d(x, 2, 2)
        else:
            x = x.clamp(min=0)
        if index in (3, 8, 15, 22, 29):
            taken.append(x)
    return taken


def plain_distance(weights: Any, x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(len(x), dtype=torch.float64)
    for index, (a, b) in enumerate(zip(*(plain_features(weights.vgg, images) for images in (x, y)), strict=True)):
        a, b = (f / ((f**2).sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        total += F.conv2d((a - b) ** 2, weights.heads[f"lin{index}.model.1.weight"].double()).mean((1, 2, 3))
    return total


def test_distances_by_the_formula(lpips: LPIPS, weights: Any, images: Tensor) -> None:
    x, y = images[:2, :, :, :24], images[2:, :, :, :24]
    found = lpips(x, y)
    assert found.shape == (2,) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain_distance(weights, x, y), atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(lpips(y, x), found)
    assert torch.equal(lpips(x, x), torch.zeros(2))


def test_one_channel_is_repeated(lpips: LPIPS, images: Tensor) -> None:
    x, y = images[:2, :1], images[2:, :1]
    torch.testing.assert_close(lpips(x, y), lpips(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))


def test_gradients_flow_to_the_images_alone(weights: Any, images: Tensor) -> None:
    lpips = LPIPS(weights.vgg, weights.heads)
    x, y = images[:1].clone().requires_grad_(), images[1:2].clone().requires_grad_()
    lpips(x, y).sum().backward()
    assert x.grad.abs().max() > 0 and y.grad.abs().max() > 0
    assert list(lpips.parameters()) == [] and not any(tensor.requires_grad for tensor in lpips.buffers())
    assert lpips.state_dict() == {}  # its weights have files of their own
    lpips.train()
    assert not lpips.training


def test_gradient_by_differences(weights: Any) -> None:
    lpips = LPIPS(weights.vgg, weights.heads).double()
    generator = torch.Generator().manual_seed(2)
    x, y, direction = (torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64) * 0.3 for _ in range(3))
    y.requires_grad_()
    found = lpips(x, y)
    assert found.dtype == torch.float64
    (gradient,) = torch.autograd.grad(found.sum(), y)
    step = 1e-9  # no farther: the next kink of a ReLU is near
    difference = (lpips(x, y + step * direction) - lpips(x, y - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference.sum().detach(), rtol=1e-4, atol=1e-7)


def test_features_of_zero_have_no_gradient_but_no_nan(weights: Any) -> None:
    """With biases far below zero no feature is active: the length of the features is zero, at which the published
    formula has no gradient."""
    vgg = {name: torch.full_like(t, -1e3) if name.endswith("bias") else t for name, t in weights.vgg.items()}
    x, y = torch.rand(2, 1, 3, 16, 16).unbind(0)
    y.requires_grad_()
    distance = LPIPS(vgg, weights.heads)(x, y)
    distance.sum().backward()
    assert distance.tolist() == [0] and torch.equal(y.grad, torch.zeros_like(y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images_and_autocast(lpips: LPIPS, images: Tensor, dtype: torch.dtype) -> None:
    x, y = images[:2].to(dtype), images[2:].to(dtype)
    expected = lpips(x.float(), y.float())
    torch.testing.assert_close(lpips(x, y), expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = lpips(x, y.requires_grad_())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0.05)
    found.sum().backward()
    assert y.grad.isfinite().all()


def test_copies(lpips: LPIPS, images: Tensor) -> None:
    expected = lpips(images[:2], images[2:])
    for copied in (copy.deepcopy(lpips), pickle.loads(pickle.dumps(lpips))):
        assert torch.equal(copied(images[:2], images[2:]), expected)
        assert copied.checksums == lpips.checksums


def test_the_callers_weights_may_change(weights: Any, images: Tensor) -> None:
    vgg = {name: tensor.clone() for name, tensor in weights.vgg.items()}
    lpips = LPIPS(vgg, weights.heads)
    before = lpips(images[:2], images[2:])
    vgg["features.0.weight"].zero_()
    assert torch.equal(lpips(images[:2], images[2:]), before)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.zeros(1, 3, 15, 32), None, ValueError, "x: expected at least 16 x 16 pixels, got 15 x 32"),
        (torch.zeros(1, 2, 32, 32), None, ValueError, r"x: expected \(B, 1 or 3, H, W\), got shape \(1, 2, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), None, TypeError, "x: expected a floating-point tensor"),
        (
            torch.zeros(2, 3, 32, 32),
            torch.zeros(1, 3, 32, 32),
            ValueError,
            r"y: expected the shape of x, \(2, 3, 32, 32\)",
        ),
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32), ValueError, "y: expected the shape of x"),
        (
            torch.zeros(1, 3, 32, 32, device="meta"),
            None,
            ValueError,
            "x: expected on cpu, where the network is, got meta",
        ),
        (torch.zeros(1, 3, 32, 32), None, TypeError, r"y: expected a tensor \(B, C, H, W\), got NoneType"),
    ],
)
def test_images_that_are_refused(lpips: LPIPS, x: Any, y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lpips(x, x if y is None and error is ValueError else y)


# --- weights and their files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda vgg, heads: vgg.pop("features.28.bias"),
            "vgg_state_dict: tensors do not fit torchvision's VGG16: missing",
        ),
        (lambda vgg, heads: vgg.update({"features.30.weight": torch.zeros(2)}), r"unknown features\.30\.weight"),
        (
            lambda vgg, heads: vgg.update({"features.0.bias": torch.zeros(3)}),
            r"features\.0\.bias: expected shape \(64,\)",
        ),
        (lambda vgg, heads: heads.pop("lin4.model.1.weight"), r"head_state_dict: .* missing lin4\.model\.1\.weight"),
        (lambda vgg, heads: heads.update({"lin5.model.1.weight": torch.zeros(1)}), "head_state_dict: .* unknown lin5"),
    ],
)
def test_tensors_that_do_not_fit(weights: Any, change: Any, message: str) -> None:
    vgg, heads = dict(weights.vgg), dict(weights.heads)
    change(vgg, heads)
    with pytest.raises(ValueError, match=message):
        LPIPS(vgg, heads)


def test_paths_in_the_place_of_tensors(weights: Any) -> None:
    with pytest.raises(TypeError, match=r"vgg_state_dict: expected tensors by name, got str; LPIPS\.from_files"):
        LPIPS("vgg16.pth", weights.heads)
    with pytest.raises(TypeError, match="head_state_dict: expected tensors by name, got list"):
        LPIPS(weights.vgg, [])


def test_tensors_that_are_not_used_are_left_alone(weights: Any, lpips: LPIPS, images: Tensor) -> None:
    vgg = {**weights.vgg, "classifier.0.weight": torch.zeros(2, 2)}
    heads = {**weights.heads, "net.slice1.0.weight": torch.zeros(1), "lins.0.model.1.weight": torch.zeros(1)}
    assert torch.equal(LPIPS(vgg, heads)(images[:1], images[1:2]), lpips(images[:1], images[1:2]))


@pytest.fixture(scope="module")
def files(weights: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("weights")
    vgg, heads = folder / "vgg16-397923af.pth", folder / "vgg.pth"
    torch.save(weights.vgg, vgg)
    torch.save(weights.heads, heads)
    return vgg, heads


def test_from_files(files: tuple[Path, Path], lpips: LPIPS, weights: Any, images: Tensor, tmp_path: Path) -> None:
    read = LPIPS.from_files(vgg=str(files[0]), heads=files[1])
    assert torch.equal(read(images[:1], images[1:2]), lpips(images[:1], images[1:2]))
    names = dict(zip(("vgg", "heads"), files, strict=True))
    assert read.checksums == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names.items()}
    assert lpips.checksums == {}
    save_file(weights.heads, tmp_path / "heads.safetensors")
    other = LPIPS.from_files(files[0], tmp_path / "heads.safetensors")
    assert torch.equal(other(images[:1], images[1:2]), lpips(images[:1], images[1:2]))


def test_a_missing_file_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    missing = re.escape(str(tmp_path / "no.pth"))
    with pytest.raises(FileNotFoundError, match=rf"vgg: .*usually vgg16-397923af\.pth.*{missing}.*vgg=PATH"):
        LPIPS.from_files(tmp_path / "no.pth", files[1])
    with pytest.raises(FileNotFoundError, match=rf"heads: .*vgg_lpips\.pth.*{missing}.*heads=PATH"):
        LPIPS.from_files(files[0], tmp_path / "no.pth")
    with pytest.raises(FileNotFoundError, match=r"vgg: .* is a folder"):
        LPIPS.from_files(tmp_path, files[1])
    with pytest.raises(FileNotFoundError, match=r"vgg: .*no path was given"):
        LPIPS.from_files(None, files[1])


def test_heads_of_an_installed_lpips(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"heads: .*no path was given"):
        LPIPS.from_files(files[0])
    package = tmp_path / "lpips" / "__init__.py"
    (package.parent / "weights" / "v0.1").mkdir(parents=True)
    target = package.parent / "weights" / "v0.1" / "vgg.pth"
    target.write_bytes(files[1].read_bytes())
    spec = importlib.machinery.ModuleSpec("lpips", None, origin=str(package))
    monkeypatch.setattr(room, "find_spec", lambda name: spec)
    assert LPIPS.from_files(files[0]).checksums == LPIPS.from_files(*files).checksums


def test_files_of_another_kind(files: tuple[Path, Path], weights: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"
    for content, message in (
        (files[0].read_bytes()[:1000], "not a readable torch checkpoint"),
        (b"<html>not found</html>", "not a readable torch checkpoint: it is an HTML page"),
        (b"", "it is an empty file"),
    ):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=rf"broken\.pth: .*{message}"):
            LPIPS.from_files(broken, files[1])
    torch.save(weights.vgg, broken)
    with pytest.raises(ValueError, match=r"broken\.pth: tensors do not fit the LPIPS heads.*missing lin0"):
        LPIPS.from_files(files[0], broken)
    torch.save(weights.heads, broken)
    with pytest.raises(ValueError, match=r"broken\.pth: tensors do not fit torchvision's VGG16"):
        LPIPS.from_files(broken, files[1])
    torch.save({**weights.heads, "lin0.model.1.weight": torch.full((1, 64, 1, 1), torch.nan)}, broken)
    with pytest.raises(ValueError, match=r"broken\.pth: lin0\.model\.1\.weight: NaN or infinity"):
        LPIPS.from_files(files[0], broken)
    whole = files[1].read_bytes()
    save_file(weights.heads, broken)
    broken.write_bytes(broken.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"broken\.pth: not a readable safetensors file"):
        LPIPS.from_files(files[0], broken)
    assert files[1].read_bytes() == whole
