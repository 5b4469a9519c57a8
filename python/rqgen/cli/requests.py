"""Requests of the user: for each command a dataclass whose fields are its options (see `with_options`).

Imported without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rqgen.options import EngineOptions, SamplingOptions, option
from rqgen.systems import DEFAULT, TITLES

PRIOR, TOKENIZER = Path("runs/prior/model"), Path("runs/tokenizer/model")
_SYSTEMS = "|".join(TITLES)
_SETTINGS = "[KEY=VALUE]..."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a command: a file, and changes to it."""

    overrides: list[str] = option([], argument=True, metavar=_SETTINGS)
    """Settings to change, such as loop.steps=500."""
    config: str | None = None
    """A YAML file of settings, or the name of a recipe (`rqgen list recipes`); by default the one for digits."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest(Settings):
    """`rqgen train`."""

    out: Path
    """Folder for checkpoints, logs and the trained model (model/)."""
    system: str | None = option(None, metavar=_SYSTEMS)
    """The models to train; by default rq: RQ-VAE and RQ-Transformer."""
    resume: bool = False
    """Resume from the newest intact checkpoint in the folder, with its settings; loop.steps may be raised."""


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerRequest(TrainRequest):
    """`rqgen train tokenizer`."""

    out: Path = Path("runs/tokenizer")


@dataclass(frozen=True, kw_only=True)
class TrainPriorRequest(TrainRequest):
    """`rqgen train prior`."""

    out: Path = Path("runs/prior")


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """`rqgen encode`."""

    out: Path
    """File to write (safetensors)."""
    overrides: list[str] = option([], argument=True, metavar=_SETTINGS)
    """The images, such as folder=photos/ or source=digits; by default those of the tokenizer's training."""
    config: str | None = None
    """A YAML file of such settings."""
    tokenizer: Path = TOKENIZER
    """Folder of a trained tokenizer."""
    split: str = option("all", metavar="train|held_out|all")
    """The images to encode."""
    batch_size: int = option(64, lowest=1)
    """Images encoded together."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """`rqgen sample`."""

    run: Path | None = option(None, argument=True, metavar="[RUN]")
    """A folder with tokenizer/ and prior/, such as the demo's; or that of a prior's training run or of a prior."""
    out: Path = Path("samples.png")
    """Image file for one sheet of all images; its name decides the format: PNG, JPEG, WebP, TIFF or BMP."""
    prior: Path | None = None
    """Folder of a trained prior, in place of RUN; by default runs/prior/model."""
    tokenizer: Path | None = None
    """Folder of a trained tokenizer, in place of the one in RUN; without RUN by default runs/tokenizer/model."""
    classes: list[str] = option([], name="--class")
    """Class to sample, by name or number; may be repeated; by default all."""
    num: int = option(10, lowest=1)
    """Number of images of each class, or in all for a prior without classes."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    batch_size: int = option(100, lowest=1)
    """Images sampled together."""
    codes: Path | None = None
    """Also write the codes to this file (safetensors)."""


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """`rqgen edit`."""

    kind: str = option(argument=True, metavar="inpaint|outpaint|class")
    """Resample the white part of the mask; keep it and resample the rest; resample it as another class."""
    image: Path
    """The image to edit, of the tokenizer's size."""
    mask: Path
    """A black and white image of the same size."""
    label: str | None = None
    """Class to sample, by name or number; by default the null condition."""
    prior: Path = PRIOR
    """Folder of a trained prior."""
    tokenizer: Path = TOKENIZER
    """Folder of a trained tokenizer."""
    out: Path = Path("edited.png")
    """Image file for a sheet of three: before, mask and after; its name decides the format."""
    background: str = "white"
    """Colour behind transparent pixels of the image and the mask."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """`rqgen evaluate`."""

    run: Path = option(argument=True, metavar="RUN")
    """A folder with tokenizer/ and prior/, such as the demo's; or that of one training run or one model."""
    overrides: list[str] = option([], argument=True, metavar=_SETTINGS)
    """Settings to change, such as sampling.top_p=0.9."""
    metrics: list[str] = option([], name="--metric")
    """A metric by name (`rqgen list metrics`); may be repeated; by default all that fit."""
    count: int | None = option(None, lowest=1, highest=10**6)
    """Number of samples; by default sampling.count of the settings, 500."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, for a prior in another folder."""
    config: str | None = None
    """A YAML file of settings (`rqgen config evaluate`)."""
    out: Path = Path("evaluation.json")
    """JSON file to write."""


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """Options of every benchmark."""

    out: Path = Path("runs/bench")
    """Folder for the JSON file and the figure."""
    device: str | None = None
    """cpu or cuda; by default a GPU if there is one."""
    threads: int | None = option(None, lowest=1, highest=1024)
    """Threads of torch; by default its own choice."""


@dataclass(frozen=True, kw_only=True)
class DemoRequest(Settings):
    """`rqgen demo`."""

    system: str | None = option(None, metavar=_SYSTEMS)
    """The models to train; by default rq: RQ-VAE and RQ-Transformer."""
    seed: int | None = option(None, lowest=0, highest=2**32 - 1)
    """Seed of both trainings and the samples; by default that of the settings, 0."""
    out: Path = Path("runs/demo")
    """Folder for figures, metrics.json and both models."""


@dataclass(frozen=True, kw_only=True)
class ScalingRequest(Settings):
    """`rqgen scaling`."""

    tokenizer: Path | None = None
    """Folder of a trained multi-scale VQ-VAE; by default one is trained first."""
    out: Path = Path("runs/scaling")
    """Folder for the table, the figure and all models."""
    resume: bool = False
    """Resume the run in the folder; finished models are kept."""


@dataclass(frozen=True, kw_only=True)
class ConvertVARRequest:
    """`rqgen convert var`."""

    vae: Path
    """The published tokenizer's state dict (.pth)."""
    var: Path
    """The published prior's state dict (.pth)."""
    destination: Path = option(argument=True, metavar="DST")
    """Folder to write tokenizer/ and prior/ into."""
    config: Path | None = None
    """JSON file with the constructors' arguments; by default those of the models for 256x256."""


@dataclass(frozen=True, kw_only=True)
class ConvertKakaobrainRequest:
    """`rqgen convert kakaobrain`."""

    source: Path = option(argument=True, metavar="SRC")
    """model.pt, with config.yaml next to it."""
    destination: Path = option(argument=True, metavar="DST")
    """Folder to write."""
    tokenizer: Path | None = None
    """Tokenizer of a prior: model.pt, or a folder in our format."""


@dataclass(frozen=True, kw_only=True)
class ListRequest:
    """`rqgen list`."""

    kind: str | None = option(None, argument=True, metavar="[systems|sources|metrics|recipes]")
    """The list to print; by default all."""


@dataclass(frozen=True, kw_only=True)
class ConfigRequest:
    """`rqgen config`."""

    words: list[str] = option([], argument=True, metavar="[COMMAND] [KEY=VALUE]...")
    """train tokenizer (the default), train prior, encode, evaluate, demo or scaling; then settings."""
    system: str = option(DEFAULT, metavar=_SYSTEMS)
    """The models to train."""
    config: str | None = None
    """A YAML file of settings, or the name of a recipe; by default the one for digits."""
