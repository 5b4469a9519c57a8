"""Files that are no published checkpoint, or a damaged one: named, in one line, before memory is asked for."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from rqgen.convert import load_kakaobrain, load_var
from rqgen.convert.kakaobrain.checkpoint import read_checkpoint
from rqgen.convert.kakaobrain.rqtransformer import build_rqtransformer
from rqgen.convert.kakaobrain.rqvae import rqvae_config
from rqgen.models import RQVAE, load_pretrained
from rqgen.models.pickles import unpickle

VAE, PRIOR = "rqvae-shared-8x8x4", "rqtransformer-class"


@pytest.fixture
def vae(kakaobrain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kakaobrain / VAE, tmp_path / VAE))


@pytest.fixture
def prior(kakaobrain: Path, vae: Path) -> Path:
    """A published prior, with its tokenizer next to it."""
    return Path(shutil.copytree(kakaobrain / PRIOR, vae.parent / PRIOR))


@pytest.fixture
def var(published_var: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published_var, tmp_path / "var"))


def load_var_of(folder: Path) -> Any:
    return load_var(folder / "vae.pth", folder / "var.pth", folder / "config.json")


def refusal(call: Callable[[], Any]) -> str:
    """The one line with which a call refuses. Nothing else may be said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    shown = f"{caught.value.__cause__} {message}" if caught.value.__cause__ else message
    assert "weights_only" not in shown, "torch's advice to have the file's code executed"
    return message


# --- what the weights' file is


def write_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"),
        (b"\x80", "a file of 1 byte"),
        (b"<!doctype html><html>Access denied</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "a Git LFS pointer"),
        (b'{"state_dict": {}}', "a JSON file"),
        (write_safetensors, "a safetensors file"),
        (pickle.dumps({"state_dict": {}}), "a Python pickle that torch.save did not write"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "a"), "a zip archive, but no torch checkpoint"),
    ],
)
def test_foreign_weights_are_named(vae: Path, var: Path, content: Any, kind: str) -> None:
    for path, call in (
        (vae / "model.pt", lambda: load_kakaobrain(vae)),
        (var / "vae.pth", lambda: load_var_of(var)),
        (var / "var.pth", lambda: load_var_of(var)),
    ):
        good = path.read_bytes()
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
        message = refusal(call)
        assert message.startswith(f"{path}: not a readable torch checkpoint: it is {kind}")
        path.write_bytes(good)


def test_a_folder_in_the_place_of_a_file(var: Path) -> None:
    message = refusal(lambda: load_var(var, var / "var.pth"))
    assert message == f"vae: no file {var}: it is a folder"


class Settings:
    """A class of somebody else's training code."""


@pytest.mark.parametrize("zipped", [True, False])
def test_classes_are_named(vae: Path, zipped: bool) -> None:
    content = torch.load(vae / "model.pt", weights_only=True)
    content["hparams"], content["model"] = Settings(), torch.nn.Linear(1, 1)
    torch.save(content, vae / "model.pt", _use_new_zipfile_serialization=zipped)
    message = refusal(lambda: load_kakaobrain(vae))
    assert f"{vae / 'model.pt'}: refused: it holds objects of " in message
    assert f"{__name__}.Settings" in message and "torch.nn.modules.linear.Linear" in message
    assert "could execute code" in message
    assert "OrderedDict" not in message and "_rebuild" not in message


def test_classes_of_a_newer_pickle_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": Settings(), "path": Path("x")}))
    message = refusal(lambda: unpickle(tmp_path / "a.pt"))
    assert f"{__name__}.Settings" in message and "pathlib" in message


# --- damage that torch reads over


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_bit_in_the_weights_is_found(vae: Path) -> None:
    path = vae / "model.pt"
    weight = torch.load(path, weights_only=True)["state_dict"]["quant_conv.weight"]
    flip(path, path.read_bytes().index(weight.numpy().tobytes()) + 5)
    assert not torch.equal(torch.load(path, weights_only=True)["state_dict"]["quant_conv.weight"], weight)
    message = refusal(lambda: load_kakaobrain(vae))
    assert message.startswith(f"{path}: not a readable torch checkpoint: it is a torch checkpoint (")
    assert "is damaged: Bad CRC-32" in message


