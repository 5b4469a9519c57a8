from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rqgen.files as files
import rqgen.models.pretrained as pretrained
from rqgen.models import PretrainedModel, load_pretrained


@dataclass
class ToyConfig:
    width: int = 3
    rate: float = 0.5


class Toy(PretrainedModel):
    model_type = "toy"
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.first = nn.Linear(config.width, config.width)
        self.tied = nn.Linear(config.width, config.width)
        self.tied.weight = self.first.weight
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("strided", torch.randn(4, config.width).t())


class Other(Toy):
    model_type = "other"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Toy(ToyConfig(width=4)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip(tmp_path: Path) -> None:
    model = Toy(ToyConfig(width=4, rate=0.25))
    model.save_pretrained(tmp_path / "deep" / "model")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["model"]
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = Toy.from_pretrained(str(tmp_path / "deep" / "model"))
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.first.weight is loaded.tied.weight
    assert loaded.device == torch.device("cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_folder_names_model_and_format(saved: Path) -> None:
    assert json.loads((saved / "config.json").read_text()) == {
        "model_type": "toy",
        "format_version": 1,
        "config": {"width": 4, "rate": 0.5},
    }


def test_an_existing_model_is_replaced(saved: Path) -> None:
    Toy(ToyConfig(width=2)).save_pretrained(saved)
    assert Toy.from_pretrained(saved).config.width == 2
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", ["write", "exchange", "rename"])
def test_a_failed_save_leaves_the_old_model(saved: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Toy.from_pretrained(saved).state_dict()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    if failing == "write":
        monkeypatch.setattr(pretrained, "save_file", fail)
    elif failing == "exchange":
        monkeypatch.setattr(files, "_exchange", fail)
    else:
        rename = os.rename
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
        monkeypatch.setattr(os, "rename", lambda p, to: fail() if ".rqgen-" in str(p) else rename(p, to))
    with pytest.raises(OSError, match="disk full"):
        Toy(ToyConfig(width=2)).save_pretrained(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["model"]
    for name, tensor in Toy.from_pretrained(saved).state_dict().items():
        assert torch.equal(before[name], tensor)


def test_a_failed_first_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pretrained, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        Toy(ToyConfig()).save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_is_not_overwritten(tmp_path: Path, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        Toy(ToyConfig()).save_pretrained(saved)
    assert Toy.from_pretrained(saved).config.width == 4
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder"):
        Toy(ToyConfig()).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("config", ['{"model_type": "vit", "hidden_size": 8}', "{", None])
def test_models_of_other_libraries_are_not_overwritten(saved: Path, config: str | None) -> None:
    """They have files of the same names."""
    if config is None:
        (saved / "config.json").unlink()
    else:
        (saved / "config.json").write_text(config)
    weights = (saved / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=f"{saved} holds a model that rqgen did not write, not replaced"):
        Toy(ToyConfig()).save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == weights


def change_dtype(model: Toy) -> None:
    model.double()


def add_an_adapter(model: Toy) -> None:
    model.adapter = torch.nn.Linear(2, 2)


def parametrize_a_layer(model: Toy) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.first)


def change_the_config(model: Toy) -> None:
    model.config.width = 5


def break_the_config(model: Toy) -> None:
    model.config.width = "wide"


def give_data_that_is_none(model: Toy) -> None:
    model.data = {"split": float("nan")}


def give_objects_as_data(model: Toy) -> None:
    model.data = {"split": object()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_dtype, "expected float32, float16 or bfloat16, got torch.float64"),
        (add_an_adapter, "2 tensors unknown: adapter.bias, adapter.weight"),
        (parametrize_a_layer, r"tensors unknown: first\.parametrizations"),
        (change_the_config, "shapes differ"),
        (break_the_config, "width"),
        (give_data_that_is_none, "data: expected a dictionary of plain data"),
        (give_objects_as_data, "data: expected a dictionary of plain data"),
    ],
)
def test_what_could_not_be_read_again_is_not_saved(saved: Path, change: Callable[[Toy], None], words: str) -> None:
    model = Toy.from_pretrained(saved)
    change(model)
    with pytest.raises(ValueError, match=f"not saved to {saved}.*{words}"):
        model.save_pretrained(saved)
    assert Toy.from_pretrained(saved).config == ToyConfig(width=4)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    Toy(ToyConfig()).save_pretrained(tmp_path / "model")
    assert Toy.from_pretrained(tmp_path / "model").config == ToyConfig()


def test_wrong_config_type() -> None:
    with pytest.raises(TypeError, match="config: expected ToyConfig, got dict"):
        Toy({"width": 3})  # type: ignore[arg-type]


def test_missing_files(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Toy.from_pretrained(tmp_path / "nowhere")
    for name in ("model.safetensors", "config.json"):
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            Toy.from_pretrained(saved)


def test_another_model_or_format(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: expected model_type 'other' for Other, got 'toy'"):
        Other.from_pretrained(saved)
    edit_config(saved, format_version=2)
    with pytest.raises(ValueError, match="expected format_version 1, got 2"):
        Toy.from_pretrained(saved)


@pytest.mark.parametrize("key", ["model_type", "format_version", "config"])
def test_config_without_a_key(saved: Path, key: str) -> None:
    description = json.loads((saved / "config.json").read_text())
    del description[key]
    (saved / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=key):
        Toy.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "expected a JSON object"), ("\xff", "not valid JSON")],
)
def test_damaged_config(saved: Path, text: str, message: str) -> None:
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        Toy.from_pretrained(saved)


def test_shapes_are_compared_before_memory_is_asked_for(saved: Path) -> None:
    edit_config(saved, config={"width": 10**8})  # 40 petabytes
    with pytest.raises(ValueError, match=r"model\.safetensors with config\.json: does not fit Toy: 5 shapes differ"):
        Toy.from_pretrained(saved)
    edit_config(saved, config={"width": 10**15})
    with pytest.raises(ValueError, match=r"config\.json: no model can be built of this config"):
        Toy.from_pretrained(saved)


class Deep(Toy):
    """A model with enough layers that building them would take hours."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(ToyConfig())
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(config.width))


def test_a_config_may_not_ask_for_more_parameters_than_there_are(saved: Path) -> None:
    edit_config(saved, config={"width": 10**9})
    with pytest.raises(ValueError, match=r"config\.json: .*a model of more than 10024 parameters, .* are 6 tensors"):
        Deep.from_pretrained(saved)
    # What counted the parameters is gone.
    assert len(list(Deep(ToyConfig(width=6000)).parameters())) == 12003


def test_unknown_setting_is_named_with_the_nearest(saved: Path) -> None:
    edit_config(saved, config={"widht": 4})
    with pytest.raises(ValueError, match=r"widht.*width"):
        Toy.from_pretrained(saved)


@pytest.mark.parametrize("length", [0, 5, 60])
def test_damaged_weights(saved: Path, length: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        Toy.from_pretrained(saved)


def test_tensors_that_do_not_fit_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    changed = {**tensors, "steps": torch.zeros(2, dtype=torch.int64), "extra": torch.zeros(1)}
    del changed["first.bias"]
    save_file(changed, path)
    with pytest.raises(ValueError) as caught:
        Toy.from_pretrained(saved)
    message = str(caught.value)
    assert "1 tensors missing: first.bias" in message
    assert "1 tensors unknown: extra" in message
    assert "steps: expected (), got (2,)" in message
    edit_config(saved, config={"width": 5})
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"first\.bias: expected \(5,\), got \(4,\)"):
        Toy.from_pretrained(saved)


# --- damage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_wrong_bit_is_found(saved: Path, name: str) -> None:
    path = saved / name
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{saved}/(config\.json|model\.safetensors)"):
            Toy.from_pretrained(saved)
    path.write_bytes(whole)
    assert Toy.from_pretrained(saved).config.width == 4


def test_what_was_changed_on_purpose_is_read_when_asked(saved: Path) -> None:
    edit_config(saved, config={"width": 4, "rate": 0.25})
    with pytest.raises(ValueError, match=r"model\.safetensors and config\.json: damaged, or changed since"):
        Toy.from_pretrained(saved)
    assert Toy.from_pretrained(saved, verify=False).config.rate == 0.25


def test_folders_of_versions_without_checksums_are_read(saved: Path) -> None:
    path = saved / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    edit_config(saved, config={"width": 4, "rate": 0.25})
    assert Toy.from_pretrained(saved).config.rate == 0.25


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("first.bias", torch.zeros(4, dtype=torch.float64), "first.bias: expected float32, float16 or bfloat16, got"),
        ("first.bias", torch.zeros(4, dtype=torch.int32), "first.bias: expected float32, float16 or bfloat16, got"),
        ("steps", torch.tensor(7.0), r"steps: expected torch\.int64, got torch\.float32"),
        ("steps", torch.tensor(7, dtype=torch.int32), r"steps: expected torch\.int64, got torch\.int32"),
        ("first.bias", torch.tensor([0, 1, float("nan"), 2]), "first.bias is not finite"),
        ("first.bias", torch.tensor([0, 1, float("-inf"), 2]), "first.bias is not finite"),
        ("first.bias", torch.full((4,), float("nan")), "first.bias is not finite"),
    ],
)
def test_tensors_of_a_wrong_kind_are_named(saved: Path, name: str, value: torch.Tensor, words: str) -> None:
    path = saved / "model.safetensors"
    save_file({**load_file(path), name: value}, path)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*: .*{words}"):
        Toy.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_come_back_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Toy(ToyConfig()).to(dtype)
    model.save_pretrained(tmp_path / "model")
    loaded = Toy.from_pretrained(tmp_path / "model")
    assert loaded.first.weight.dtype == torch.float32 and torch.equal(loaded.first.weight, model.first.weight.float())


def test_what_is_not_finite_is_not_saved(saved: Path) -> None:
    model = Toy(ToyConfig(width=2))
    with torch.no_grad():
        model.first.bias[1] = torch.inf
    with pytest.raises(ValueError, match=r"Toy: first\.bias is not finite, not saved"):
        model.save_pretrained(saved)
    assert Toy.from_pretrained(saved).config.width == 4


def test_what_is_given_later_may_wait(tmp_path: Path) -> None:
    class Waiting(Toy):
        given_later = frozenset({"strided"})

    model = Waiting(ToyConfig())
    model.strided.fill_(torch.nan)
    model.save_pretrained(tmp_path / "model")
    assert bool(Waiting.from_pretrained(tmp_path / "model").strided.isnan().all())
    model.strided[0, 0] = 1
    with pytest.raises(ValueError, match="strided is not finite"):
        model.save_pretrained(tmp_path / "model")


def test_a_model_larger_than_memory_is_refused_before_it_is_made(saved: Path) -> None:
    edit_config(saved, config={"width": 2**30})
    with pytest.raises(ValueError, match=r"model\.safetensors with config\.json: does not fit Toy: 5 shapes differ"):
        Toy.from_pretrained(saved)


@pytest.mark.parametrize("kind", ["folder", "pipe", "text", "html", "empty", "zip"])
def test_other_kinds_of_files_are_named(saved: Path, kind: str) -> None:
    for name in ("config.json", "model.safetensors"):
        path = saved / name
        whole = path.read_bytes()
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            contents = {"text": b"hello", "html": b"<!DOCTYPE html><html>", "empty": b"", "zip": b"PK\3\4" + b"\0" * 60}
            path.write_bytes(contents[kind])
        with pytest.raises((ValueError, FileNotFoundError), match=name.replace(".", r"\.")):
            Toy.from_pretrained(saved)
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": [], "format_version": 1, "config": {}}',
        '{"model_type": "toy", "format_version": "1", "config": {}}',
        '{"model_type": "toy", "format_version": true, "config": {}}',
        '{"model_type": "toy", "format_version": 1, "config": []}',
        '{"model_type": "toy", "format_version": 1, "config": null}',
        '{"model_type": "toy", "format_version": 1, "config": {"width": "x"}}',
        '{"model_type": "toy", "format_version": 1, "config": {"rate": NaN}}',
        '{"model_type": "toy", "format_version": 1, "config": ' + '{"width": ' * 5000 + "1" + "}" * 5001,
    ],
)
def test_configs_of_a_wrong_kind_are_named(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    for load in (Toy.from_pretrained, load_pretrained):
        with pytest.raises(ValueError, match=r"config\.json: "):
            load(saved)


# --- interruptions ---------------------------------------------------------------------------------------


def test_a_linked_folder_stays_a_link(saved: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(saved)
    Toy(ToyConfig(width=2)).save_pretrained(link)
    assert link.is_symlink() and Toy.from_pretrained(saved).config.width == Toy.from_pretrained(link).config.width == 2
    assert [p.name for p in link.parent.iterdir()] == ["link"]


def test_a_model_left_between_two_renames_is_read(saved: Path) -> None:
    saved.rename(saved.parent / ".model.previous")
    assert Toy.from_pretrained(saved).config.width == 4
    Toy(ToyConfig(width=2)).save_pretrained(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["model"] and Toy.from_pretrained(saved).config.width == 2


def test_a_full_disk_names_the_folder(saved: Path) -> None:
    code = (
        "import resource, signal, sys; from rqgen.models import MultiScaleVQVAE, MultiScaleVQVAEConfig\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "MultiScaleVQVAE(MultiScaleVQVAEConfig(base_channels=32)).save_pretrained(sys.argv[1])"
    )
    failed = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True)
    assert failed.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{saved}'"
    assert [p.name for p in saved.parent.iterdir()] == ["model"] and Toy.from_pretrained(saved).config.width == 4
