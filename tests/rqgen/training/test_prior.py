"""Inputs that the prior's stage gives to the prior and to its loss."""

from dataclasses import replace

import pytest
import torch

import rqkernels
from rqgen.data import Batch, EncodedImages, TensorItems
from rqgen.evaluation import evaluate_reconstruction
from rqgen.models import SoftLabels, prior_loss
from rqgen.models.rqvae import RQVAE
from rqgen.models.transformer import TransformerConfig
from rqgen.quantizers import code_fingerprint
from rqgen.training import PriorConfig, PriorStage, encode_dataset, measure_tau, prior_data


def small(**settings):
    stack = TransformerConfig(layers=1, heads=2, residual_dropout=0.0)
    return PriorConfig(**{"embed_dim": 16, "spatial": stack, "depth": stack, "condition_dropout": 0.0} | settings)


@pytest.fixture
def vae(make_vae, images):
    vae = make_vae()
    vae.train()
    vae(images.inputs)
    return vae.eval()


def make_stage(config, vae, *, kind="images", tau=0.3):
    torch.manual_seed(1)
    return PriorStage(config.build(vae, 3), vae, config, kind=kind, tau=tau, seed=5)


def batch_of(images, start=0, count=6):
    return Batch(images.inputs[start : start + count], images.labels[start : start + count], start)


def watch_codes(stage):
    """Record every tensor of codes that the prior is called with."""
    seen = []
    stage.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    return seen


def loss_by_hand(stage, found, labels, soft):
    if not soft:
        return prior_loss(stage.model(found.codes, labels), codes=found.codes)
    return prior_loss(stage.model(found.codes, labels, SoftLabels(found.residuals, stage.model.codebooks, 0.3)))


def test_build_takes_shapes_and_codebooks_from_the_tokenizer(vae):
    prior = small().build(vae, 3)
    assert prior.config.code_shape == (4, 4, 2) and prior.config.codebook_size == 16
    assert torch.equal(prior.codebooks, vae.codebooks) and prior.config.condition_vocab_size == 3
    assert not prior.config.has_null_condition
    assert small(condition_dropout=0.1).build(vae, 3).config.has_null_condition
    assert small(condition="none").build(vae, 0).config.condition == "none"
    with pytest.raises(ValueError, match="condition: 'class' needs images with classes"):
        small().build(vae, 0)
    with pytest.raises(ValueError, match="expected one of 90M"):
        small(preset="3M").build(vae, 3)


@pytest.mark.parametrize("soft", [True, False])
def test_stochastic_codes_and_their_labels_come_from_one_search(soft, vae, images):
    stage = make_stage(small(soft_labels=soft), vae)
    seen = watch_codes(stage)
    batch = batch_of(images, start=6)
    result = stage.step(batch)
    found = rqkernels.reference.stochastic_residual_search(
        vae.encode_latents(batch.inputs), vae.codebooks, 2, tau=0.3, seed=5, offset=6 * 16, return_residuals=True
    )
    assert torch.equal(seen[0], found.codes)
    expected = loss_by_hand(stage, found, batch.labels, soft)
    assert torch.equal(result.loss, expected.total)
    assert torch.equal(torch.stack([result.terms["loss/depth_1"], result.terms["loss/depth_2"]]), expected.per_depth)
    stage.step(batch._replace(first_row=100))
    assert not torch.equal(seen[-1], found.codes)


@pytest.mark.parametrize("soft", [True, False])
def test_nearest_codes(soft, vae, images):
    stage = make_stage(small(soft_labels=soft, stochastic_codes=False), vae)
    seen = watch_codes(stage)
    batch = batch_of(images)
    result = stage.step(batch)
    found = rqkernels.residual_search(vae.encode_latents(batch.inputs), vae.codebooks, 2, return_residuals=True)
    assert torch.equal(seen[0], found.codes)
    expected = loss_by_hand(stage, found, batch.labels, soft)
    assert torch.equal(result.loss, expected.total)


