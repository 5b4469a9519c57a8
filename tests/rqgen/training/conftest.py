"""Models and data of a size that trains in a second."""

import pytest
import tiny
import torch

import rqkernels
from rqgen.data import TensorItems
from rqgen.models.rqvae import RQVAE


@pytest.fixture
def vae_config():
    quantizer = {"codebook_size": 16, "decay": 0.9, "usage_window": 128}
    return tiny.rqvae_config(base_channels=4, z_channels=8, dropout=0.1, norm_groups=2, quantizer=quantizer)


@pytest.fixture
def make_vae(vae_config):
    def make(seed=0):
        torch.manual_seed(seed)
        return RQVAE(vae_config)

    return make


@pytest.fixture
def searched(monkeypatch):
    """Record the codebooks of every search from here on."""
    seen, search = [], rqkernels.residual_search

    def watch(x, codebooks, *arguments, **keywords):
        seen.append(codebooks)
        return search(x, codebooks, *arguments, **keywords)

    monkeypatch.setattr(rqkernels, "residual_search", watch)
    return seen


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(24, 1, 2, 2, generator=generator) * 2 - 1
    return TensorItems(torch.nn.functional.interpolate(coarse, size=8), torch.arange(24) % 3)
