"""Every tensor that the published code computed for the RQ-VAE fixtures, and every option of its config."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from rqgen.convert import load_kakaobrain
from rqgen.convert.kakaobrain.rqvae import build_rqvae, rqvae_config
from rqgen.convert.published import published_name
from rqgen.models import RQVAE

FLOAT_TOLERANCE = 1e-4
IMAGE_TOLERANCE = 5e-4
FOLDERS = ["rqvae-shared-8x8x4", "rqvae-separate-4x4x3"]


class Case:
    """A published checkpoint, loaded, with what the published code computed from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = load_kakaobrain(folder / "model.pt")
        assert isinstance(model, RQVAE)
        self.model = model
        self.expected = load_file(folder / "expected.safetensors")

    def close(self, name: str, got: Tensor, tolerance: float = FLOAT_TOLERANCE) -> None:
        expected = self.expected[name]
        assert expected.numel() == got.numel() and expected.shape[-1] == (got.shape or (1,))[-1], name
        assert (expected.reshape(got.shape) - got).abs().max() <= tolerance, name

    def to_latent_shape(self, z: Tensor) -> Tensor:
        """(B, h, w, code_dim) to the published (B, H, W, embed_dim)."""
        down, across = self.model.config.patch_shape
        b, h, w, _ = z.shape
        patches = z.reshape(b, h, w, down, across, -1).permute(0, 1, 3, 2, 4, 5)
        return patches.reshape(b, h * down, w * across, -1)

    def to_code_shape(self, z: Tensor) -> Tensor:
        down, across = self.model.config.patch_shape
        b, height, width, _ = z.shape
        patches = z.reshape(b, height // down, down, width // across, across, -1).permute(0, 1, 3, 2, 4, 5)
        return patches.reshape(b, height // down, width // across, -1)


@pytest.fixture(scope="module", params=FOLDERS)
def case(request: pytest.FixtureRequest, kakaobrain: Path) -> Case:
    return Case(kakaobrain / request.param)


# --- the fixtures, tensor by tensor


def test_config(case: Case) -> None:
    config = case.model.config
    shared = "shared" in case.folder.name
    assert config.code_shape == ([8, 8, 4] if shared else [4, 4, 3])
    assert config.latent_shape == (8, 8, 12)
    assert config.code_dim == (12 if shared else 48)
    assert config.quantizer.shared_codebook is shared
    assert config.quantizer.ema_update == "per_depth"
    assert config.quantizer.restart_dead_codes is True
    assert config.attention_levels == [False, False, True]
    assert not case.model.training
    assert case.model.quantizer.initialized


@torch.no_grad()
def test_encoding(case: Case) -> None:
    latents = case.model.encode_latents(case.expected["xs"])
    case.close("z_e", case.to_latent_shape(latents))
    assert torch.equal(case.model.encode(case.expected["xs"]), case.expected["codes"])
    output = case.model.quantizer(latents)
    case.close("z_q", case.to_latent_shape(output.quantized))
    case.close("commit_loss", output.commitment_loss)


@torch.no_grad()
def test_reconstruction_and_losses(case: Case) -> None:
    loss = case.model.loss(case.expected["xs"])
    case.close("recon", loss.output.reconstruction, IMAGE_TOLERANCE)
    case.close("commit_loss", loss.commitment)
    case.close("loss_recon", loss.reconstruction)
    case.close("loss_total", loss.total)
    assert torch.equal(loss.output.codes, case.expected["codes"])


def test_decoding(case: Case) -> None:
    codes = case.expected["codes"]
    case.close("code_emb", case.model.quantizer.embed(codes))
    case.close("decoded", case.model.decode(codes), IMAGE_TOLERANCE)
    for i in range(case.model.depth):
        case.close(f"partial_add_{i}", case.model.decode_partial(codes, i + 1), IMAGE_TOLERANCE)


def test_soft_codes(case: Case) -> None:
    soft, codes = case.model.soft_codes(case.expected["xs"], 0.5)
    case.close("soft_codes", soft)
    assert torch.equal(codes, case.expected["soft_hard_codes"])


def test_codebook_averages_after_one_training_pass(case: Case, tmp_path: Path) -> None:
    """As published without restarts: the config alone decides, nothing is set by hand."""
    config = yaml.safe_load((case.folder / "config.yaml").read_text())
    config["arch"]["hparams"]["restart_unused_codes"] = False
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "model.pt").symlink_to(case.folder / "model.pt")
    quantizer = load_kakaobrain(tmp_path / "model.pt").quantizer.train()
    quantizer(case.to_code_shape(case.expected["z_e"]))
    shared = quantizer.config.shared_codebook
    checked = set()
    for d in range(1 if shared else quantizer.config.depth):
        weight = quantizer.codebook if shared else quantizer.codebook[d]
        padded = torch.cat([weight, torch.zeros(1, weight.shape[1])])
        case.close(f"ema_weight_{d}", padded)
        case.close(f"ema_cluster_{d}", quantizer.ema_count if shared else quantizer.ema_count[d])
        case.close(f"ema_embed_{d}", quantizer.ema_sum if shared else quantizer.ema_sum[d])
        checked |= {f"ema_weight_{d}", f"ema_cluster_{d}", f"ema_embed_{d}"}
    assert checked == {name for name in case.expected if name.startswith("ema_")}


def test_round_trip_through_our_format(case: Case, tmp_path: Path) -> None:
    case.model.save_pretrained(tmp_path / "model")
    loaded = RQVAE.from_pretrained(tmp_path / "model")
    assert loaded.config == case.model.config
    assert torch.equal(loaded.encode(case.expected["xs"]), case.expected["codes"])
    case.close("decoded", loaded.decode(case.expected["codes"]), IMAGE_TOLERANCE)


# --- options of other published configurations


def arch(**changes: Any) -> dict[str, Any]:
    """A small published `arch`; `section__option=value` changes it, `...=None` deletes the option."""
    options: dict[str, Any] = {
        "type": "rq-vae",
        "hparams": {
            "bottleneck_type": "rq",
            "embed_dim": 4,
            "n_embed": 8,
            "latent_shape": [4, 4, 4],
            "code_shape": [4, 4, 2],
            "shared_codebook": False,
            "decay": 0.9,
            "loss_type": "mse",
        },
        "ddconfig": {
            "double_z": False,
            "z_channels": 4,
            "resolution": 8,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
        },
    }
    for path, value in changes.items():
        *sections, name = path.split("__")
        place = options
        for section in sections:
            place = place[section]
        if value is None:
            del place[name]
        else:
            place[name] = value
    return options


def published_state(model: RQVAE) -> dict[str, Tensor]:
    """The published layout of our own tensors, written from the published code's side."""
    levels = len(model.config.channel_multipliers)
    state = {
        published_name(name, levels): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("quantizer.")
    }
    quantizer = model.quantizer
    shared = quantizer.config.shared_codebook
    for d in range(model.depth):
        book = quantizer.codebook if shared else quantizer.codebook[d]
        state[f"quantizer.codebooks.{d}.weight"] = torch.cat([book, torch.zeros(1, book.shape[1])])
        state[f"quantizer.codebooks.{d}.cluster_size_ema"] = quantizer.ema_count if shared else quantizer.ema_count[d]
        state[f"quantizer.codebooks.{d}.embed_ema"] = quantizer.ema_sum if shared else quantizer.ema_sum[d]
    return state


def test_published_defaults() -> None:
    options = arch(hparams__decay=None, hparams__loss_type=None, ddconfig__ch_mult=None, ddconfig__resolution=32)
    del options["hparams"]["n_embed"]
    options["ddconfig"]["resolution"] = 32
    config = rqvae_config(options, where="test")
    assert config.quantizer.decay == 0.99
    assert config.quantizer.codebook_size == 512
    assert config.quantizer.restart_dead_codes is False
    assert config.reconstruction_loss == "l1"
    assert config.commitment_weight == 0.25
    assert config.channel_multipliers == [1, 2, 4, 8]
    assert config.dropout == 0.0
    assert config.resample_with_conv is True
    assert config.gradient_checkpointing is False


def test_options_are_read() -> None:
    config = rqvae_config(
        arch(
            checkpointing=True,
            code_hier=1,
            ema=0.999,
            hparams__loss_type="l1",
            hparams__latent_loss_weight=0.5,
            hparams__restart_unused_codes=True,
            hparams__use_padding_idx=False,
            hparams__masked_dropout=0.0,
            hparams__shared_codebook=True,
            hparams__latent_shape=[4, 8, 4],
            hparams__code_shape=[2, 8, 2],
            ddconfig__dropout=0.2,
            ddconfig__num_res_blocks=3,
            ddconfig__attn_resolutions=[8, 4],
            ddconfig__resamp_with_conv=False,
            ddconfig__in_channels=1,
            ddconfig__out_ch=1,
            ddconfig__give_pre_end=False,
        ),
        where="test",
    )
    assert config.gradient_checkpointing is True
    assert config.reconstruction_loss == "l1"
    assert config.commitment_weight == 0.5
    assert config.quantizer.restart_dead_codes is True
    assert config.quantizer.shared_codebook is True
    assert config.image_shape == (8, 16)
    assert config.patch_shape == (2, 1)
    assert config.code_dim == 8
    assert config.dropout == 0.2
    assert config.num_res_blocks == 3
    assert config.attention_levels == [True, True]
    assert config.resample_with_conv is False
    assert config.image_channels == 1


def test_equal_values_per_depth_are_one_value() -> None:
    config = rqvae_config(arch(hparams__n_embed=[8, 8], hparams__decay=[0.5, 0.5]), where="test")
    assert config.quantizer.codebook_size == 8
    assert config.quantizer.decay == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hparams__n_embed": [8, 16]}, r"arch\.hparams\.n_embed: .*differ by depth.*\[8, 16\]"),
        ({"hparams__decay": [0.9]}, r"arch\.hparams\.decay: .*per depth \(2\), got \[0\.9\]"),
        (
            {"hparams__n_embed": [8, 8], "hparams__shared_codebook": True},
            r"arch\.hparams\.n_embed: a shared codebook takes one value",
        ),
        ({"hparams__bottleneck_type": "vq"}, r"arch\.hparams\.bottleneck_type: only 'rq' .*got 'vq'"),
        ({"hparams__loss_type": "huber"}, "reconstruction_loss: .*'huber'"),
        ({"hparams__embed_dim": 5}, r"arch\.hparams\.latent_shape: expected embed_dim, 5, last"),
        ({"hparams__code_shape": [3, 4, 2]}, r"code_shape: .*divide"),
        ({"hparams__code_shape": [4, 4]}, r"arch\.hparams\.code_shape: expected three integers"),
        ({"hparams__code_shape": None}, r"arch\.hparams\.code_shape: missing"),
        ({"hparams__surprise": 1}, r"arch\.hparams: unknown options \['surprise'\]"),
        ({"hparams__n_embed": "many"}, r"arch\.hparams\.n_embed: expected an integer, or one per depth, got 'many'"),
        ({"ddconfig__double_z": True}, r"arch\.ddconfig\.double_z: only False .*got True"),
        ({"ddconfig__double_z": None}, r"arch\.ddconfig\.double_z: only False .*got True"),
        ({"ddconfig__give_pre_end": True}, r"arch\.ddconfig\.give_pre_end"),
        ({"ddconfig__out_ch": 4}, r"arch\.ddconfig\.out_ch: only 3 .*got 4"),
        ({"ddconfig__ch": None}, r"arch\.ddconfig\.ch: missing"),
        ({"ddconfig__attn_type": "linear"}, r"arch\.ddconfig: unknown options \['attn_type'\]"),
        ({"surprise": 1}, r"arch: unknown options \['surprise'\]"),
        ({"ddconfig": "none"}, r"arch\.ddconfig: expected a mapping, got str"),
    ],
)
def test_refused_options_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^test: .*{message}"):
        rqvae_config(arch(**changes), where="test")


