"""Where images come from: one module per source, found by its being in this folder.

A source of your own is a `Source` that is registered before settings are read:

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
    """A source of images, chosen by its ``name``: `data.source=NAME`. The first paragraph of a source's docstring is
    what `rqgen list` says of it."""

    name: ClassVar[str]
    options: ClassVar[type | None] = None
    """A dataclass of the settings that only this source has: the section `data.NAME`. Each has a default, and a string
    under it that says what it is. With a class attribute ``shorthand``, `data.NAME=X` sets that field; where its
    default is None it must be given."""
    channels: ClassVar[Literal[1, 3]] = 3
    """What `data.channels` is where nobody says: 1 (grey) or 3 (colour)."""
    resolution: ClassVar[int] = 32
    """What `data.resolution` is where nobody says, in pixels."""
    max_resolution: ClassVar[int] = 16384

    @abstractmethod
    def open(self, config: DataConfig, options: Any, split: Split) -> ImageDataset:
        """The images of one split, square, of ``config.resolution`` and ``config.channels``.

        Args:
            config: what all sources share. A source takes only ``config.classes``, numbered in their order (see
                `rqgen.data.datasets.choose_classes`), sets ``config.held_out_fraction`` aside (see `stratified_split`)
                and varies training images (see `Augmentation`).
            options: an instance of the class ``options``; None without one.
            split: which part.

        Raises:
            FileNotFoundError, ValueError: there is nothing to read; the message starts with the name of a setting.
        """


SOURCES: Registry[Source] = Registry("data source")
register = SOURCES.register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
