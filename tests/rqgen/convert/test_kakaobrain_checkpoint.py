"""Files of the published layout: what is read, and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rqgen.convert import load_kakaobrain
from rqgen.convert.kakaobrain.checkpoint import read_checkpoint
from rqgen.models import RQVAE, RQTransformer

VAE = "rqvae-shared-8x8x4"
PRIOR = "rqtransformer-class"


@pytest.fixture
def vae(kakaobrain: Path, tmp_path: Path) -> Path:
    """A private copy of the published RQ-VAE's folder."""
    return Path(shutil.copytree(kakaobrain / VAE, tmp_path / VAE))


@pytest.fixture
def prior(kakaobrain: Path, tmp_path: Path) -> Path:
    """A private copy of the published prior's folder, alone: its tokenizer is not next to it."""
    return Path(shutil.copytree(kakaobrain / PRIOR, tmp_path / "alone" / PRIOR))


def content(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "model.pt", weights_only=True)


def rewrite(folder: Path, **changes: Any) -> None:
    torch.save({**content(folder), **changes}, folder / "model.pt")


def edit_config(folder: Path, section: str, **changes: Any) -> None:
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config[section] = {**(config.get(section) or {}), **changes}
    path.write_text(yaml.safe_dump(config))


# --- which tensors


def test_folder_file_and_both_layouts_of_torch(vae: Path) -> None:
    by_file = load_kakaobrain(str(vae / "model.pt"))
    by_folder = load_kakaobrain(vae)
    torch.save(content(vae), vae / "old.pt", _use_new_zipfile_serialization=False)
    old_layout = load_kakaobrain(vae / "old.pt")
    for name, tensor in by_file.state_dict().items():
        assert torch.equal(by_folder.state_dict()[name], tensor), name
        assert torch.equal(old_layout.state_dict()[name], tensor), name


def test_averaged_weights_on_request_only(vae: Path) -> None:
    state = content(vae)["state_dict"]
    averaged = {name: tensor + (1 if name == "quant_conv.bias" else 0) for name, tensor in state.items()}
    rewrite(vae, state_dict_ema=averaged, optimizer={"lr": 0.1}, epoch=7)
    assert torch.equal(load_kakaobrain(vae).to_latents.bias, state["quant_conv.bias"])
    assert torch.equal(load_kakaobrain(vae, ema=True).to_latents.bias, state["quant_conv.bias"] + 1)


def test_no_averaged_weights(vae: Path) -> None:
    assert content(vae)["state_dict_ema"] is None
    load_kakaobrain(vae)
    with pytest.raises(ValueError, match="'state_dict_ema' is None"):
        load_kakaobrain(vae, ema=True)
    without = {key: value for key, value in content(vae).items() if key != "state_dict_ema"}
    torch.save(without, vae / "model.pt")
    load_kakaobrain(vae)
    with pytest.raises(ValueError, match="expected a dictionary with the key 'state_dict_ema'"):
        load_kakaobrain(vae, ema=True)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"model": {}}, r"key 'state_dict', got \['model'\]"),
        ([1, 2], "key 'state_dict', got list"),
        ({"state_dict": {"epoch": 3}}, "'state_dict': expected tensors by name"),
        ({"state_dict": 3}, "'state_dict': expected tensors by name, got int"),
    ],
)
def test_other_contents_are_refused(vae: Path, saved: Any, message: str) -> None:
    torch.save(saved, vae / "model.pt")
    with pytest.raises(ValueError, match=message):
        load_kakaobrain(vae)


# --- pickles


class Attack:
    """A malicious pickle: calls something while it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(vae: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(vae)
    poisoned = {**content(vae), "scheduler": Attack()}
    torch.save(poisoned, vae / "model.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pt: refused"):
        load_kakaobrain(vae)
    assert not (vae / "attacked").exists()


@pytest.mark.parametrize("length", [0, 10, 5000, 200_000])
def test_a_damaged_file_is_refused(vae: Path, length: int) -> None:
    path = vae / "model.pt"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.pt: "):
        load_kakaobrain(vae)


def test_missing_files(vae: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"other\.pt"):
        load_kakaobrain(vae / "other.pt")
    (vae / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        load_kakaobrain(vae)


# --- config.yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not a readable YAML file"),
        ("- 1", "expected a mapping, got list"),
        ("dataset: {}", "expected a section `arch` with a `type`"),
        ("arch: {hparams: {}}", "expected a section `arch` with a `type`"),
        ("arch: {type: vit}", r"arch\.type: expected 'rq-vae' or 'rq-transformer', got 'vit'"),
        ("arch: {type: '${nowhere}'}", r"arch\.type: expected a value, got the interpolation '\$\{nowhere\}'"),
        ("arch: {type: rq-vae, x: [1, 'a${b}']}", r"arch\.x\[1\]: expected a value, got the interpolation 'a\$\{b\}'"),
        ("arch: {type: rq-transformer}\ndataset: {vocab_size: '${k}'}", r"dataset\.vocab_size: expected a value, got"),
        ("arch: {type: rq-transformer}\nvqvae: {ckpt: '${path}'}", r"vqvae\.ckpt: expected a value, got the interp"),
    ],
)
def test_wrong_configs(vae: Path, text: str, message: str) -> None:
    (vae / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.yaml: {message}"):
        load_kakaobrain(vae)


def test_what_is_not_read_may_hold_anything(vae: Path) -> None:
    edit_config(vae, "experiment", path="${oc.env:NOWHERE}")
    edit_config(vae, "dataset", root="${nowhere}")
    load_kakaobrain(vae)


def test_the_type_may_be_in_capitals(vae: Path) -> None:
    edit_config(vae, "arch", type="RQ-VAE")
    assert isinstance(load_kakaobrain(vae), RQVAE)


def test_a_priors_vocabulary_comes_from_the_dataset(prior: Path) -> None:
    assert read_checkpoint(prior).arch["vocab_size"] == 48
    edit_config(prior, "arch", vocab_size=7)
    assert read_checkpoint(prior).arch["vocab_size"] == 7


# --- a prior's tokenizer


def test_an_rqvae_takes_no_tokenizer(vae: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer: only a prior takes one"):
        load_kakaobrain(vae, tokenizer=vae)


def test_where_a_prior_finds_its_codebooks(kakaobrain: Path, vae: Path, prior: Path, tmp_path: Path) -> None:
    tokenizer = load_kakaobrain(vae)
    tokenizer.save_pretrained(tmp_path / "ours")
    priors = [
        load_kakaobrain(kakaobrain / PRIOR / "model.pt"),  # vqvae.ckpt, relative to the config
        load_kakaobrain(prior, tokenizer),
        load_kakaobrain(prior, vae),
        load_kakaobrain(prior, str(vae / "model.pt")),
        load_kakaobrain(prior, tmp_path / "ours"),
    ]
    for model in priors:
        assert isinstance(model, RQTransformer)
        assert not model.training
        assert torch.equal(model.codebooks, tokenizer.codebooks)
    tokenizer.codebooks.zero_()
    assert priors[1].codebooks.any()


def test_a_prior_without_its_tokenizer(prior: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"vqvae\.ckpt: no file .*give the RQ-VAE as `tokenizer`"):
        load_kakaobrain(prior)
    edit_config(prior, "vqvae", ckpt=None)
    with pytest.raises(ValueError, match=r"names none under vqvae\.ckpt"):
        load_kakaobrain(prior)


def test_a_prior_is_no_tokenizer(kakaobrain: Path, prior: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer: expected an RQ-VAE, but .* holds a prior"):
        load_kakaobrain(prior, tokenizer=kakaobrain / PRIOR)
