"""Every tensor that the published VAR computed for the fixture, and what its loader refuses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rqgen.convert import load_var
from rqgen.convert.var import PublishedVQVAE
from rqgen.models import VAR, MultiScaleVQVAE

FLOAT_TOLERANCE = 1e-4
IMAGE_TOLERANCE = 5e-4


class Case:
    """The published models, loaded, with what the published code computed from them."""

    def __init__(self, folder: Path) -> None:
        self.vae, self.var = load_var(folder / "vae.pth", folder / "var.pth", folder / "config.json")
        self.expected = load_file(folder / "expected.safetensors")

    def close(self, name: str, got: Tensor, tolerance: float = FLOAT_TOLERANCE) -> None:
        assert self.expected[name].shape == got.shape, name
        assert (self.expected[name] - got).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def case(published_var: Path) -> Case:
    return Case(published_var)


@pytest.fixture
def state_dicts(published_var: Path) -> dict[str, dict[str, Tensor]]:
    return {name: torch.load(published_var / f"{name}.pth", weights_only=True) for name in ("vae", "var")}


@torch.no_grad()
def test_tokenizer(case: Case) -> None:
    case.close("f", case.vae.encode_latents(case.expected["xs"]))
    codes = case.vae.encode(case.expected["xs"])
    for k, tokens in enumerate(codes):
        assert torch.equal(tokens.flatten(1), case.expected[f"idx_{k}"])
        case.close(f"fhat_{k}", case.vae.quantizer.decode(codes, k + 1))
        case.close(f"img_{k}", case.vae.decode_partial(codes, k + 1), IMAGE_TOLERANCE)
    case.close("img_3", case.vae.decode(codes), IMAGE_TOLERANCE)


@torch.no_grad()
def test_prior(case: Case) -> None:
    codes = case.vae.encode(case.expected["xs"])
    inputs = torch.cat([features.flatten(1, 2) for features in case.var.quantizer.next_inputs(codes)], dim=1)
    case.close("var_input", inputs)
    case.close("logits", case.var(codes, case.expected["labels"]).logits)


def test_both_come_back_in_eval_mode_and_survive_a_round_trip(case: Case, tmp_path: Path) -> None:
    assert not case.vae.training and not case.var.training
    case.vae.save_pretrained(tmp_path / "vae")
    case.var.save_pretrained(tmp_path / "var")
    vae = MultiScaleVQVAE.from_pretrained(tmp_path / "vae")
    var = VAR.from_pretrained(tmp_path / "var")
    codes = vae.encode(case.expected["xs"])
    assert all(torch.equal(a, b) for a, b in zip(codes, case.vae.encode(case.expected["xs"]), strict=True))
    case.close("logits", var(codes, case.expected["labels"]).logits.detach())


def test_config_as_a_mapping(published_var: Path) -> None:
    config = json.loads((published_var / "config.json").read_text())
    _, var = load_var(vae=published_var / "vae.pth", var=published_var / "var.pth", config=config)
    assert var.config.layers == 2 and var.config.quantizer.scales[-1] == [4, 4]


def test_without_a_config_the_published_sizes_are_expected(published_var: Path) -> None:
    # The fixture is smaller than what was published, so its tensors cannot fit; the depth is read from the weights.
    with pytest.raises(ValueError, match=r"vae\.pth: tensors do not fit the configuration: .*expected shape \(160, 3"):
        load_var(published_var / "vae.pth", published_var / "var.pth")


@pytest.mark.parametrize(
    ("settings", "refinements"),
    [
        ({}, 4),
        ({"share_quant_resi": 0}, 10),
        ({"share_quant_resi": 1}, 1),
        ({"share_quant_resi": 0, "default_qresi_counts": 3}, 3),
        ({"quant_resi": 0.0}, 0),
    ],
)
def test_how_refinements_are_shared(settings: dict[str, Any], refinements: int) -> None:
    assert PublishedVQVAE(**settings).config().quantizer.refinements == refinements


def test_a_negative_ratio_counts_as_its_size() -> None:
    assert PublishedVQVAE(quant_resi=-0.3).config().quantizer.refinement_ratio == 0.3


@pytest.mark.parametrize(
    ("model", "name", "change", "message"),
    [
        ("vae", "quant_conv.bias", None, "missing quant_conv.bias"),
        ("vae", "extra", torch.zeros(1), "unknown extra"),
        ("vae", "quantize.embedding.weight", torch.zeros(63, 16), r"expected shape \(64, 16\), got \(63, 16\)"),
        ("vae", "quantize.ema_vocab_hit_SV", torch.zeros(4, 63), "quantize.ema_vocab_hit_SV: expected shape"),
        ("var", "lvl_1L", torch.zeros(1, 30, dtype=torch.int64), "lvl_1L: not what the configuration implies"),
        ("var", "attn_bias_for_masking", torch.zeros(1, 1, 30, 30), "attn_bias_for_masking: not what"),
        ("var", "blocks.1.attn.zero_k_bias", torch.ones(128), "blocks.1.attn.zero_k_bias: not what"),
        ("var", "blocks.1.ada_lin.1.bias", None, "missing blocks.1.ada_lin.1.bias"),
        ("var", "pos_start", torch.zeros(1, 2, 128), "pos_start: expected shape"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    published_var: Path,
    state_dicts: dict[str, dict[str, Tensor]],
    tmp_path: Path,
    model: str,
    name: str,
    change: Tensor | None,
    message: str,
) -> None:
    tensors = state_dicts[model]
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change
    for which, content in state_dicts.items():
        torch.save(content, tmp_path / f"{which}.pth")
    with pytest.raises(ValueError, match=message):
        load_var(tmp_path / "vae.pth", tmp_path / "var.pth", published_var / "config.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vea": {}}, "config: expected the sections vae and var, got vea"),
        ({"vae": {"vocabsize": 3}}, "config: vae: .*vocabsize.*vocab_size"),
        ({"var": {"depth": "deep"}}, "config: var: wrong value at 'depth'"),
        ({"vae": {"v_patch_nums": [1, 2]}}, r"var.patch_nums: expected the tokenizer's v_patch_nums, \[1, 2\]"),
        ({"var": {"num_heads": 3}}, r"config: embed_dim: expected a multiple of heads, 3, got 1024"),
    ],
)
def test_bad_configurations_are_named(published_var: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_var(published_var / "vae.pth", published_var / "var.pth", config)


def test_bad_files(published_var: Path, tmp_path: Path) -> None:
    good = published_var / "vae.pth", published_var / "var.pth"
    with pytest.raises(FileNotFoundError, match="var: no file"):
        load_var(good[0], tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="config: no file"):
        load_var(*good, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_var(*good, tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        load_var(*good, tmp_path / "list.json")
    (tmp_path / "object.pth").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(ValueError, match="refused"):
        load_var(tmp_path / "object.pth", good[1])
    torch.save({"trainer": {"step": 1}}, tmp_path / "trainer.pth")
    with pytest.raises(ValueError, match=r"expected a state dict, tensors by name, got \['trainer'\]"):
        load_var(good[0], tmp_path / "trainer.pth")
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "headless.pth")
    with pytest.raises(ValueError, match="found none named blocks"):
        load_var(good[0], tmp_path / "headless.pth")
