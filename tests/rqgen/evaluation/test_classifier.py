"""Classifier of samples."""

import pytest
import torch

from rqgen.data import DataConfig, open_dataset
from rqgen.evaluation import ImageClassifier


@pytest.fixture(scope="module")
def digits():
    return open_dataset(DataConfig(), "train"), open_dataset(DataConfig(), "held_out")


def test_held_out_digits_are_recognised_and_noise_is_not(digits):
    train, held_out = digits
    judge = ImageClassifier().fit(train.images, train.labels)
    assert judge.accuracy(held_out.images, held_out.labels) >= 0.97
    assert judge.accuracy(held_out.images, (held_out.labels + 1) % 10) < 0.03
    noise = torch.rand(200, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert judge.accuracy(noise, torch.arange(200) % 10) < 0.3


def test_it_is_the_machine_that_it_says_it_is(digits):
    from sklearn.svm import SVC

    train, held_out = digits
    averaged = [part.images.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)).flatten(1) for part in digits]
    expected = SVC(C=10).fit(averaged[0].numpy(), train.labels.numpy()).predict(averaged[1].numpy())
    judge = ImageClassifier().fit(train.images, train.labels)
    assert (judge.predict(held_out.images).numpy() == expected).mean() >= 0.995


def test_bad_input(digits):
    judge = ImageClassifier()
    images, labels = torch.zeros(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])
    with pytest.raises(RuntimeError, match="fitted first"):
        judge.predict(images)
    with pytest.raises(ValueError, match="two classes"):
        judge.fit(images, labels * 0)
    with pytest.raises(ValueError, match="labels: expected shape"):
        judge.fit(images, labels[:3])
    with pytest.raises(ValueError, match="multiples of 8"):
        judge.fit(torch.zeros(4, 1, 12, 8), labels)
    with pytest.raises(ValueError, match="images: expected"):
        judge.fit(images[:0], labels[:0])


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"side": 0}, ValueError, "side: expected an integer >= 1, got 0"),
        ({"side": 2.5}, TypeError, "side: expected an integer, got 2.5"),
        ({"penalty": 0.0}, ValueError, "penalty: expected a number > 0, got 0.0"),
        ({"penalty": float("nan")}, ValueError, "penalty: expected a finite number"),
    ],
)
def test_bad_settings(settings, error, words):
    with pytest.raises(error, match=words):
        ImageClassifier(**settings)


def test_bad_images_and_labels():
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    fitted = ImageClassifier().fit(images, labels)
    with pytest.raises(ValueError, match=r"images: expected numbers in \[-1, 1\], got NaN or infinity"):
        fitted.predict(images * float("nan"))
    with pytest.raises(ValueError, match="images: expected 1 channels, as in training, got 3"):
        fitted.predict(images.expand(-1, 3, -1, -1))
    with pytest.raises(TypeError, match=r"labels: expected int64, got torch\.float32"):
        ImageClassifier().fit(images, labels.float())
    with pytest.raises(ValueError, match="labels: expected 0 <= label, got -1"):
        fitted.accuracy(images, labels - 1)


def test_tensors_without_values_and_lists_are_named():
    images, labels = torch.zeros(4, 1, 8, 8), torch.arange(4)
    machine = ImageClassifier().fit(images, labels)
    with pytest.raises(ValueError, match="images: expected a tensor with values, got one on the meta device"):
        machine.predict(images.to("meta"))
    with pytest.raises(TypeError, match="labels: expected a tensor, got list"):
        machine.accuracy(images, labels.tolist())
