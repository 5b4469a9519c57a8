"""Token prediction by its definition, and power laws through points that are known to lie on one, or not."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rqgen.data import TensorItems
from rqgen.evaluation import evaluate_token_prediction, fit_power_law
from rqgen.models import VAR, MultiScaleVQVAE, MultiScaleVQVAEConfig, VARConfig
from rqgen.quantizers import MultiScaleConfig

SCALES = [1, 2, [2, 4]]


def make_tokenizer():
    return MultiScaleVQVAE(
        MultiScaleVQVAEConfig(
            image_channels=1,
            base_channels=4,
            channel_multipliers=[1, 2],
            num_res_blocks=1,
            attention=False,
            z_channels=4,
            norm_groups=2,
            quantizer=MultiScaleConfig(codebook_size=12, scales=SCALES, refinements=1),
        )
    ).eval()


@pytest.fixture
def models():
    """A tokenizer and a prior that drops out half of everything in training, away from an initialisation that lets
    nothing through."""
    vae = make_tokenizer()
    config = VARConfig(
        quantizer=vae.config.quantizer,
        code_dim=4,
        embed_dim=16,
        layers=2,
        heads=2,
        dropout=0.5,
        drop_path=0.5,
        num_classes=3,
        condition_dropout=0.5,
    )
    prior = VAR(config, vae.quantizer)
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return vae, prior


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


def test_what_cannot_be_evaluated_is_refused(models, images):
    vae, prior = models
    with pytest.raises(ValueError, match="empty dataset"):
        evaluate_token_prediction(prior, vae, TensorItems(torch.zeros(0, 1, 4, 8), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(ValueError, match="vae: its codebooks are not the ones"):
        evaluate_token_prediction(prior, make_tokenizer(), images)


@pytest.mark.parametrize(("alpha", "beta"), [(-0.2, 2.5e-9), (-0.01, 6.5e-2), (0.3, 1e-5)])
def test_points_on_a_law_give_the_law_back(alpha, beta):
    sizes = [73_728 * d**3 for d in (1, 2, 3, 4, 6)]
    law = fit_power_law(sizes, [(beta * n) ** alpha for n in sizes])
    assert law.alpha == pytest.approx(alpha, rel=1e-9)
    assert law.log_beta == pytest.approx(math.log(beta), rel=1e-8)
    assert law.correlation == pytest.approx(math.copysign(1, alpha), abs=1e-12) and abs(law.correlation) <= 1


def test_scattered_points_give_least_squares_and_pearson():
    sizes, values = [1e5, 6e5, 2e6, 4.7e6, 1.6e7], [3.1, 2.6, 2.7, 2.4, 2.45]
    law = fit_power_law(sizes, values)
    slope, intercept = np.polyfit(np.log(sizes), np.log(values), 1)
    assert law.alpha == pytest.approx(slope) and law.alpha * law.log_beta == pytest.approx(intercept)
    assert law.correlation == pytest.approx(np.corrcoef(np.log(sizes), np.log(values))[0, 1])
    assert -0.95 < law.correlation < -0.8
    # The order of the models does not matter.
    assert fit_power_law(sizes[::-1], values[::-1]).alpha == pytest.approx(law.alpha)


@pytest.mark.parametrize(
    ("sizes", "values", "words"),
    [
        ([1, 2], [3, 2], r"sizes: a fit needs at least three different ones, got \[1, 2\]"),
        ([1, 2, 2], [3, 2, 1], "at least three different"),
        ([1, 2, 3], [3, 2], "values: expected one for each of 3 sizes, got 2"),
        ([1, 2, 3], [3, 2, 0.0], "values: a power law needs finite numbers above 0"),
        ([1, 2, 3], [3, 2, math.nan], "values: a power law needs finite"),
        ([0, 2, 3], [3, 2, 1], "sizes: a power law needs finite"),
        ([1, 2, 3], [0.5, 0.5, 0.5], "values: all are 0.5"),
        ([1, 2, 4], [3, 2, 3], "have no slope in log N"),
    ],
)
def test_no_law_is_made_up(sizes, values, words):
    with pytest.raises(ValueError, match=words):
        fit_power_law(sizes, values)
