"""Sources of images: one module each, found by importing all modules of this folder.

A source of your own is registered before settings are read:

    @rqgen.data.sources.register
    class Squares(Source):
        "Squares of every size."
        name = "squares"
        def open(self, config, options, split): ...
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rqgen.config import Registry

from ..datasets import ImageDataset, Split

if TYPE_CHECKING:
    from ..settings import DataConfig


class Source(ABC):
    """A source of images, chosen by its ``name``: `data.source=NAME`. `rqgen list sources` shows the first paragraph of
    its docstring."""

    name: ClassVar[str]
    options: ClassVar[type | None] = None
    """A dataclass of the settings of this source alone, the section `data.NAME`. Each field has a default, and a string
    under it as its help. With a class attribute ``shorthand``, `data.NAME=X` sets that field; if the field's default
    is None, it must be given."""
    channels: ClassVar[Literal[1, 3]] = 3
    """Default of `data.channels`: 1 (grey) or 3 (colour)."""
    resolution: ClassVar[int] = 32
    """Default of `data.resolution`, in pixels."""
    max_resolution: ClassVar[int] = 16384
    """Upper bound of `data.resolution`, in pixels."""

    @abstractmethod
    def open(self, config: DataConfig, options: Any, split: Split) -> ImageDataset:
        """The images of one split, square, of ``config.resolution`` and ``config.channels``.

        Args:
            config: the shared settings. A source takes the classes of ``config.classes`` alone, numbered in their order
                (see `rqgen.data.datasets.choose_classes`), sets ``config.held_out_fraction`` aside (see
                `stratified_split`) and varies training images (see `Augmentation`).
            options: an instance of the class ``options``; None without one.
            split: the part to open.

        Raises:
            FileNotFoundError, ValueError: there is nothing to read; the message starts with the name of a setting.
        """


SOURCES: Registry[Source] = Registry("data source")
register = SOURCES.register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