def test_a_checkpoint_without_checksums_is_read(vae: Path) -> None:
    content = torch.load(vae / "model.pt", weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, vae / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert isinstance(load_kakaobrain(vae), RQVAE)


def test_a_checkpoint_that_was_zipped_anew_is_read(vae: Path) -> None:
    """torch, asked to map such a file into memory, takes compressed bytes for numbers."""
    expected = load_kakaobrain(vae).state_dict()
    with zipfile.ZipFile(vae / "model.pt") as archive, zipfile.ZipFile(vae / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for name in archive.namelist():
            new.writestr(name, archive.read(name))
    (vae / "new").replace(vae / "model.pt")
    for name, tensor in load_kakaobrain(vae).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# --- which tensors


def change(path: Path, name: str, tensor: Any) -> None:
    content = torch.load(path, weights_only=True)
    (content.get("state_dict") or content)[name] = tensor
    torch.save(content, path)


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        (torch.full((4,), torch.nan), "NaN or infinity among its numbers"),
        (torch.full((4,), 1e300, dtype=torch.float64), "NaN or infinity among its numbers"),
        (torch.zeros(1).expand(10**12), "shape (1000000000000,) is more than the whole file holds"),
        (torch.eye(4).to_sparse(), "expected a dense tensor, got torch.sparse_coo"),
        (torch.zeros(4, device="meta"), "expected a dense tensor, got torch.strided torch.float32 on meta"),
        ("text", "expected tensors by name, got str"),
    ],
)
def test_tensors_that_are_none(vae: Path, tensor: Any, fault: str) -> None:
    change(vae / "model.pt", "quant_conv.bias", tensor)
    with pytest.raises(ValueError) as caught:
        load_kakaobrain(vae)
    message = str(caught.value)
    assert message.startswith(f"{vae / 'model.pt'}: 'state_dict': ") and fault in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers(vae: Path, prior: Path, var: Path, dtype: torch.dtype) -> None:
    for path, name, call in (
        (vae / "model.pt", "quant_conv.bias", lambda: load_kakaobrain(vae)),
        (prior / "model.pt", "classifier.linear.bias", lambda: load_kakaobrain(prior)),
        (var / "vae.pth", "quant_conv.bias", lambda: load_var_of(var)),
        (var / "var.pth", "head.bias", lambda: load_var_of(var)),
    ):
        good = path.read_bytes()
        content = torch.load(path, weights_only=True)
        change(path, name, (content.get("state_dict") or content)[name].to(dtype))
        assert f"{name}: expected floating-point numbers, got {dtype}" in refusal(call)
        path.write_bytes(good)


def renamed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("state_of", "found"),
    [
        (renamed("module."), "a model inside DataParallel"),
        (renamed("_orig_mod."), "a compiled model"),
        (lambda state: {"quantize.embedding.weight": torch.zeros(2, 2)}, "a VQ-GAN"),
        (lambda state: {"layer1.0.conv1.weight": torch.zeros(2, 2)}, "a ResNet"),
        (lambda state: {"model.diffusion_model.x": torch.zeros(2, 2)}, "a latent diffusion model"),
    ],
)
def test_the_state_dict_of_another_model(vae: Path, state_of: Any, found: str) -> None:
    state = torch.load(vae / "model.pt", weights_only=True)["state_dict"]
    torch.save({"state_dict": state_of(state)}, vae / "model.pt")
    message = refusal(lambda: load_kakaobrain(vae))
    assert message.startswith(f"{vae / 'model.pt'}: expected the tensors of kakaobrain's RQ-VAE, got those of {found}")


def test_files_in_each_others_place(vae: Path, prior: Path, var: Path) -> None:
    message = refusal(lambda: load_var(var / "var.pth", var / "vae.pth", var / "config.json"))
    assert message == f"{var / 'var.pth'}: expected the tensors of VAR's tokenizer, got those of a VAR"
    shutil.copyfile(vae / "model.pt", prior / "model.pt")
    message = refusal(lambda: load_kakaobrain(prior))
    assert message.endswith("expected the tensors of kakaobrain's RQ-Transformer, got those of kakaobrain's RQ-VAE")


