"""Distances between feature maps, and a perceptual distance from any network saved by torch.export."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rqgen.files import file_checksum
from rqgen.reading import describe_file, unreadable

from .batches import check_batch, check_pair

FEATURES_FILE = "a network saved by torch.export (usually NAME.pt2)"
_EPSILON = 1e-10
# The types in which a network is usually stored and run.
_LARGEST_TYPE = torch.float32


def unit(features: Tensor) -> Tensor:
    """Features (B, C, H, W) divided by their length over the channels, `f / (|f| + 1e-10)`, in float32 (or float64).

    Where all are zero the result and the gradient are zero, not NaN.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features * torch.where(length > 0, 1 / (length + _EPSILON), 0)


def require_weights(path: str | os.PathLike[str] | None, option: str, usual: str) -> Path:
    """The path of a file of weights. Raises FileNotFoundError where there is none: says which file, its usual name, and
    the option that takes its path."""
    if path is not None and Path(path).is_file():
        return Path(path)
    if path is None:
        found = "no path was given"
    else:
        kind = describe_file(path)
        found = f"there is no file {path}" if kind == "no file" else f"{path} is {kind}"
    raise FileNotFoundError(
        f"{option}: expected the path of {usual}; {found}. It is not downloaded: give its path by {option}=PATH"
    )


class ExportedFeatures(nn.Module):
    """A perceptual distance from a network of the user's own domain, saved by `torch.export.save`:

        d(x, y) = mean over maps l and positions of sum_c (f_l(x) - f_l(y))^2,   f_l = maps of unit length over channels

    The network takes images (B, C, H, W) in [-1, 1] and gives one feature map (B, C', H', W') or several, in a tuple,
    list or dictionary. It is frozen, runs as it was exported (in eval mode; with a dynamic batch size, best) and is
    no part of the state dict. A file of torch.export may hold code of its operators: load those you trust.

    Calling it with (x, y), of the same shape, gives float32 (B,); gradients flow to x and y alone.

    Args:
        path: the file.
        option: the name of the option that takes the path, in errors.

    Raises:
        FileNotFoundError, ValueError: no file, no program of torch.export, or one exported in train mode.
        ValueError in a call: images that the network does not take, or outputs that are no feature maps.
    """

    def __init__(self, path: str | os.PathLike[str], *, option: str = "features") -> None:
        super().__init__()
        self.path = require_weights(path, option, FEATURES_FILE)
        self.checksum = file_checksum(self.path)
        program = _load(self.path)
        # Not registered: it has no train mode to switch to, and its weights come from their own file.
        self._network = (program,)
        for parameter in program.parameters():
            parameter.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> ExportedFeatures:
        """Stays in eval mode."""
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ExportedFeatures:
        self._network[0]._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for name, images in (("x", x), ("y", y)):
            check_batch(images, name)
        check_pair(x, y, ("x", "y"))
        first, second = self.maps(x), self.maps(y)
        distances = [
            (unit(a) - unit(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(first, second, strict=True)
        ]
        return torch.stack(distances).mean(dim=0)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The network's feature maps of images."""
        network = self._network[0]
        dtype = next((tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()), _LARGEST_TYPE)
        try:
            outputs = network(images.to(dtype))
        except (AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self.path}: the exported network does not take images {tuple(images.shape)} of {images.device} "
                f"({reason}): export it for this size, with a dynamic batch size"
            ) from error
        maps = list(_tensors_in(outputs))
        for index, features in enumerate(maps):
            if features.ndim != 4 or len(features) != len(images) or not features.is_floating_point():
                raise ValueError(
                    f"{self.path}: output {index}: expected a feature map ({len(images)}, C, H, W), got "
                    f"{features.dtype} {tuple(features.shape)}"
                )
        if not maps:
            raise ValueError(f"{self.path}: expected feature maps as outputs, got none")
        return maps


def _tensors_in(outputs: object) -> Iterable[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors_in(value)
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            yield from _tensors_in(value)


def _load(path: Path) -> nn.Module:
    if not describe_file(path).startswith("an archive of torch.export"):
        raise unreadable(path, "program of torch.export")
    # Its readers log whole tracebacks before they raise.
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        program = torch.export.load(path)
    except Exception as error:  # whatever the damage makes of the file
        raise unreadable(path, "program of torch.export", str(error).strip().partition("\n")[0]) from error
    finally:
        logger.setLevel(level)
    if (name := _trained(program)) is not None:
        raise ValueError(f"{path}: its {name} was exported in train mode: export it after .eval()")
    return program.module()


def _trained(program: torch.export.ExportedProgram) -> str | None:
    """The first operator, such as dropout or batch norm, that behaves as in train mode; None where there is none."""
    for node in program.graph.nodes:
        if (schema := getattr(node.target, "_schema", None)) is None:
            continue
        for index, argument in enumerate(schema.arguments):
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if argument.name in ("train", "training") and given is True:
                return str(schema.name).removeprefix("aten::")
    return None
