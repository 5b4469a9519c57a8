"""The endless, resumable stream of training batches."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from rqgen.checks import check_within, checked_integers


class Batch(NamedTuple):
    """Inputs (B, ...) and labels int64 (B,), -1 for "no class". ``first_row`` counts the items that went
    before in the whole run: a random number keyed by it is never repeated."""

    inputs: torch.Tensor
    labels: torch.Tensor
    first_row: int


class Items(Protocol):
    """The source of a stream: an `rqgen.data.ImageDataset`, or anything else indexed the same way."""

    def __len__(self) -> int: ...

    def item(self, index: int, epoch: int) -> tuple[torch.Tensor, int]: ...


class TensorItems:
    """Items that lie in memory: inputs (N, ...) with labels (N,), integers, -1 for "no class"."""

    varies = False
    class_names: tuple[str, ...] = ()

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        labels = checked_integers(labels, "labels", 1, expected="integers (N,)")
        if len(inputs) != len(labels):
            raise ValueError(f"labels: expected one for each of {len(inputs)} inputs, got {len(labels)}")
        check_within(labels, "labels", "label", -1, None)
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def item(self, index: int, epoch: int) -> tuple[torch.Tensor, int]:
        return self.inputs[index], int(self.labels[index])


class BatchStream:
    """Batches number ``start``, ``start + 1``, ... of an endless sequence.

    Epoch e is a permutation sampled by (seed, e) and cut into batches, the incomplete last one left out.
    Batch number b is therefore a function of (seed, b) alone: its number is all the state that a resumed run
    needs. Raise ValueError when there are fewer items than one batch.
    """

    def __init__(self, items: Items, batch_size: int, *, seed: int, start: int = 0, workers: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if len(items) < batch_size:
            raise ValueError(f"batch_size: expected at most the {len(items)} items there are, got {batch_size}")
        self._items, self._batch_size, self._seed = items, batch_size, seed
        self._start, self._workers = start, workers

    def __iter__(self) -> Iterator[Batch]:
        sampler = _NumberedBatches(len(self._items), self._batch_size, self._seed, self._start)
        loader = DataLoader(
            _Items(self._items),
            batch_sampler=sampler,
            num_workers=self._workers,
            # The loader samples a base seed for its workers: from here and not from the global generator, whose
            # state belongs to the model.
            generator=torch.Generator().manual_seed(self._seed),
            collate_fn=_collated,
        )
        for number, batch in enumerate(loader, start=self._start):
            if isinstance(batch, _Failed):
                raise batch.error
            inputs, labels = batch
            yield Batch(inputs, labels, number * self._batch_size)


class _NumberedBatches:
    def __init__(self, count: int, batch_size: int, seed: int, start: int) -> None:
        self._count, self._batch_size, self._seed, self._start = count, batch_size, seed, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self._count // self._batch_size
        epoch, position = divmod(self._start, per_epoch)
        while True:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._count)
            for batch in range(position, per_epoch):
                chosen = order[batch * self._batch_size : (batch + 1) * self._batch_size]
                yield [(int(index), epoch) for index in chosen]
            epoch, position = epoch + 1, 0


class _Items(Dataset[Any]):
    """`Items` in the form a DataLoader asks for."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int] | _Failed:
        if get_worker_info() is None:
            return self._items.item(*key)
        try:
            return self._items.item(*key)
        except Exception as error:  # whatever a source raises is raised by the process that trains
            return _Failed(_portable(error))


class _Failed(NamedTuple):
    """The error of a worker process. Raised there, it would come back as another error, with a traceback in its
    message."""

    error: Exception


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process: itself, or one with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ValueError(str(error)) if isinstance(error, ValueError) else RuntimeError(str(error))
    return error


def _collated(items: list[Any]) -> Any:
    """Return the tensors of a batch, or the first error."""
    return next((one for one in items if isinstance(one, _Failed)), None) or default_collate(items)