@pytest.mark.parametrize(
    "changes",
    [
        {"ddconfig__num_res_blocks": 2, "ddconfig__attn_resolutions": [8, 4]},
        {"ddconfig__resamp_with_conv": False, "hparams__shared_codebook": True},
        {"hparams__code_shape": [2, 4, 1], "ddconfig__ch_mult": [2, 1]},
    ],
)
def test_every_tensor_of_other_layouts_finds_its_place(changes: dict[str, Any]) -> None:
    options = arch(**changes)
    source = RQVAE(rqvae_config(options, where="test")).eval()
    loaded = build_rqvae(options, published_state(source), where="test").eval()
    for name, tensor in source.state_dict().items():
        if name != "quantizer.initialized":
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_published_decoder_counts_levels_from_the_finest() -> None:
    assert published_name("decoder.levels.0.blocks.1.conv1.weight", 3) == "decoder.up.2.block.1.conv1.weight"
    assert published_name("decoder.levels.1.resample.conv.bias", 3) == "decoder.up.1.upsample.conv.bias"
    assert published_name("encoder.levels.0.resample.conv.bias", 3) == "encoder.down.0.downsample.conv.bias"
    assert published_name("encoder.middle.1.output.weight", 3) == "encoder.mid.attn_1.proj_out.weight"
    assert published_name("encoder.conv_in.weight", 3) == "encoder.conv_in.weight"


