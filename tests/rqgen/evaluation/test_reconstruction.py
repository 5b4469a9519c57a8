"""Reconstruction error and code usage over a dataset."""

import pytest
import tiny
import torch

from rqgen.data import TensorItems
from rqgen.evaluation import evaluate_reconstruction


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return tiny.rqvae(base_channels=4, z_channels=8, norm_groups=2, quantizer={"codebook_size": 16}).train()


def test_it_equals_the_plain_definition_for_any_batch_size(vae):
    generator = torch.Generator().manual_seed(3)
    images = TensorItems(torch.rand(7, 1, 8, 8, generator=generator) * 2 - 1, torch.zeros(7, dtype=torch.int64))
    quality = evaluate_reconstruction(vae, images, batch_size=3)
    vae.eval()
    codes = vae.encode(images.inputs)
    assert quality.mse == pytest.approx((vae.decode(codes) - images.inputs).square().mean().item(), rel=1e-5)
    for d in range(2):
        counts = torch.tensor([(codes[..., d] == k).sum() for k in range(16)])
        assert torch.equal(quality.code_counts[d], counts)
        assert quality.codes_used[d] == len(codes[..., d].unique())
        share = counts[counts > 0] / counts.sum()
        assert quality.perplexity[d] == pytest.approx((-(share * share.log()).sum()).exp().item(), rel=1e-5)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_have_images(vae, batch_size):
    images = TensorItems(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"batch_size: expected an integer >= 1, got {batch_size}"):
        evaluate_reconstruction(vae, images, batch_size=batch_size)


def test_nothing_to_evaluate(vae):
    with pytest.raises(ValueError, match="empty dataset"):
        evaluate_reconstruction(vae, TensorItems(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)))


def test_the_mode_is_kept(vae):
    images = TensorItems(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    evaluate_reconstruction(vae, images)
    assert all(module.training for module in vae.modules())


def test_a_model_of_another_kind_is_named(vae):
    images = TensorItems(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="vae: expected Tokenizer, got RQTransformer"):
        evaluate_reconstruction(tiny.rq_prior(vae), images)


def test_weights_that_are_not_finite_give_no_number(vae):
    images = TensorItems(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="vae: expected decoded images that are finite"):
        evaluate_reconstruction(vae, images)
    with torch.no_grad():
        vae.to_latents.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="images: expected finite latents, got NaN or infinity in those of image 0"):
        evaluate_reconstruction(vae, images)