def test_keys_that_are_no_names(vae: Path) -> None:
    torch.save({(1, 2): 1, 3: 4}, vae / "model.pt")
    assert "expected a dictionary with the key 'state_dict', got dict" in refusal(lambda: load_kakaobrain(vae))
    torch.save({"state_dict": {3: torch.zeros(1), "a": torch.zeros(1)}}, vae / "model.pt")
    assert "expected tensors by name" in refusal(lambda: load_kakaobrain(vae))


def test_blocks_with_a_gap(var: Path) -> None:
    state = torch.load(var / "var.pth", weights_only=True)
    state[f"blocks.{10**9}.attn.mat_qkv.weight"] = torch.zeros(1)
    torch.save(OrderedDict(state), var / "var.pth")
    message = refusal(lambda: load_var(var / "vae.pth", var / "var.pth"))
    assert message == f"{var / 'var.pth'}: of 3 blocks, those named blocks.2 are missing"


# --- config.yaml


def write_config(folder: Path, *keys: str, value: Any) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    section = config
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


WRONG = ("many", [1], {"a": 1}, None, True, 1.5, -1, 0, "", [[]], [True], ["x"])
RQVAE_OPTIONS = {
    "hparams": "bottleneck_type embed_dim n_embed latent_shape code_shape shared_codebook decay restart_unused_codes "
    "loss_type latent_loss_weight",
    "ddconfig": "double_z z_channels resolution in_channels out_ch ch ch_mult num_res_blocks attn_resolutions dropout "
    "resamp_with_conv",
}


@pytest.mark.parametrize("section", RQVAE_OPTIONS)
def test_every_option_of_an_rqvae_is_checked(kakaobrain: Path, section: str) -> None:
    """Any value of any type gives a configuration, or one line that names the option."""
    arch = yaml.safe_load((kakaobrain / VAE / "config.yaml").read_text())["arch"]
    for option in RQVAE_OPTIONS[section].split():
        named = 0
        for value in WRONG:
            changed = {**arch, section: {**arch[section], option: value}}
            try:
                rqvae_config(changed, where="config.yaml")
            except ValueError as error:
                assert str(error).startswith("config.yaml: ") and "\n" not in str(error)
                named += f"arch.{section}.{option}: " in str(error)
        assert named >= 7, option


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("ddconfig", "num_res_blocks", 10**6),
        ("ddconfig", "ch", 32 * 10**6),
        ("ddconfig", "ch_mult", [1] * 40),
        ("hparams", "n_embed", 10**12),
        ("hparams", "n_embed", 10**30),
        ("hparams", "code_shape", [8, 8, 10**9]),
        ("hparams", "latent_shape", [10**9, 10**9, 12]),
    ],
)
def test_an_rqvae_of_any_size_is_refused_before_it_is_made(vae: Path, section: str, option: str, value: Any) -> None:
    write_config(vae, "arch", section, option, value=value)
    assert refusal(lambda: load_kakaobrain(vae)).startswith(f"{vae / 'model.pt'} with config.yaml: ")


PRIOR_OPTIONS = {
    "": "embed_dim block_size input_embed_dim shared_tok_emb input_emb_vqvae vocab_size_cond block_size_cond body head",
    "body": "n_layer block",
    "head": "n_layer",
}


@pytest.mark.parametrize("section", PRIOR_OPTIONS)
def test_every_option_of_a_prior_is_checked(kakaobrain: Path, section: str) -> None:
    checkpoint = read_checkpoint(kakaobrain / PRIOR)
    codebooks = load_kakaobrain(kakaobrain / VAE).codebooks
    for option in PRIOR_OPTIONS[section].split():
        refused = 0
        for value in (*WRONG, 10**9, 10**30, [10**9] * 3):
            inner = {**(checkpoint.arch[section] if section else checkpoint.arch), option: value}
            arch = {**checkpoint.arch, section: inner} if section else inner
            try:
                build_rqtransformer(arch, checkpoint.state_dict, codebooks)
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
                refused += 1
        assert refused >= 10, option


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("dataset", [1], "dataset: expected a mapping, got [1]"),
        ("dataset", {"vocab_size": "many"}, "dataset.vocab_size: expected an integer, or one per depth, got 'many'"),
        ("vqvae", 5, "vqvae: expected a mapping, got 5"),
        ("vqvae", {"ckpt": [1]}, "vqvae.ckpt: expected a path, got [1]"),
        ("arch", [1], "expected a section `arch` with a `type`, got [1]"),
    ],
)
def test_sections_of_the_wrong_type(prior: Path, section: str, value: Any, message: str) -> None:
    write_config(prior, section, value=value)
    assert refusal(lambda: load_kakaobrain(prior)) == f"{prior / 'config.yaml'}: {message}"


