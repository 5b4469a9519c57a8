"""The interface of every tokenizer and prior, by its definition."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from rqgen.models import PretrainedModel, Prior, Tokenizer, load_pretrained, prior_loss, var_loss
from rqgen.models.interfaces import level_means
from rqgen.quantizers import CodeLayout, code_fingerprint

SAVED = Path(__file__).parents[2] / "data" / "models_v1"
LABELS = torch.tensor([0, 1, 1, 0])


@pytest.fixture(params=["rq", "var"])
def models(request):
    return tuple(load_pretrained(SAVED / request.param / part) for part in ("tokenizer", "prior"))


@pytest.fixture
def images():
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1


def same(one, two):
    return all(map(torch.equal, *((part if isinstance(part, list) else [part]) for part in (one, two))))


def test_a_tokenizer_and_its_codes(models, images):
    vae, prior = models
    assert isinstance(vae, Tokenizer) and isinstance(prior, Prior)
    codes = vae.encode(images)
    assert vae.layout == prior.layout == CodeLayout.of(codes, 12) and vae.codebook_size == 12
    assert (vae.image_channels, vae.image_shape, vae.class_names) == (1, (8, 8), ())
    assert same(vae.encoder_for(10**6)(images), codes) and same(vae.encoder_for(1)(images), codes)
    assert torch.equal(vae.decode_partial(codes, vae.layout.levels), vae.decode(codes))
    assert not torch.equal(vae.decode_partial(codes, 1), vae.decode(codes))
    before = vae.fingerprint()
    assert before == code_fingerprint(*vae.code_tensors())
    with torch.no_grad():
        vae.code_tensors()[0].add_(1)
    assert vae.fingerprint() != before
    assert vae.last_layer is vae.decoder.conv_out.weight
    assert vae.usage.counts().shape == (vae.layout.levels, 12)


def test_how_codes_are_predicted(models, images):
    vae, prior = models
    codes = vae.encode(images)
    logits = prior(codes, LABELS).logits.flatten(1, -2)
    flat = prior.layout.flatten(codes)
    found = prior.code_losses(codes, LABELS)
    expected = -logits.double().log_softmax(-1).gather(-1, flat.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.nll.double(), expected)
    assert torch.equal(found.correct, logits.argmax(-1) == flat) and 0 < found.correct.sum() < found.correct.numel()


def test_the_loss_is_that_of_the_system_and_of_the_interface(models, images):
    vae, prior = models
    codes, loss = vae.encode(images), prior_loss if prior.layout.kind == "stacks" else var_loss
    output = prior(codes, LABELS)
    expected = loss(output, codes=codes)
    for found in (prior.loss(codes, LABELS), Prior.loss(prior, codes, LABELS)):
        torch.testing.assert_close(found.total, expected[0])
        torch.testing.assert_close(found.per_level, expected[2 if loss is prior_loss else 1])
        assert found.total.requires_grad and not found.per_level.requires_grad


def test_means_by_level():
    layout = CodeLayout.stacks((1, 2, 2), 4)
    assert level_means(layout, torch.tensor([[1.0, 10, 3, 30]])).tolist() == [2, 20]
    layout = CodeLayout.maps([[1, 1], [1, 2]], 4)
    assert level_means(layout, torch.tensor([[1.0, 10, 30], [3, 10, 30]])).tolist() == [2, 20]


def test_conditions_and_steps(models):
    _, prior = models
    assert (prior.condition_kind, prior.condition_size, prior.num_classes, prior.class_names) == ("class", 2, 2, ())
    assert prior.has_null_condition and prior.condition_ids(None, 3).tolist() == [[2]] * 3
    assert prior.levels == 3 and prior.steps == prior.layout.steps
    with pytest.raises(TypeError, match="vae: expected an"):
        prior.check_tokenizer(prior)


def test_a_tokenizer_without_what_a_system_need_not_have(models, images):
    vae, _ = models
    with pytest.raises(NotImplementedError, match=r"last_layer: a .* has no last convolution"):
        Tokenizer.last_layer.fget(vae)
    with pytest.raises(NotImplementedError, match=r"decode_vectors: a .* decodes codes alone"):
        Tokenizer.decode_vectors(vae, [])
    assert Tokenizer.usage.fget(vae) is None


def test_an_interface_that_is_not_implemented_is_named():
    class Half(Tokenizer):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Half(None)


def test_a_model_type_names_one_class():
    with pytest.raises(TypeError, match=r"model_type: 'rqvae' is that of rqgen.models.rqvae.RQVAE already"):

        class Other(PretrainedModel):
            model_type = "rqvae"

    assert type(load_pretrained(SAVED / "rq" / "tokenizer")).__name__ == "RQVAE"


def test_vectors_in_the_place_of_codes(images):
    vae = load_pretrained(SAVED / "var" / "tokenizer")
    codes = vae.encode(images)
    vectors = [F.embedding(tokens, vae.codebooks) for tokens in codes]
    torch.testing.assert_close(vae.decode_vectors(vectors).clamp(-1, 1), vae.decode(codes))