def test_tensors_that_do_not_fit_are_named() -> None:
    options = arch()
    good = published_state(RQVAE(rqvae_config(options, where="test")))
    bad = {**good, "surprise.weight": torch.zeros(1), "quant_conv.bias": torch.zeros(7)}
    del bad["decoder.up.1.block.0.conv1.weight"]
    bad["quantizer.codebooks.1.weight"] = torch.zeros(8, 4)  # without the padding row
    with pytest.raises(ValueError, match=r"^test: tensors do not fit arch") as caught:
        build_rqvae(options, bad, where="test")
    message = str(caught.value)
    assert "unknown surprise.weight" in message
    assert "quant_conv.bias: expected shape (4,), got (7,)" in message
    assert "missing decoder.up.1.block.0.conv1.weight" in message
    assert "quantizer.codebooks.1.weight: expected shape (9, 4), got (8, 4)" in message
    with pytest.raises(ValueError, match=r"and [0-9]+ more"):
        build_rqvae(options, {}, where="test")


def test_a_shared_codebook_must_be_one() -> None:
    options = arch(hparams__shared_codebook=True)
    state = copy.deepcopy(published_state(RQVAE(rqvae_config(options, where="test"))))
    state["quantizer.codebooks.1.weight"][0] += 1
    with pytest.raises(ValueError, match=r"shared_codebook is set, but codebook differs at depths 0 and 1"):
        build_rqvae(options, state, where="test")
