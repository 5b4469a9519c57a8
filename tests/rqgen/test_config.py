"""Settings: typed, nested, with errors that name the key and the nearest right one."""

import dataclasses
import importlib
import pkgutil
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import rqgen
from rqgen import config


@dataclass
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    warmup_steps: int = 10

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr: expected a positive number, got {self.lr}")


@dataclass
class Settings:
    steps: int
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema: Optimizer | None = None
    kind: Literal["digits", "photos"] = "digits"
    folder: Path | None = None


def test_nested_values_arrive_typed():
    settings = config.from_dict(
        Settings, {"steps": 3, "optimizer": {"lr": 1, "betas": [0.5]}, "folder": "/x"}, where="here"
    )
    assert settings == Settings(3, Optimizer(lr=1.0, betas=(0.5,)), folder=Path("/x"))
    assert isinstance(settings.optimizer, Optimizer) and isinstance(settings.optimizer.betas, tuple)


def test_round_trip_through_plain_data():
    settings = Settings(3, ema=Optimizer(lr=0.25), folder=Path("a/b"))
    plain = config.to_dict(settings)
    assert plain["ema"] == {"lr": 0.25, "betas": [0.9, 0.95], "warmup_steps": 10}
    assert plain["folder"] == "a/b"
    assert config.from_dict(Settings, plain, where="here") == settings


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        (
            {"steps": 1, "optimizer": {"warmup_step": 5}},
            ["'optimizer.warmup_step'", "'optimizer.warmup_steps'"],
        ),
        ({"steps": 1, "warmup_steps": 5}, ["'warmup_steps'", "'optimizer.warmup_steps'"]),
        ({"steps": 1, "ema": {"betax": 5}}, ["'ema.betax'", "'ema.betas'"]),
        ({"steps": 1, "optimizer": {"warmup": 5}}, ["'optimizer.warmup'", "'optimizer.warmup_steps'"]),
        ({"steps": 1, "zzzzzz": 5}, ["'zzzzzz'", "known here: steps, optimizer, ema, kind, folder"]),
        ({"steps": 1.5}, ["'steps'", "1.5"]),
        ({"steps": 1, "optimizer": {"betas": 3}}, ["'optimizer.betas'"]),
        ({"steps": 1, "optimizer": 3}, ["Optimizer", "3"]),
        ({"steps": 1, "kind": "cats"}, ["'kind'", "cats", "photos"]),
        ({"steps": 1, "optimizer": {"lr": -1}}, ["lr", "positive"]),
        ({}, ["'steps'", "must be given"]),
    ],
)
def test_bad_settings_are_named(mapping, words):
    with pytest.raises(ValueError, match="somewhere") as caught:
        config.from_dict(Settings, mapping, where="somewhere")
    for word in words:
        assert word in str(caught.value)


def test_only_dataclasses_and_mappings():
    with pytest.raises(TypeError, match="dataclass"):
        config.from_dict(dict, {}, where="here")
    with pytest.raises(TypeError, match="mapping"):
        config.from_dict(Settings, [1], where="here")
    with pytest.raises(TypeError, match="instance"):
        config.to_dict(Settings)


def test_load_applies_file_then_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\noptimizer:\n  lr: 0.5\n  betas: [0.1, 0.2]\n")
    settings = config.load(Settings, path, ["optimizer.betas=[0.3]", "kind=photos", "folder=null", "steps=7"])
    assert settings == Settings(7, Optimizer(lr=0.5, betas=(0.3,)), kind="photos")
    assert config.load(Settings, None, ["steps=2", "optimizer.lr=1e-4"]).optimizer.lr == 1e-4


def test_defaults_stand_below_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\noptimizer:\n  lr: 0.5\n")
    defaults = {"steps": 1, "kind": "photos", "optimizer": {"lr": 0.1, "warmup_steps": 77}}
    settings = config.load(Settings, path, ["optimizer.lr=0.6"], defaults=defaults)
    assert settings == Settings(5, Optimizer(lr=0.6, warmup_steps=77), kind="photos")


@pytest.mark.parametrize("override", ["steps", "=3", "steps=[1", "optimizer.lrr=1", "steps.x=1"])
def test_bad_overrides(override, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\n")
    with pytest.raises(ValueError, match=r"override|steps"):
        config.load(Settings, path, [override])


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        config.load(Settings, tmp_path / "missing.yaml")
    listing = tmp_path / "list.yaml"
    listing.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match=r"list\.yaml: expected a mapping"):
        config.load(Settings, listing)
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: [1\n")
    with pytest.raises(ValueError, match=r"broken\.yaml: not a readable YAML"):
        config.load(Settings, broken)
    typo = tmp_path / "typo.yaml"
    typo.write_text("step: 1\n")
    with pytest.raises(ValueError, match=r"typo\.yaml: unknown key 'step'; did you mean 'steps'"):
        config.load(Settings, typo, ["steps=2"])


# --- numbers that are none -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_no_setting_is_nan_or_infinite(tmp_path: Path, value: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"steps: 3\nema: {{lr: 1.0, betas: [0.5, .{value}]}}\n")
    with pytest.raises(ValueError, match=rf"settings\.yaml: ema\.betas: expected a finite number, got {value}"):
        config.load(Settings, path)
    with pytest.raises(ValueError, match=rf"command line: optimizer\.lr: expected a finite number, got {value}"):
        config.load(Settings, None, ["steps=3", f"optimizer.lr=.{value}"])


def float_settings() -> list[tuple[type, str]]:
    """Every field of rqgen's settings that holds a float."""
    found = []
    for module in pkgutil.walk_packages(rqgen.__path__, "rqgen."):
        if module.name == "rqgen.__main__":
            continue
        for value in vars(importlib.import_module(module.name)).values():
            is_settings = isinstance(value, type) and value.__module__ == module.name and "Config" in value.__name__
            if is_settings and dataclasses.is_dataclass(value):
                hints = typing.get_type_hints(value)
                found += [(value, name) for name, hint in hints.items() if float in (hint, *typing.get_args(hint))]
    return found


REQUIRED = {
    "RQTransformerConfig": {"code_shape": (2, 2, 2), "code_dim": 4, "codebook_size": 8, "embed_dim": 8},
    "TransformerConfig": {"layers": 1, "heads": 2},
}


def test_floats_of_every_settings_class_are_known() -> None:
    classes = {cls.__name__ for cls, _ in float_settings()}
    assert {"OptimizerConfig", "LoopConfig", "PriorConfig", "VARPriorConfig", "RQVAEConfig", "VARConfig"} <= classes
    assert {"QuantizerConfig", "MultiScaleConfig", "MultiScaleVQVAEConfig", "DataConfig", "SamplingConfig"} <= classes
    assert {"RQTransformerConfig", "TransformerConfig"} <= classes


@pytest.mark.parametrize(("cls", "name"), float_settings(), ids=lambda value: getattr(value, "__name__", value))
def test_a_float_that_is_nan_or_infinite_is_refused_by_name(cls: type, name: str) -> None:
    required = REQUIRED.get(cls.__name__, {})
    cls(**required)
    for value in (float("nan"), float("inf"), -float("inf"), np.float32("nan")):
        with pytest.raises(ValueError, match=rf"^{name}: expected a finite number, got (nan|-?inf)"):
            cls(**{**required, name: value})
