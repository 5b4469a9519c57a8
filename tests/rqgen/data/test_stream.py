"""The stream of batches: every item once per epoch, and the same batches from wherever it starts."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from rqgen.data import BatchStream, TensorItems
from rqgen.data.pictures import PictureError


@pytest.fixture
def items():
    return TensorItems(torch.arange(10.0)[:, None], torch.arange(10))


def test_each_epoch_is_a_new_permutation(items):
    batches = list(islice(BatchStream(items, 5, seed=3), 6))
    epochs = [torch.cat([batches[2 * e].labels, batches[2 * e + 1].labels]).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(10))
    assert [batch.first_row for batch in batches] == [0, 5, 10, 15, 20, 25]
    assert torch.equal(batches[0].inputs[:, 0].long(), batches[0].labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_starting_later_gives_the_same_batches(items, workers):
    whole = list(islice(BatchStream(items, 4, seed=3), 9))
    for start in (1, 2, 5):
        rest = islice(BatchStream(items, 4, seed=3, start=start, workers=workers), 9 - start)
        for expected, got in zip(whole[start:], rest, strict=True):
            assert torch.equal(expected.labels, got.labels) and expected.first_row == got.first_row
    other = next(iter(BatchStream(items, 4, seed=4)))
    assert not torch.equal(other.labels, whole[0].labels)


def test_reading_leaves_the_global_generator_alone(items):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(BatchStream(items, 4, seed=3)))
    assert torch.equal(before, torch.get_rng_state())


def test_bad_arguments(items):
    with pytest.raises(ValueError, match="batch_size: expected at most the 10 items"):
        BatchStream(items, 11, seed=0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        BatchStream(items, 0, seed=0)
    with pytest.raises(ValueError, match="labels"):
        TensorItems(torch.zeros(3, 1), torch.zeros(2))


class _Own(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class _Failing:
    def __init__(self, make):
        self._make = make

    def __len__(self):
        return 4

    def item(self, index, epoch):
        raise self._make()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: PictureError(Path("a.png"), "cut off"), PictureError, "a.png: not a readable image (cut off)"),
        (lambda: FileNotFoundError("image file not found: a.png"), FileNotFoundError, "image file not found: a.png"),
        (lambda: _Own("one", "two"), Exception, "one and two"),
    ],
)
def test_an_error_of_a_worker_is_that_of_the_item(workers, make, kind, message):
    with pytest.raises(kind) as caught:
        next(iter(BatchStream(_Failing(make), 2, seed=0, workers=workers)))
    assert str(caught.value) == message
