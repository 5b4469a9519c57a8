"""Token prediction by its definition, for both systems."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from rqgen.data import TensorItems
from rqgen.evaluation import evaluate_token_prediction

SCALES = [1, 2, [2, 4]]


def make_tokenizer():
    quantizer = {"scales": SCALES, "refinements": 1}
    return tiny.multiscale_vqvae(base_channels=4, z_channels=4, norm_groups=2, quantizer=quantizer)


@pytest.fixture
def models():
    """Tokenizer, and prior with dropout 0.5 in training. Weights differ from the initialisation, whose output is 0."""
    vae = make_tokenizer()
    prior = tiny.var(vae, dropout=0.5, drop_path=0.5, condition_dropout=0.5)
    return vae, tiny.perturb_weights(prior, std=0.3)


@pytest.fixture
def images():
    return TensorItems(torch.rand(7, 1, 4, 8) * 2 - 1, torch.arange(7) % 3)


@pytest.mark.parametrize("batch_size", [1, 3, 128])
@torch.no_grad()
def test_it_equals_the_definition_for_any_batch_size(models, images, batch_size):
    vae, prior = models
    prior.train()
    found = evaluate_token_prediction(prior, vae, images, batch_size=batch_size)
    prior.eval()
    codes = vae.encode(images.inputs)
    logits = prior(codes, images.labels).logits.double()
    tokens = torch.cat([maps.flatten(1) for maps in codes], dim=1)
    nll = -logits.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
    wrong = (logits.argmax(-1) != tokens).double()
    assert tokens.shape == (7, 1 + 4 + 8)
    assert found.loss == pytest.approx(nll.mean().item(), rel=1e-5)
    assert found.last_scale_loss == pytest.approx(nll[:, 5:].mean().item(), rel=1e-5)
    assert found.error_rate == pytest.approx(wrong.mean().item(), abs=1e-12)
    assert found.last_scale_error_rate == pytest.approx(wrong[:, 5:].mean().item(), abs=1e-12)
    # These tell the label, and what is last, from what is not.
    assert found.loss != pytest.approx(F.cross_entropy(prior(codes, None).logits.mT, tokens).item(), rel=1e-4)
    assert found.loss != pytest.approx(found.last_scale_loss, rel=1e-4)


def test_modes_are_kept(models, images):
    vae, prior = models
    prior.train()
    evaluate_token_prediction(prior, vae, images)
    assert prior.training and not vae.training


def test_what_cannot_be_evaluated_is_refused(models, images):
    vae, prior = models
    with pytest.raises(TypeError, match="prior: expected Prior, got MultiScaleVQVAE"):
        evaluate_token_prediction(vae, prior, images)
    unreadable = TensorItems(images.inputs.index_fill(0, torch.tensor(4), torch.nan), images.labels)
    with pytest.raises(ValueError, match="images: expected finite latents, got NaN or infinity in those of image 4"):
        evaluate_token_prediction(prior, vae, unreadable, batch_size=3)
    with pytest.raises(ValueError, match="empty dataset"):
        evaluate_token_prediction(prior, vae, TensorItems(torch.zeros(0, 1, 4, 8), torch.zeros(0, dtype=torch.int64)))
    # A negative one gave losses of 0.
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size: expected an integer >= 1, got {batch_size}"):
            evaluate_token_prediction(prior, vae, images, batch_size=batch_size)
    # The batch that an image without a label was in decided which others lost theirs.
    some = TensorItems(images.inputs, torch.tensor([0, 1, 2, 0, 1, 2, -1]))
    for batch_size in (1, 3, 7):
        with pytest.raises(ValueError, match="images: expected labels of all of them or of none, got -1 for some"):
            evaluate_token_prediction(prior, vae, some, batch_size=batch_size)
    with pytest.raises(ValueError, match="vae: expected the codebooks that the prior was made with"):
        evaluate_token_prediction(prior, make_tokenizer(), images)


@pytest.fixture
def stacks():
    """An RQ-VAE of 2x2 positions of 3 codes, and a class-conditional prior."""
    vae = tiny.rqvae(resolution=4, base_channels=4, norm_groups=2, code_shape=[2, 2, 3])
    prior = tiny.rq_prior(vae, num_classes=3, condition_dropout=0.5)
    return vae, tiny.perturb_weights(prior, std=0.3)


@pytest.mark.parametrize("batch_size", [1, 3, 128])
@torch.no_grad()
def test_stacks_of_codes_are_told_by_depth(stacks, batch_size):
    vae, prior = stacks
    images = TensorItems(torch.rand(7, 1, 4, 4) * 2 - 1, torch.arange(7) % 3)
    prior.train()
    found = evaluate_token_prediction(prior, vae, images, batch_size=batch_size)
    prior.eval()
    codes = vae.encode(images.inputs)
    logits = prior(codes, images.labels).logits.double()
    nll = -logits.log_softmax(-1).gather(4, codes.unsqueeze(4)).squeeze(4)
    wrong = (logits.argmax(-1) != codes).double()
    assert found.loss == pytest.approx(nll.mean().item(), rel=1e-5)
    assert found.level_losses == pytest.approx(nll.mean((0, 1, 2)).tolist(), rel=1e-5)
    assert found.error_rate == pytest.approx(wrong.mean().item(), abs=1e-12)
    assert found.level_error_rates == pytest.approx(wrong.mean((0, 1, 2)).tolist(), abs=1e-12)
    assert len(set(found.level_losses)) == 3
    # Images without labels go with the null condition.
    unlabelled = TensorItems(images.inputs, torch.full((7,), -1))
    null = F.cross_entropy(prior(codes, None).logits.flatten(0, -2), codes.flatten()).item()
    assert evaluate_token_prediction(prior, vae, unlabelled).loss == pytest.approx(null, rel=1e-5) != found.loss
