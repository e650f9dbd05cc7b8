"""Micro-batches in windows of one step each: their order, where a run stands in them, how many labels they have."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from loraforge.errors import TrainingError
from loraforge.training.streams import seed_all

Batch = Any
"""A mapping (keyword arguments of the model), a tuple or list (positional ones), or one argument."""
IGNORED = -100
"""The label that transformers and torch leave out."""
Count = Callable[[nn.Module, Batch], int]


@runtime_checkable
class Epochs(Protocol):
    """Data that has an order of its own for each epoch, and any batch of it at once."""

    def epoch(self, number: int) -> Sequence[Batch]:
        """Return the batches of an epoch: the same ones whenever it is asked."""


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: ``taken`` micro-batches of epoch ``epoch`` have been used."""

    epoch: int = 0
    taken: int = 0


@dataclass(frozen=True)
class Window:
    """The micro-batches of one step, and where the next begins."""

    batches: Sequence[Batch]
    after: Cursor


def windows(batches: Iterable[Batch], size: int, seed: int, start: Cursor) -> Iterator[Window]:
    """Yield one window after another, for ever; the last of an epoch may be smaller, and ends at the next one's start.

    Every fetch is seeded by (seed, epoch, number), so that the order is the same after a resume; what was taken
    before ``start`` is read again, or skipped where ``batches`` is a sequence.

    Raises:
        TrainingError: an epoch without a batch, or an iterator that cannot be read twice.
    """
    cursor = start
    while True:
        held: list[Batch] = []
        for batch in _epoch(batches, seed, cursor):
            if len(held) == size:  # only now it is known not to be the last
                yield Window(held, cursor)
                held = []
            held.append(batch)
            cursor = Cursor(cursor.epoch, cursor.taken + 1)
        if cursor.taken == 0:
            again = "a second time: give a list or a DataLoader" if cursor.epoch else ""
            raise TrainingError(f"the data gives no batch {again}".strip())
        cursor = Cursor(cursor.epoch + 1)
        yield Window(held, cursor)


def steps_per_epoch(batches: Iterable[Batch], size: int) -> int | None:
    """Return how many windows an epoch has; None where the data does not know its length."""
    try:
        return math.ceil(len(batches) / size) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader of an iterable dataset has a length that raises
        return None


def _epoch(batches: Iterable[Batch], seed: int, cursor: Cursor) -> Iterator[Batch]:
    if isinstance(batches, Epochs):
        batches = batches.epoch(cursor.epoch)
    if isinstance(batches, Sequence):
        for number in range(cursor.taken, len(batches)):
            seed_all(seed, "fetch", cursor.epoch, number)
            yield batches[number]
        return
    if isinstance(batches, Iterator) and cursor != Cursor():
        raise TrainingError("batches is an iterator, which cannot be read again: give a list or a DataLoader")
    seed_all(seed, "epoch", cursor.epoch)
    iterator = iter(batches)
    number = 0
    while True:
        seed_all(seed, "fetch", cursor.epoch, number)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        number += 1
        if number > cursor.taken:
            yield batch


def count_labels(model: nn.Module, batch: Batch) -> int:
    """Return how many labels the mean in a model's loss is over: those that are not -100, else the rows.

    transformers' causal models predict each label from the tokens before it, so their first does not count.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if labels is None:
        return _rows(batch)
    causal = any(cls.__name__.endswith(("ForCausalLM", "LMHeadModel")) for cls in type(model).__mro__)
    counted = labels[..., 1:] if causal and labels.ndim > 1 else labels
    return int((counted != IGNORED).sum())


def _rows(batch: Batch) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)([to_device(value, device) for value in batch])
    return batch
