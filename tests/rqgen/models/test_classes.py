"""Classes by name and by number."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from rqgen import Pipeline
from rqgen.models import (
    VAR,
    MultiScaleVQVAEConfig,
    RQTransformer,
    RQVAEConfig,
    load_pretrained,
)
from rqgen.models.classes import class_label, names_of_classes


def rq_prior(names=(), classes=3, **settings):
    settings = {"condition_dropout": 0.0, "class_names": names, **settings}
    sizes = {"code_shape": (1, 1, 2), "codebook_size": 4, "code_dim": 2, "embed_dim": 4, "heads": 1}
    return RQTransformer(tiny.rq_prior_config(**sizes, num_classes=classes, **settings), torch.zeros(4, 2))


def var_prior(names=(), classes=3):
    sizes = {"code_dim": 2, "embed_dim": 4, "layers": 1, "heads": 1}
    quantizer = {"codebook_size": 4, "scales": [1, 2], "refinements": 1}
    return VAR(tiny.var_config(quantizer=quantizer, **sizes, num_classes=classes, class_names=names))


@pytest.fixture(params=[rq_prior, var_prior])
def make(request):
    return request.param


def test_names_travel_with_the_model(make, tmp_path):
    prior = make(["circle", "square", "Käse"])
    assert prior.config.class_names == ("circle", "square", "Käse") == names_of_classes(prior)
    prior.save_pretrained(tmp_path / "model")
    back = load_pretrained(tmp_path / "model")
    assert back.config == prior.config and names_of_classes(back) == ("circle", "square", "Käse")
    unnamed = make()
    assert unnamed.config.class_names == () and names_of_classes(unnamed) == ("0", "1", "2")
    # A model that was saved before there were names.
    unnamed.save_pretrained(tmp_path / "old")
    config = tmp_path / "old" / "config.json"
    text = config.read_text()
    assert '"class_names": []' in text
    old = text.replace(',\n    "class_names": []', "")
    assert old != text
    config.write_text(old)
    weights = tmp_path / "old" / "model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})  # nor a checksum
    assert load_pretrained(tmp_path / "old").config.class_names == ()


@pytest.mark.parametrize("config", [RQVAEConfig, MultiScaleVQVAEConfig])
def test_tokenizers_keep_names_of_any_number(config):
    assert config(class_names=["a", "b"]).class_names == ("a", "b")
    with pytest.raises(ValueError, match="class_names: expected names that differ from each other"):
        config(class_names=["a", "a"])


def test_names_that_a_pipeline_refuses():
    vae = tiny.rqvae()
    prior = tiny.rq_prior(vae, num_classes=3)
    for names, words in (("abc", "expected a list of names, got 'abc'"), ([1, 2, 3], "expected names as text, got 1")):
        with pytest.raises(ValueError, match=f"class_names: {words}"):
            Pipeline(vae, prior, class_names=names)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b"], "class_names: expected one for each of 3 classes, or none, got 2"),
        (["a", "b", "a"], "class_names: expected names that differ from each other"),
        (["a", "b", " "], "class_names: expected names that differ from each other"),
        (["a", "b", 3], r"class_names\[2\]: expected text, got 3"),
    ],
)
def test_names_that_are_none(make, names, words):
    with pytest.raises(TypeError if 3 in names else ValueError, match=words):
        make(names)
    with pytest.raises(ValueError, match="class_names: expected one for each of 0 classes"):
        rq_prior(["a"], classes=0, condition="none")


def labels(prior, *given):
    return [class_label(one, names_of_classes(prior), "--class") for one in given]


def test_a_class_by_name_or_number(make):
    prior = make(["circle", "square", "left turn"])
    assert labels(prior, "circle", "left turn", "0", "2", "01") == [0, 2, 0, 2, 1]
    assert labels(make(), "0", "2") == [0, 2]
    # Digits are called what their labels are.
    assert labels(make(["0", "1", "2"]), "0", "2") == [0, 2]
    # One letter, typed as two code points.
    assert labels(make(["Ka\u0308se", "K\u00f6ln", "x"]), "K\u00e4se", "Ko\u0308ln") == [0, 1]


def test_where_names_are_numbers_a_number_is_a_name(make):
    prior = make(["10", "2", "33"])  # sorted as text
    assert labels(prior, "10", "2", "33") == [0, 1, 2]
    for given in ("0", "1", "3", "02"):
        with pytest.raises(ValueError, match=rf"unknown class '{given}'; .*numbers as names here: a number is a name"):
            labels(prior, given)
    assert labels(make(["7", "2", "cat"]), "cat", "7") == [2, 0]
    with pytest.raises(ValueError, match="unknown class '1'"):
        labels(make(["7", "2", "cat"]), "1")


def test_numerals_name_digits(make):
    digits = make(["zero", "one", "two"])
    assert labels(digits, "one", "1", "0", "two") == [1, 1, 0, 2]
    with pytest.raises(ValueError, match=r"--class: expected 0\.\.2, got 3"):
        labels(digits, "3")
    chosen = make(["seven", "three", "one"])
    assert labels(chosen, "3", "seven", "1") == [1, 0, 2]
    with pytest.raises(ValueError, match=r"unknown class '0'; .*a number is a name"):
        labels(chosen, "0")
    # Where something else is among them, a number is a label.
    assert labels(make(["one", "two", "many"]), "1", "two") == [1, 1]


def test_unknown_classes(make):
    prior = make(["circle", "square", "7up"])
    for given, words in (
        ("cirle", "--class: unknown class 'cirle'; did you mean 'circle'?"),
        ("Circle", "--class: unknown class 'Circle'; did you mean 'circle'?"),
        ("zebra", "--class: unknown class 'zebra'; there are: circle, square, 7up"),
        ("", "--class: unknown class ''; there are"),
        ("1.0", "--class: unknown class '1.0'; there are"),
        ("\u0663", "--class: unknown class '\u0663'; there are"),
        ("3", r"--class: expected 0\.\.2, got 3"),
        ("-1", r"--class: expected 0\.\.2, got -1"),
    ):
        with pytest.raises(ValueError, match=words.replace("?", r"\?")):
            labels(prior, given)
    with pytest.raises(ValueError, match="--class: unknown class 'circle'; there are: 0, 1, 2"):
        labels(make(), "circle")
    unconditional = rq_prior(classes=0, condition="none")
    assert unconditional.num_classes == 0 and names_of_classes(unconditional) == ()
    tokens = rq_prior(condition="tokens", condition_length=2)
    for without in (unconditional, tokens):
        with pytest.raises(ValueError, match="--class: expected none, as this prior knows no classes, got '0'"):
            labels(without, "0")