def test_the_fused_classifier_saves_the_logits_and_without_it_the_gradient_takes_their_place(vae, images):
    outputs, results = [], []
    for fused in (True, False):
        stage = make_stage(small(fused_classifier=fused), vae)
        stage.model.register_forward_hook(lambda module, arguments, output: outputs.append(output))
        results.append((stage.step(batch_of(images)), stage.model))
    assert outputs[0].logits is None and outputs[1].code_loss is None
    (fused, fused_model), (whole, whole_model) = results
    torch.testing.assert_close(fused.loss, whole.loss)
    assert fused.terms.keys() == whole.terms.keys()
    for name, term in fused.terms.items():
        torch.testing.assert_close(term, whole.terms[name])
    fused.loss.backward()
    whole.loss.backward()
    for parameter, expected in zip(fused_model.parameters(), whole_model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6)
    # Rows of a gradient sum to zero, those of logits do not.
    assert outputs[1].logits.sum(-1).abs().max() < 1e-6


def test_images_latents_and_codes_give_the_same_step(vae, images):
    config = small(soft_labels=False, stochastic_codes=False)
    latents, labels = encode_dataset(vae, images, batch_size=10, codes=False)
    codes, _ = encode_dataset(vae, images, batch_size=10, codes=True)
    losses = []
    for kind, inputs in (("images", images.inputs), ("latents", latents), ("codes", codes)):
        stage = make_stage(config, vae, kind=kind, tau=None)
        losses.append(stage.step(Batch(inputs[:6], labels[:6], 0)).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[1] == pytest.approx(losses[2], abs=1e-5)


def test_gradients_reach_the_prior_alone(vae, images):
    stage = make_stage(small(), vae)
    stage.step(batch_of(images)).loss.backward()
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert stage.model.classifier.weight.grad.abs().sum() > 0


def test_prepared_data(vae, images):
    cached = prior_data(small(), vae, images, batch_size=10)
    latents = vae.encode_latents(images.inputs).detach()
    assert cached.kind == "latents" and torch.allclose(cached.items.inputs, latents, atol=1e-5)
    assert torch.equal(cached.items.labels, images.labels)
    norms = rqkernels.residual_search(latents, vae.codebooks, 2).residual_sq_norms[..., -1]
    assert cached.tau == pytest.approx(0.5 * norms.mean().item(), rel=1e-4)
    fresh = prior_data(small(cache_latents=False), vae, images, batch_size=10)
    assert fresh.items is images and fresh.kind == "images" and fresh.tau == pytest.approx(cached.tau)
    images.varies = True
    with pytest.raises(ValueError, match=r"prior\.cache_latents"):
        prior_data(small(), vae, images, batch_size=10)
    assert prior_data(small(cache_latents=False), vae, images, batch_size=10).kind == "images"
    images.varies = False
    assert prior_data(small(tau=0.7), vae, images, batch_size=10).tau == 0.7
    hard = small(soft_labels=False, stochastic_codes=False)
    assert prior_data(hard, vae, images, batch_size=10).tau is None
    with pytest.raises(ValueError, match="tau: cannot be measured"):
        measure_tau(vae, vae.codebooks[:1, None, None] + vae.codebooks[:1, None, None].clone() * float("nan"))


def test_codes_on_disk_must_fit(vae, images):
    codes, labels = encode_dataset(vae, images, batch_size=10, codes=True)
    encoded = EncodedImages(codes, labels, 16, code_fingerprint(vae.codebooks), ("a", "b", "c"), {})
    config = small(soft_labels=False, stochastic_codes=False)
    prepared = prior_data(config, vae, encoded, batch_size=4)
    assert prepared.kind == "codes" and torch.equal(prepared.items.inputs, codes)
    with pytest.raises(ValueError, match=r"codes on disk have no residuals: set prior\.soft_labels=false"):
        prior_data(small(), vae, encoded, batch_size=4)
    with pytest.raises(ValueError, match="written by another tokenizer"):
        prior_data(config, vae, replace(encoded, codebook_id="other"), batch_size=4)
    with pytest.raises(ValueError, match="codes: expected 4x4x2 codes, as the tokenizer has, got 4x4x1 codes"):
        prior_data(config, vae, replace(encoded, codes=codes[..., :1]), batch_size=4)


def test_bad_settings(vae):
    with pytest.raises(ValueError, match="tau"):
        PriorConfig(tau=0)
    with pytest.raises(ValueError, match="condition_dropout"):
        PriorConfig(condition_dropout=1)
    with pytest.raises(ValueError, match="tau: expected a positive number, got None"):
        make_stage(small(), vae, tau=None)
    with pytest.raises(ValueError, match="kind: expected 'images', 'latents' or 'codes', got 'latent'"):
        make_stage(small(), vae, kind="latent")
    with pytest.raises(ValueError, match="latents: expected those of at least one image, got none"):
        measure_tau(vae, torch.zeros(0, 4, 4, 4))
    with pytest.raises(ValueError, match="kind: soft labels and stochastic codes need 'images' or 'latents'"):
        make_stage(small(), vae, kind="codes")
    maps = EncodedImages([torch.zeros(2, 1, 1, dtype=torch.int64)], torch.zeros(2, dtype=torch.int64), 16, "", (), {})
    with pytest.raises(ValueError, match="codes: expected 4x4x2 codes, as the tokenizer has, got token maps of 1x1"):
        prior_data(small(soft_labels=False, stochastic_codes=False), vae, maps, batch_size=4)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
        ({"batch_size": -1}, ValueError, "batch_size: expected an integer >= 1, got -1"),
        ({"batch_size": "8"}, TypeError, "batch_size: expected an integer, got '8'"),
        ({"count": 0}, ValueError, r"count: expected an integer in \[1, 24\], got 0"),
        ({"count": 25}, ValueError, r"count: expected an integer in \[1, 24\], got 25"),
    ],
)
def test_bad_numbers_of_images_to_encode(vae, images, settings, error, words):
    with pytest.raises(error, match=words):
        encode_dataset(vae, images, codes=True, **{"batch_size": 10, **settings})
    nothing = TensorItems(images.inputs[:0], images.labels[:0])
    with pytest.raises(ValueError, match="images: expected at least one, got an empty dataset"):
        encode_dataset(vae, nothing, batch_size=10, codes=False)


