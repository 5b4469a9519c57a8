"""The judge of samples."""

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