@pytest.mark.parametrize("ckpt", ["model.pt", "", "."])
def test_a_prior_that_names_itself(prior: Path, ckpt: str) -> None:
    write_config(prior, "vqvae", "ckpt", value=ckpt)
    message = refusal(lambda: load_kakaobrain(prior))
    assert "expected an RQ-VAE" in message or "vqvae.ckpt: expected a path" in message


def test_a_config_that_is_none(vae: Path) -> None:
    for content, fault in (
        ("<!doctype html><html></html>", "not a readable YAML file: it is an HTML page"),
        ("[" * 5000, "nested more than 50 levels deep (line 1)"),
        ("a: [1\nb: 2", "not a readable YAML file: line 2: "),
    ):
        (vae / "config.yaml").write_text(content)
        message = refusal(lambda: load_kakaobrain(vae))
        assert message.startswith(f"{vae / 'config.yaml'}: {fault}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vae": [1]}, "vae: expected a mapping of arguments, got [1]"),
        ({"var": None}, "var: expected a mapping of arguments, got None"),
        ({"var": {"depth": 10**9}}, ""),
        ({"var": {"embed_dim": 10**6, "num_heads": 1}}, ""),
        ({"vae": {"vocab_size": 10**12}}, ""),
        ({"vae": {"v_patch_nums": [1, 10**5]}, "var": {"patch_nums": [1, 10**5]}}, ""),
    ],
)
def test_arguments_of_var(var: Path, config: dict[str, Any], message: str) -> None:
    good = json.loads((var / "config.json").read_text())
    merged = {
        name: {**good[name], **config[name]} if isinstance(config.get(name), dict) else config.get(name, good[name])
        for name in good
    }
    (var / "config.json").write_text(json.dumps(merged))
    assert message in refusal(lambda: load_var_of(var))


# --- our own format


def test_config_json_is_read_with_care(vae: Path, tmp_path: Path) -> None:
    load_kakaobrain(vae).save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    good = json.loads(path.read_text())
    for changes, message in (
        ({"model_type": []}, "expected model_type one of rqvae, multiscale_vqvae, rqtransformer, var"),
        ({"model_type": {"a": 1}}, "expected model_type one of"),
        ({"model_type": None}, "expected model_type one of"),
        ({"config": [1]}, "config: expected a JSON object, got list"),
        ({"config": None}, "config: expected a JSON object, got NoneType"),
        ({"format_version": [1]}, "expected format_version 1, got [1]"),
    ):
        path.write_text(json.dumps({**good, **changes}))
        told = refusal(lambda: load_pretrained(tmp_path / "ours"))
        assert told.startswith(f"{path}: {message}")
        assert "model_type" not in changes or told.endswith(f", got {changes['model_type']}")
    for text, kind in (("[" * 9999, "nested more than 100"), ("", "an empty file"), ("<html></html>", "an HTML page")):
        path.write_text(text)
        told = refusal(lambda: load_pretrained(tmp_path / "ours"))
        assert told.startswith(f"{path}: not valid JSON: ") and kind in told


def test_foreign_weights_in_our_format_are_named(vae: Path, tmp_path: Path) -> None:
    load_kakaobrain(vae).save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    shutil.copyfile(vae / "model.pt", path)
    message = refusal(lambda: load_pretrained(tmp_path / "ours"))
    assert message == f"{path}: not a readable safetensors file: it is a torch checkpoint"
