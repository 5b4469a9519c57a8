"""Folders that the first version wrote still load, and compute what it computed: tests/data/models_v1."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rqgen.models import RQVAE, VAR, MultiScaleVQVAE, RQTransformer, load_pretrained
from rqgen.sampling import generate

SAVED = Path(__file__).parents[2] / "data" / "models_v1"
EXPECTED = load_file(SAVED / "expected.safetensors")
SYSTEMS = {"rq": (RQVAE, RQTransformer), "var": (MultiScaleVQVAE, VAR)}


def flat(codes):
    return codes.flatten(1) if isinstance(codes, torch.Tensor) else torch.cat([m.flatten(1) for m in codes], dim=1)


def models(system):
    return tuple(load_pretrained(SAVED / system / part) for part in ("tokenizer", "prior"))


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("part", [0, 1], ids=["tokenizer", "prior"])
def test_the_state_dict_is_that_of_the_file(system, part):
    model = models(system)[part]
    assert type(model) is SYSTEMS[system][part]
    saved = load_file(SAVED / system / ("tokenizer", "prior")[part] / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.parametrize("system", SYSTEMS)
def test_codes_logits_and_samples_are_those_of_the_first_version(system):
    vae, prior = models(system)
    codes = vae.encode(EXPECTED["images"])
    assert torch.equal(flat(codes), EXPECTED[f"{system}.codes"].flatten(1).long())
    torch.testing.assert_close(vae.decode(codes), EXPECTED[f"{system}.reconstruction"])
    torch.testing.assert_close(prior(codes, torch.tensor([0, 1])).logits.detach(), EXPECTED[f"{system}.logits"])
    drawn = generate(prior, vae, [0, 1, 1], cfg_scale=1.0, seed=5)
    assert torch.equal(flat(drawn.codes), EXPECTED[f"{system}.sampled"].flatten(1).long())
    torch.testing.assert_close(drawn.images, EXPECTED[f"{system}.sampled_images"])


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_model_saved_again_holds_the_same(system, tmp_path):
    shutil.copytree(SAVED / system, tmp_path / system)
    for part, model in zip(("tokenizer", "prior"), models(system), strict=True):
        folder = tmp_path / system / part
        model.save_pretrained(folder)
        again = load_pretrained(folder)
        assert again.config == model.config
        assert all(
            torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
        )
