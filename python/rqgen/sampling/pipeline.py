"""A tokenizer, a prior and the names of its classes in one folder, and images sampled from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from rqgen.checks import check_device, check_integer, same_names
from rqgen.data.grid import to_uint8
from rqgen.files import existing_folder, new_folder, write_json
from rqgen.models import Prior, Tokenizer, load_pretrained
from rqgen.models.classes import class_label, names_of_classes
from rqgen.models.condition import checked_class_names
from rqgen.models.pretrained import check_replaceable
from rqgen.quantizers import Codes
from rqgen.reading import name_some, read_json, shorten

from .arguments import check_condition, check_models
from .generate import generate

DESCRIPTION = "pipeline.json"
FORMAT_VERSION = 1
_PARTS = ("tokenizer", "prior")


class PipelineOutput(NamedTuple):
    """Result of calling a `Pipeline`."""

    images: list[Image.Image]
    """PIL images, "L" or "RGB"."""
    tensors: Tensor
    """The same as float32 (num, channels, H, W) in [-1, 1]."""
    codes: Codes
    """As `GenerateOutput.codes`."""


class Pipeline:
    """A tokenizer and a prior over its codes.

        pipe = rqgen.Pipeline.from_pretrained("runs/demo")
        pipe("seven", num=4, cfg_scale=1.5).images[0].save("seven.png")

    Args:
        tokenizer, prior: of one system, on one device.
        class_names: names of the classes of a prior that has none of its own; of one that has, the same.

    Raises:
        TypeError, ValueError: models that do not belong together; another number of names than classes, or others than
            the prior's own.
    """

    def __init__(self, tokenizer: Tokenizer, prior: Prior, *, class_names: Sequence[str] | None = None) -> None:
        check_models(prior, tokenizer)
        self.tokenizer, self.prior = tokenizer, prior
        given = checked_class_names(class_names or (), prior.num_classes)
        own = prior.class_names
        # Numbers in their order are what classes without names are called.
        if own and given and not same_names(given, own) and given != tuple(map(str, range(prior.num_classes))):
            raise ValueError(
                f"class_names: expected none, as the prior has names of its own ({name_some(own)}), "
                f"got {name_some(given)}"
            )
        self._given_names = given

    @property
    def class_names(self) -> tuple[str, ...]:
        """The prior's names of its classes; where it has none, the given ones, or else numbers."""
        return self.prior.class_names or self._given_names or names_of_classes(self.prior)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Self:
        """Read a folder that `save_pretrained`, or `rqgen demo`, wrote: tokenizer/, prior/ and pipeline.json. A folder
        with the two models alone is read too, and so is one with the folders of their training runs.

        Raises:
            FileNotFoundError: no such folder, or one of the models is missing.
            ValueError: a device that is not there, a file is damaged, or the models do not belong together.
        """
        source = existing_folder(Path(folder))
        if not source.is_dir():
            raise FileNotFoundError(f"folder: no folder {source}")
        for part in _PARTS:
            if not (source / part).is_dir():
                raise FileNotFoundError(f"folder: expected tokenizer/ and prior/ in {source}, but {part}/ is missing")
        names = read_class_names(source)
        tokenizer, prior = (load_pretrained(source / part, device) for part in _PARTS)
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError(f"{source / 'tokenizer'}: expected a tokenizer, got a {tokenizer.model_type}")
        if not isinstance(prior, Prior):
            raise ValueError(f"{source / 'prior'}: expected a prior, got a {prior.model_type}")
        try:
            return cls(tokenizer, prior, class_names=names)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer/, prior/ and pipeline.json into `folder`, whole or not at all.

        Raises:
            FileExistsError: `folder` is not a folder, or holds files of something else.
            OSError, ValueError: as `PretrainedModel.save_pretrained`.
        """
        target = Path(folder).absolute()
        if target.exists():
            if not target.is_dir():
                raise FileExistsError(f"folder: {target} exists and is not a folder")
            foreign = sorted({entry.name for entry in target.iterdir()} - {*_PARTS, DESCRIPTION})
            if foreign:
                raise FileExistsError(
                    f"folder: {target} holds files that are not a pipeline's, not replaced: {foreign[:5]}"
                )
            for part in _PARTS:
                check_replaceable(target / part)
        with new_folder(target) as written:
            self.tokenizer.save_pretrained(written / "tokenizer")
            self.prior.save_pretrained(written / "prior")
            write_description(written, self.prior.class_names or self._given_names)

    def to(self, device: str | torch.device) -> Self:
        """Move both models; return the pipeline. ValueError for a device that is not there."""
        device = check_device(device, "device")
        self.tokenizer.to(device)
        self.prior.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return self.prior.device

    def __call__(self, condition: Any = None, num: int | None = None, **settings: Any) -> PipelineOutput:
        """Sample images.

        Args:
            condition: a class by its name or number, of which `num` images are sampled (1 by default); or a list of
                classes, an image each; or token ids (num, L), as the prior's config says. None: no condition, or the
                null condition of a prior that learned one.
            num: how many images, without a condition or of a single class.
            settings: as `generate` takes them: the fields of `SamplingParams`, or params, batch_size, known, precision,
                progress.

        Raises:
            TypeError, ValueError, IndexError: as `generate`.
            ValueError: a tokenizer of images that have neither 1 nor 3 channels.
        """
        if (channels := self.tokenizer.image_channels) not in (1, 3):
            raise ValueError(
                f"tokenizer: expected images of 1 or 3 channels, which PIL can show, got {channels}; rqgen.generate "
                "gives tensors alone"
            )
        if condition is not None:
            single = self._single_class(condition)
            if single is not None:
                count = 1 if num is None else check_integer(num, "num", 1)
                condition, num = [single] * count, None
            condition = check_condition(condition, self.prior, self.class_names)
        sampled = generate(self.prior, self.tokenizer, condition, num, **settings)
        tensors = sampled.images.float()
        return PipelineOutput([_to_pil(image) for image in to_uint8(tensors).cpu()], tensors, sampled.codes)

    def _single_class(self, condition: Any) -> int | None:
        """Return the label of a class that is given by itself; None for a list or tensor of several."""
        if isinstance(condition, str):
            names = self.class_names if self.prior.num_classes else ()
            return class_label(condition, names, "condition")
        if isinstance(condition, (int, np.integer)) or (
            isinstance(condition, (Tensor, np.ndarray)) and not condition.ndim
        ):
            if not self.prior.num_classes:
                raise ValueError(f"condition: expected none, as this prior knows no classes, got {condition!r}")
            return check_integer(condition, "condition", 0, self.prior.num_classes - 1)
        return None


def write_description(folder: Path, class_names: Sequence[str]) -> None:
    """Write `folder`/pipeline.json, which makes a pipeline of the folder's tokenizer/ and prior/."""
    write_json(folder / DESCRIPTION, {"format_version": FORMAT_VERSION, "class_names": list(class_names)})


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the names of classes in `folder`/pipeline.json; None without this file. ValueError for a damaged one."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    description = read_json(path)
    version = description.get("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {shorten(version)}")
    names = description.get("class_names", [])
    if not isinstance(names, list):
        raise ValueError(f"{path}: class_names: expected a list of names, got {shorten(names)}")
    try:
        return checked_class_names(names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _to_pil(image_chw: Tensor) -> Image.Image:
    """Return a PIL image of bytes (1 or 3, H, W)."""
    pixels = image_chw.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
