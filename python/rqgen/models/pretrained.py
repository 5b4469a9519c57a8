"""Models on disk: a folder with config.json and model.safetensors."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from typing_extensions import Self

from rqgen.checks import check_device
from rqgen.config import check_fields, from_dict, to_dict
from rqgen.files import (
    CHECKSUM,
    UNSIGNED,
    check_tensors,
    existing_folder,
    json_text,
    new_folder,
    sign_tensors,
)
from rqgen.reading import read_json, shorten, unreadable

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TRAINED, CHECKPOINTS = "model", "checkpoints"
"""The folders of the model and of the checkpoints in that of a training run."""
FORMAT_VERSION = 1
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

ModelT = TypeVar("ModelT", bound=nn.Module)

MODELS: dict[str, type[PretrainedModel]] = {}
"""Every model class that has been defined, by its `model_type`: see `rqgen.models.load_pretrained`."""


class PretrainedModel(nn.Module):
    """A module that is wholly described by a config dataclass and its state dict.

    Subclasses set `model_type` (a name written into the folder, by which `load_pretrained` finds the class) and
    `config_class`, and take the config as the first argument of `__init__`; further arguments need defaults. Models are
    made in float32, whatever torch's default dtype is; cast them afterwards with `.to(dtype)`.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type[Any]]
    given_later: ClassVar[frozenset[str]] = frozenset()
    """Tensors that are all NaN until they are set, such as a prior's codebooks."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _in_float32(cls.__init__)  # type: ignore[method-assign]
        if kind := vars(cls).get("model_type"):
            other = MODELS.setdefault(kind, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"model_type: {kind!r} is that of {other.__module__}.{other.__qualname__} already")
            MODELS[kind] = cls

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(f"config: expected {self.config_class.__name__}, got {type(config).__name__}")
        check_fields(config, "config.")  # a field may have been set since the config was made
        self.config = config
        self.data: dict[str, Any] | None = None
        """Settings of the images that it learned from, as plain data; None where unknown. Saved with the model."""

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters; quantizers are float32 in any case."""
        return next(self.parameters()).dtype

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into `folder`, whole or not at all.

        At each instant the old or the new model can be read, even if the process is stopped. A link stays; its target
        is replaced. The weights' file holds a checksum of both files.

        Raises:
            FileExistsError: `folder` exists and is not a folder, or holds files that are not a saved model's.
            OSError: the disk is full, or the place cannot be written.
            ValueError: `from_pretrained` would refuse what was written: a tensor is not finite, is float64, or does not
                belong to a model made from its config (adapters, parametrizations, quantized layers); or the config was
                changed to an invalid one. A tensor is on the meta device.
        """
        target = Path(folder).absolute()
        check_replaceable(target)
        description: dict[str, Any] = {
            "model_type": self.model_type,
            "format_version": FORMAT_VERSION,
            "config": to_dict(self.config),
        }
        if self.data is not None:
            description["data"] = self.data
        if without_values := [name for name, tensor in self.state_dict().items() if tensor.is_meta]:
            raise ValueError(
                f"{type(self).__name__}: {without_values[0]} is on the meta device and has no values, "
                f"not saved to {target}"
            )
        # Clones, because safetensors refuses tensors that share memory (tied weights).
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.state_dict().items()
        }
        if bad := first_not_finite(tensors, self.given_later):
            raise ValueError(f"{type(self).__name__}: {bad} is not finite, not saved to {target}")
        where = f"not saved to {target}"
        config = from_dict(self.config_class, description["config"], where=where)
        check_fit(sketch(type(self), config, len(tensors), where=where), tensors, where=where)
        _check_plain(self.data, where=where)
        with new_folder(target) as written:
            config, weights = written / CONFIG_NAME, written / WEIGHTS_NAME
            config.write_text(json_text(description), encoding="utf-8")
            save_file(tensors, weights, metadata={"format": "pt", CHECKSUM: UNSIGNED})
            sign_tensors(weights, config)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu", *, verify: bool = True
    ) -> Self:
        """Read what `save_pretrained` wrote; the model comes back in eval mode, in float32. Of a training run's folder
        its model is read, see `model_folder`.

        `verify` off: a folder whose files were changed on purpose, so that their checksum differs, is read too. Folders
        of versions that wrote no checksum are read in both cases.

        Raises:
            FileNotFoundError: no such folder, or one of its two files is missing.
            ValueError: a device that is not there; a file is damaged; the folder holds another model type, a newer
                format, an invalid config, or tensors that are not finite or whose names, shapes or dtypes do not fit
                the config.
        """
        device = check_device(device, "device")
        source = model_folder(Path(folder)) or existing_folder(Path(folder))
        if not source.is_dir():
            raise FileNotFoundError(f"folder: no folder {source}")
        config_path, weights_path = source / CONFIG_NAME, source / WEIGHTS_NAME
        for path in (config_path, weights_path):
            if not path.is_file():
                raise FileNotFoundError(f"folder: no file {path.name} in {source}{unfinished(source)}")
        description = cls._read_description(config_path)
        config = from_dict(cls.config_class, description["config"], where=str(config_path))
        # Whatever torch's default device is: on "meta" nothing would be loaded, and no error raised.
        with torch.device("cpu"):
            weights_path.open("rb").close()  # the library reports a file without permission as missing
            try:
                tensors = load_file(weights_path)
            except (SafetensorError, OSError, ValueError) as error:
                raise unreadable(weights_path, "safetensors file", error) from error
            # Before any memory is allocated: either file may be the wrong one.
            expected = sketch(cls, config, len(tensors), where=str(config_path))
            check_fit(expected, tensors, where=f"{weights_path} with {CONFIG_NAME}")
            model = cls(config)
            load_tensors(model, tensors, where=str(weights_path))
        # Last: other faults have more precise messages.
        if verify:
            check_tensors(weights_path, config_path)
        model.data = description.get("data")
        return model.to(device).eval()

    @classmethod
    def _read_description(cls, path: Path) -> dict[str, Any]:
        description = read_json(path)
        for key in ("model_type", "format_version", "config"):
            if key not in description:
                raise ValueError(f"{path}: expected the key {key!r}, which is missing")
        if description["model_type"] != cls.model_type:
            raise ValueError(
                f"{path}: expected model_type {cls.model_type!r} for {cls.__name__}, "
                f"got {shorten(description['model_type'])}"
            )
        version = description["format_version"]
        if isinstance(version, bool) or version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: expected format_version {FORMAT_VERSION}, got {shorten(version)}; "
                "written by another version of rqgen"
            )
        for key in ("config", "data"):
            if not isinstance(description.get(key, {}), dict):
                raise ValueError(f"{path}: {key}: expected a JSON object, got {type(description[key]).__name__}")
        return description


def model_folder(path: Path) -> Path | None:
    """Return the folder of a saved model: ``path`` itself, or model/ in it as in a training run; None without one."""
    for folder in (path, path / TRAINED):
        if ((found := existing_folder(folder)) / CONFIG_NAME).is_file():
            return found
    return None


def unfinished(folder: Path) -> str:
    """Return the end of an error about a folder without a model: whether a training has begun there."""
    if any((folder / CHECKPOINTS).glob("*/")):
        return f": the training there has not ended; `rqgen train` with --out {folder} --resume goes on"
    return ""


def _check_plain(data: Any, *, where: str) -> None:
    try:
        json.dumps(data, allow_nan=False)
        fits = data is None or isinstance(data, dict)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{where}: data: expected a dictionary of plain data, got {shorten(data)}")


def _in_float32(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def made(*args: Any, **kwargs: Any) -> None:
        default = torch.get_default_dtype()
        if default == torch.float32:
            return init(*args, **kwargs)
        torch.set_default_dtype(torch.float32)
        try:
            return init(*args, **kwargs)
        finally:
            torch.set_default_dtype(default)

    return made


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and afterwards back in the mode that it came in."""
    # Not `modules()`, whose nested generators take a noticeable part of decoding one image.
    training, rest = [], list(models)
    while rest:
        module = rest.pop()
        if module.training:
            training.append(module)
        rest += [child for child in module._modules.values() if child is not None]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_replaceable(folder: Path) -> None:
    """Raise FileExistsError unless `save_pretrained` may write `folder`: it is missing, empty, or holds a model."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"folder: {folder} exists and is not a folder")
    names = {entry.name for entry in folder.iterdir()}
    foreign = sorted(names - {CONFIG_NAME, WEIGHTS_NAME})
    if foreign:
        raise FileExistsError(f"folder: {folder} holds files that are not a saved model's, not replaced: {foreign[:5]}")
    if names and not _describes_a_model(folder / CONFIG_NAME):
        raise FileExistsError(f"folder: {folder} holds a model that rqgen did not write, not replaced")


def _describes_a_model(path: Path) -> bool:
    """Return True if `save_pretrained` of any version wrote a config.json: other libraries use the same names of
    files."""
    try:
        return {"model_type", "format_version", "config"} <= read_json(path).keys()
    except (OSError, ValueError):
        return False


def sketch(model_class: Callable[[Any], ModelT], config: Any, num_tensors: int, *, where: str) -> ModelT:
    """Return the model of a config on torch's "meta" device, which needs no memory: to check a file against it.

    Raises:
        ValueError: it has many more parameters than `num_tensors` tensors of a file fill (a config may ask for
            billions), or cannot be built; starts with `where`.
    """
    thread, limit, count = threading.get_ident(), 4 * num_tensors + 10_000, 0

    def count_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > limit:
            raise ValueError(f"a model of more than {limit} parameters, but the weights are {num_tensors} tensors")

    handle = register_module_parameter_registration_hook(count_parameter)
    try:
        with torch.device("meta"):
            return model_class(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError) as error:
        # For sizes out of range torch's message includes lines of its own stack.
        reason = " ".join(str(error).partition("Exception raised from")[0].split())[:200]
        raise ValueError(f"{where}: no model can be built of this config: {reason}") from error
    finally:
        handle.remove()


def check_fit(model: nn.Module, tensors: Mapping[str, torch.Tensor], *, where: str, same_dtype: bool = False) -> None:
    """Raise ValueError, which starts with `where`, unless `tensors` have the model's names, shapes and dtypes.

    Floating-point tensors may be float32, float16 or bfloat16, whatever the model's are (`same_dtype`: they must be as
    the model's); all others must have the model's dtype.
    """
    expected = model.state_dict()
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"{len(missing)} tensors missing: {', '.join(missing[:5])}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        problems.append(f"{len(unknown)} tensors unknown: {', '.join(map(str, unknown[:5]))}")
    common = sorted(expected.keys() & tensors.keys())
    for what, differing in (
        ("shapes", [(n, tuple(expected[n].shape), tuple(tensors[n].shape)) for n in common]),
        ("dtypes", [(n, *_dtypes(expected[n], tensors[n], same_dtype)) for n in common]),
    ):
        told = [f"{name}: expected {wanted}, got {got}" for name, wanted, got in differing if wanted != got]
        if told:
            problems.append(f"{len(told)} {what} differ: {'; '.join(told[:5])}")
    if problems:
        raise ValueError(f"{where}: does not fit {type(model).__name__}: {'. '.join(problems)}")


def load_tensors(model: nn.Module, tensors: dict[str, torch.Tensor], *, where: str, same_dtype: bool = False) -> None:
    """Copy `tensors` into `model`; they must fit as `check_fit` says, and every value be finite.

    Raises:
        ValueError: they do not fit, or are not finite; starts with `where`.
    """
    check_fit(model, tensors, where=where, same_dtype=same_dtype)
    waiting = model.given_later if isinstance(model, PretrainedModel) else frozenset()
    if bad := first_not_finite(tensors, waiting):
        raise ValueError(f"{where}: {bad} is not finite")
    model.load_state_dict(tensors)


def first_not_finite(tensors: Mapping[str, torch.Tensor], waiting: frozenset[str] = frozenset()) -> str | None:
    """Return the name of the first tensor with NaN or infinity, if any. Those of ``waiting`` may be NaN as a whole."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            continue
        if not (name in waiting and bool(tensor.isnan().all())):
            return name
    return None


def _dtypes(expected: torch.Tensor, got: torch.Tensor, same: bool) -> tuple[torch.dtype | str, torch.dtype]:
    """Return (expected, got): equal if the dtype is accepted."""
    if same or not expected.is_floating_point():
        return expected.dtype, got.dtype
    return got.dtype if got.dtype in _FLOATS else "float32, float16 or bfloat16", got.dtype
