"""LPIPS (Zhang et al. 2018): the distance of two images in the features of a VGG16, weighted by learned heads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rqgen.files import file_checksum
from rqgen.models.pickles import check_state_dict, unpickle
from rqgen.models.state_dict import ForeignTensors
from rqgen.reading import SAFETENSORS, describe_file, unreadable

from .batches import check_batch, check_pair
from .features import require_weights, unit

# Convolutions 3x3 with a ReLU behind each, by torchvision's index of its `features`, and their channels. A row ends
# where a feature map is taken; 2x2 max pooling stands between the rows.
_STAGES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
_SMALLEST = 2 ** (len(_STAGES) - 1)
# Mean and standard deviation of ImageNet's pixels for images in [-1, 1], as the published heads were trained with.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

VGG_FILE = "torchvision's VGG16 (usually vgg16-397923af.pth)"
HEADS_FILE = "the LPIPS heads for VGG (usually vgg.pth of the lpips package, or vgg_lpips.pth)"


class LPIPS(nn.Module):
    """The learned perceptual distance of Zhang et al. (2018), version 0.1, with VGG16:

        d(x, y) = sum_l mean over positions of sum_c w_lc (f_lc(x) - f_lc(y))^2

    f_l are the feature maps after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, divided by their length over the
    channels (+ 1e-10); w_l the heads. Images are first shifted and scaled channel by channel.

    Frozen: weights are buffers, without gradient and not part of the state dict (they come from files of their own); it
    stays in eval mode; gradients flow to x and y alone. Calling it with x, y (B, 3 or 1, H, W) in [-1, 1], H and W at
    least 16, gives (B,), float32 (float64 for a module in float64). A single channel is repeated to three. Half types
    are cast to the weights' type; under autocast the convolutions run in its type, the distances in float32.

    Args:
        vgg_state_dict: of torchvision's VGG16, `features.{0..28}.weight` and `.bias`; `classifier.*` is not used.
        head_state_dict: `lin{0..4}.model.1.weight`, each (1, C, 1, 1); of the lpips package's full state dict the other
            tensors are not used.

    Raises:
        TypeError, ValueError: a tensor is missing, of another shape, or that of another VGG; no dictionaries.
        TypeError, ValueError in a call: images of another dtype or shape, two shapes, or smaller than 16 pixels.
    """

    smallest = _SMALLEST
    """Pixels that an image has at least along each side."""
    images_at_once: int | None = None
    """Images that an `AdversarialLoss` gives it at a time: the features of no more are kept for the gradient, and the
    result is the same. None: all, which is faster on a CPU."""

    def __init__(self, vgg_state_dict: Mapping[str, Tensor], head_state_dict: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._checksums: dict[str, str] = {}
        for name, given in (("vgg_state_dict", vgg_state_dict), ("head_state_dict", head_state_dict)):
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"{name}: expected tensors by name, got {type(given).__name__}; LPIPS.from_files reads files"
                )
        vgg = ForeignTensors({name: tensor for name, tensor in vgg_state_dict.items() if name.startswith("features.")})
        heads = ForeignTensors({name: tensor for name, tensor in head_state_dict.items() if _is_head(name)})
        before = 3
        for stage in _STAGES:
            for index, channels in stage:
                self._keep(f"weight{index}", vgg.take(f"features.{index}.weight", (channels, before, 3, 3)))
                self._keep(f"bias{index}", vgg.take(f"features.{index}.bias", (channels,)))
                before = channels
        vgg.finish("torchvision's VGG16", where="vgg_state_dict")
        for index, stage in enumerate(_STAGES):
            self._keep(f"head{index}", heads.take(f"lin{index}.model.1.weight", (1, stage[-1][1], 1, 1)))
        heads.finish("the LPIPS heads for VGG16", where="head_state_dict")
        self._keep("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self._keep("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        super().train(False)

    @classmethod
    def from_files(
        cls, vgg: str | os.PathLike[str] | None, heads: str | os.PathLike[str] | None = None, *, prefix: str = ""
    ) -> LPIPS:
        """Reads the weights from local files, torch checkpoints or safetensors; nothing is downloaded, nothing in a
        pickle is executed. `checksums` then has the SHA-256 of both.

        Args:
            vgg: torchvision's VGG16, usually vgg16-397923af.pth (its name ends in the first digits of its SHA-256).
            heads: the heads, usually lpips/weights/v0.1/vgg.pth of the lpips package, or vgg_lpips.pth; None: those of
                the lpips package where it is installed.
            prefix: what stands before the names of options in errors, such as "perceptual.".

        Raises:
            FileNotFoundError: a file is missing; says which, its usual name, and the option that takes its path.
            ValueError: a file is damaged, of another kind, or its tensors do not fit.
        """
        paths = cls.find_files(vgg, heads, prefix=prefix)
        tensors = {option: _read(path) for option, path in paths.items()}
        try:
            lpips = cls(tensors["vgg"], tensors["heads"])
        except ValueError as error:
            name, _, fault = str(error).partition(": ")
            raise ValueError(f"{paths['vgg' if name.startswith('vgg') else 'heads']}: {fault}") from error
        lpips._checksums = {option: file_checksum(path) for option, path in paths.items()}
        return lpips

    @property
    def checksums(self) -> Mapping[str, str]:
        """SHA-256 of the files it was read from, by option; empty where it was not made by `from_files`."""
        return MappingProxyType(self._checksums)

    @staticmethod
    def find_files(
        vgg: str | os.PathLike[str] | None, heads: str | os.PathLike[str] | None = None, *, prefix: str = ""
    ) -> dict[str, Path]:
        """Paths of the files that `from_files` reads, by option; FileNotFoundError as there."""
        return {
            "vgg": require_weights(vgg, f"{prefix}vgg", VGG_FILE),
            "heads": require_weights(heads or _installed_heads(), f"{prefix}heads", HEADS_FILE),
        }

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval mode."""
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for name, images in (("x", x), ("y", y)):
            device = self.get_buffer("weight0").device
            check_batch(images, name, channels=(1, 3), smallest=_SMALLEST, device=device, owner="network")
        check_pair(x, y, ("x", "y"))
        x, y = self._scaled(x), self._scaled(y)
        distance = torch.zeros((), device=x.device)
        for index, stage in enumerate(_STAGES):
            x, y = (self._stage(images, stage, pool=index > 0) for images in (x, y))
            # Not a convolution: under autocast that would be one in half precision.
            weighted = (unit(x) - unit(y)).square() * self.get_buffer(f"head{index}")
            distance = distance + weighted.sum(dim=1).mean(dim=(1, 2))
        return distance

    def _scaled(self, images: Tensor) -> Tensor:
        images = images.to(self.get_buffer("weight0").dtype).expand(-1, 3, -1, -1)
        return (images - self.get_buffer("shift")) / self.get_buffer("scale")

    def _stage(self, features: Tensor, stage: tuple[tuple[int, int], ...], *, pool: bool) -> Tensor:
        if pool:
            features = F.max_pool2d(features, 2)
        for index, _ in stage:
            weight, bias = self.get_buffer(f"weight{index}"), self.get_buffer(f"bias{index}")
            features = F.conv2d(features, weight, bias, padding=1).relu_()
        return features

    def _keep(self, name: str, tensor: Tensor) -> None:
        # A copy: the caller's may change.
        self.register_buffer(name, tensor.detach().to(torch.float32, copy=True).contiguous(), persistent=False)


def _is_head(name: str) -> bool:
    return name.startswith("lin") and not name.startswith("lins.")


def _installed_heads() -> Path | None:
    """The heads in an installed lpips package, which is not imported; None where there is none."""
    spec = find_spec("lpips")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("weights") / "v0.1" / "vgg.pth"
    return path if path.is_file() else None


def _read(path: Path) -> dict[str, Tensor]:
    """Finite tensors by name from a torch checkpoint or a safetensors file."""
    if not describe_file(path).startswith(SAFETENSORS):
        return check_state_dict(unpickle(path), path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, "safetensors file", error) from error
    return check_state_dict(tensors, path)
