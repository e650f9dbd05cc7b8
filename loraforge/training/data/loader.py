"""Rows to batches: padded or packed, in an order that is a function of the seed and the epoch.

Packed, a batch's row holds several samples: positions begin at 0 for each, and a mask of blocks on the diagonal lets a
token see only the tokens before it in its own sample. The first label of each is masked, since a causal model would
predict it from the end of the sample before.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraforge.errors import TrainingError
from loraforge.training.batches import IGNORED
from loraforge.training.data.tokens import Row
from loraforge.training.streams import seed_all

Batch = dict[str, Tensor]
_REACH = 50
"""Batches within which rows of like lengths are looked for: enough to find them, few enough to stay at random."""


@dataclass(frozen=True)
class Loader:
    """Batches of ``bins``, each the numbers of the rows that share a line; without ``pack_dtype`` they are padded."""

    rows: tuple[Row, ...]
    bins: tuple[tuple[int, ...], ...]
    size: int
    seed: int
    pad: int
    pack_dtype: torch.dtype | None = None
    grouped: bool = False

    def __len__(self) -> int:
        return math.ceil(len(self.bins) / self.size)

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches in the order of the data, as evaluation wants them."""
        return iter(_Lazy(self, self._cut(range(len(self.bins)))))

    def epoch(self, number: int) -> "_Lazy":
        """Return the batches of an epoch; every row is in one of them.

        ``grouped``, rows of like lengths share a batch, so that there is less to fill up: of each 50 batches' worth of
        the shuffled rows the longest come first, and then whole batches are shuffled.
        """
        seed_all(self.seed, "order", number)
        order = torch.randperm(len(self.bins)).tolist()
        if not self.grouped:
            return _Lazy(self, self._cut(order))
        reach = _REACH * self.size
        near = (sorted(order[at : at + reach], key=self._length, reverse=True) for at in range(0, len(order), reach))
        parts = [part for places in near for part in self._cut(places)]
        return _Lazy(self, [parts[place] for place in torch.randperm(len(parts)).tolist()])

    def _cut(self, order: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(order[at : at + self.size]) for at in range(0, len(order), self.size)]

    def _length(self, place: int) -> int:
        return sum(len(self.rows[row].ids) for row in self.bins[place])

    def heaviest(self, epochs: int = 1) -> list[Batch]:
        """Return the batches that memory is decided by: of the most tokens, and of the most that are learned.

        Looked for in the first epochs, 8 at most: orders are known before, lengths too.
        """
        batches = [part for number in range(min(epochs, 8)) for part in self.epoch(number).parts]
        tokens = max(batches, key=lambda part: (self._width(part) * len(part), self._learned(part)))
        learned = max(batches, key=lambda part: (self._learned(part) * len(part), self._width(part)))
        return [self.batch(part) for part in dict.fromkeys((tokens, learned))]

    def batch(self, places: Sequence[int]) -> Batch:
        """Return the batch of some bins."""
        lines = [[self.rows[row] for row in self.bins[place]] for place in places]
        if self.pack_dtype is None:
            return padded([line[0] for line in lines], self.pad)
        return packed(lines, self.pad, self.pack_dtype)

    def _width(self, places: Sequence[int]) -> int:
        return max(map(self._length, places))

    def _learned(self, places: Sequence[int]) -> int:
        """The positions with a label in some line, whose logits are computed."""
        found: set[int] = set()
        for place in places:
            labels = [label for row in self.bins[place] for label in self.rows[row].labels]
            found.update(at for at, label in enumerate(labels) if label != IGNORED)
        return len(found)


class _Lazy(Sequence[Batch]):
    """Batches that are made when they are asked for."""

    def __init__(self, loader: Loader, parts: Sequence[tuple[int, ...]]) -> None:
        self._loader, self.parts = loader, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN204 - Sequence's two overloads
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._loader.batch(self.parts[number])


def make_loader(
    rows: Sequence[Row],
    size: int,
    *,
    seed: int,
    pad: int,
    max_length: int,
    pack_dtype: torch.dtype | None = None,
    grouped: bool = False,
) -> Loader:
    """Return a loader of ``size`` lines a batch, packed with masks of type ``pack_dtype`` if one is given."""
    lengths = [len(row.ids) for row in rows]
    bins = [(row,) for row in range(len(rows))] if pack_dtype is None else best_fit(lengths, max_length)
    return Loader(tuple(rows), tuple(bins), size, seed, pad, pack_dtype, grouped)


def best_fit(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Put whole rows into bins: the longest first, each where it leaves the least room (best fit decreasing).

    Cost: n log n, and for each row a place in the sorted list of bins with room.

    Raises:
        TrainingError: a row is longer than ``capacity``.
    """
    if lengths and max(lengths) > capacity:
        raise TrainingError(f"a row of {max(lengths)} tokens does not fit into {capacity}")
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), sorted
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        at = bisect.bisect_left(rooms, (lengths[row], 0))
        if at == len(rooms):
            bins.append([])
            room, place = capacity, len(bins) - 1
        else:
            room, place = rooms.pop(at)
        bins[place].append(row)
        if room > lengths[row]:
            bisect.insort(rooms, (room - lengths[row], place))
    return [tuple(found) for found in bins]


def padded(rows: Sequence[Row], pad: int) -> Batch:
    """Return rows side by side, the short ones filled up at their ends, which nobody attends to or learns.

    Shapes: input_ids, labels and attention_mask (rows, longest).
    """
    width = max(len(row.ids) for row in rows)
    return {
        "input_ids": torch.tensor([[*row.ids, *[pad] * (width - len(row.ids))] for row in rows]),
        "labels": torch.tensor([[*row.labels, *[IGNORED] * (width - len(row.ids))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
    }


def packed(lines: Sequence[Sequence[Row]], pad: int, dtype: torch.dtype) -> Batch:
    """Return several rows in each line, isolated from each other.

    Shapes: input_ids, labels and position_ids (lines, longest); attention_mask (lines, 1, longest, longest), added to
    the scores: 0 where a token may look, the least number of ``dtype`` elsewhere.
    """
    width = max(sum(len(row.ids) for row in line) for line in lines)
    ids, labels = (torch.full((len(lines), width), value) for value in (pad, IGNORED))
    positions, owner = (torch.zeros(len(lines), width, dtype=torch.long) for _ in range(2))
    for number, line in enumerate(lines):
        start = 0
        for sample, row in enumerate(line, 1):
            end = start + len(row.ids)
            ids[number, start:end] = torch.tensor(row.ids)
            labels[number, start:end] = torch.tensor(row.labels)
            labels[number, start] = IGNORED
            positions[number, start:end] = torch.arange(end - start)
            owner[number, start:end] = sample
            start = end
    same = owner[:, :, None] == owner[:, None, :]  # (lines, width, width)
    seen = (same & torch.ones(width, width).tril().bool())[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