def test_a_large_dataset_is_encoded_with_a_packed_codebook(vae_config, images, searched):
    torch.manual_seed(0)
    vae = RQVAE(replace(vae_config, embed_dim=32, quantizer=replace(vae_config.quantizer, codebook_size=128))).eval()
    many = TensorItems(images.inputs.repeat(3, 1, 1, 1), images.labels.repeat(3))
    plain = torch.cat([vae.encode(part) for part in many.inputs.split(10)])
    tau = measure_tau(vae, vae.encode_latents(images.inputs))
    assert not any(isinstance(codebooks, rqkernels.PackedCodebook) for codebooks in searched)
    searched.clear()
    codes, _ = encode_dataset(vae, many, batch_size=10, codes=True)
    assert torch.equal(codes, plain)
    assert evaluate_reconstruction(vae, many).code_counts.sum() == codes.numel()
    latents = vae.encode_latents(images.inputs).repeat(3, 1, 1, 1)
    assert measure_tau(vae, latents) == pytest.approx(tau, rel=1e-5)
    kind = rqkernels.PackedCodebook if rqkernels.info()["cpu_capability"] == "avx512" else torch.Tensor
    assert len(searched) == 8 + 1 + 1 and all(isinstance(codebooks, kind) for codebooks in searched)
    # A few images of them are not worth it.
    searched.clear()
    encode_dataset(vae, images, batch_size=10, codes=True)
    assert all(isinstance(codebooks, torch.Tensor) for codebooks in searched)
