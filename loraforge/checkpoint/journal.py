"""The journal of an in-place rewrite: which pages will change, from what to what; and the shards put aside meanwhile.

A page is the old one or the new one, so after a crash the journal tells which are still to be written.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loraforge.checkpoint import output
from loraforge.checkpoint.container import Container, write_container
from loraforge.checkpoint.engine import Write
from loraforge.checkpoint.floats import Array
from loraforge.checkpoint.pages import PAGE, page_sums, units
from loraforge.checkpoint.reader import ASIDE, Checkpoint, TensorAt
from loraforge.errors import ConflictError, FormatError, InputOutputError

if TYPE_CHECKING:
    from loraforge_registry.canonical import Value

JOURNAL = "loraforge.journal"
NEW = ".new"
_MAGIC = b"loraforge-journal 1\n"
_PIECE = 4 * 1024 * 1024


@dataclass(frozen=True)
class Journal:
    """An in-place operation that is under way."""

    operation: str
    """``merge`` or ``unmerge``."""
    sums: Mapping[str, tuple[Array, Array]]
    """Page sums (before, after) of every tensor that changes."""


class InUnits:
    """A ``Write`` that passes on whole units: a page that two blocks share is written once, when both are there."""

    def __init__(self, write: Callable[[TensorAt, int, memoryview], None]) -> None:
        self._write = write
        self._waiting: dict[str, bytearray] = {}

    def __call__(self, tensor: TensorAt, offset: int, data: memoryview) -> None:
        """Take the next bytes of a tensor (one thread does a tensor, in order)."""
        waiting = self._waiting.setdefault(tensor.entry.name, bytearray())
        begin = offset - len(waiting)
        waiting += data
        end = offset + len(data)
        ready = end if end == tensor.nbytes else end - (tensor.begin + end) % PAGE
        if ready > begin:
            self._write(tensor, begin, memoryview(bytes(waiting[: ready - begin])))
            del waiting[: ready - begin]


class Sums:
    """The page sums of tensors that go by."""

    def __init__(self) -> None:
        self._found: dict[str, list[Array]] = {}

    def take(self, tensor: TensorAt, offset: int, data: memoryview) -> None:
        """Take whole units of a tensor."""
        self._found.setdefault(tensor.entry.name, []).append(page_sums(data, tensor.begin + offset))

    def of(self, name: str) -> Array:
        """Return the sums of a tensor that has gone by."""
        return np.concatenate(self._found.pop(name))


def sums_on_disk(checkpoint: Checkpoint, tensor: TensorAt) -> Array:
    """Return the sums of what a tensor's pages hold now."""
    sums = Sums()
    take = InUnits(sums.take)
    raw = bytearray(min(_PIECE, tensor.nbytes))
    for offset in range(0, tensor.nbytes, _PIECE):
        piece = memoryview(raw)[: min(_PIECE, tensor.nbytes - offset)]
        checkpoint.read_into(tensor, offset, piece)
        take(tensor, offset, piece)
    return sums.of(tensor.entry.name)


def begin(checkpoint: Checkpoint, operation: str, sums: Mapping[str, tuple[Array, Array]]) -> None:
    """Write the journal, and put the shards that change aside: step 2."""
    directory = checkpoint.path
    payload: list[bytes] = []
    rows: list[Value] = []
    for name, (before, after) in sorted(sums.items()):
        rows.append([name, len(before)])
        payload += [before.tobytes(), after.tobytes()]
    output.remove(directory / (JOURNAL + NEW))
    document: Value = {"operation": operation, "tensors": rows}
    write_container(directory / (JOURNAL + NEW), _MAGIC, document, payload)
    output.rename(directory / (JOURNAL + NEW), directory / JOURNAL)
    output.sync_directory(directory)
    put_aside(checkpoint, sums)


def put_aside(checkpoint: Checkpoint, names: Mapping[str, object]) -> None:
    """Rename the shards that hold these tensors, where they are not aside already."""
    for shard in sorted({checkpoint.tensors[name].shard for name in names}):
        if (checkpoint.path / shard).exists():
            output.rename(checkpoint.path / shard, checkpoint.path / (shard + ASIDE))
    output.sync_directory(checkpoint.path)


def sync_aside(checkpoint: Checkpoint, names: Mapping[str, object]) -> None:
    """Make the shards of these tensors durable: a run that was killed may have written all pages and not waited."""
    for shard in sorted({checkpoint.tensors[name].shard for name in names}):
        output.sync(checkpoint.shards[shard].fd, checkpoint.shards[shard].path)


def put_back(directory: Path) -> None:
    """Give shards that were put aside their names."""
    for path in sorted(directory.glob(f"*{ASIDE}")):
        output.rename(path, path.with_name(path.name.removesuffix(ASIDE)))
    output.sync_directory(directory)


def read_journal(directory: Path) -> Journal:
    """Read the journal of an operation that was cut off.

    Raises:
        FormatError: it is damaged.
    """
    container = Container(directory / JOURNAL, _MAGIC)
    match container.document:
        case {"operation": "merge" | "unmerge" as operation, "tensors": list(rows)}:
            sums, position = {}, 0
            for row in rows:
                match row:
                    case [str(name), int(count)]:
                        pair = np.frombuffer(container.payload(position, 16 * count), np.uint64)
                        sums[name] = (pair[:count], pair[count:])
                        position += 16 * count
                    case _:
                        raise FormatError(f"{container.path}: a tensor that is not described as one")
            return Journal(operation, sums)
        case _:
            raise FormatError(f"{container.path}: not a journal that this version can read")


def written(checkpoint: Checkpoint, journal: Journal) -> dict[str, Array]:
    """Return for each tensor which of its units are written already.

    Raises:
        InputOutputError: a page is neither the old one nor the new one.
    """
    found = {}
    for name, (before, after) in journal.sums.items():
        tensor = checkpoint.tensors[name]
        now = sums_on_disk(checkpoint, tensor)
        if len(now) != len(after):
            raise FormatError(f"{checkpoint.path / JOURNAL}: it is of another tensor {name!r}")
        new = now == after
        if not bool((new | (now == before)).all()):
            raise InputOutputError(
                f"{checkpoint.shards[tensor.shard].path}: a page of tensor {name!r} is neither the old nor the new: "
                "something else has written there, or the disk lost a write; restore this file from its source"
            )
        found[name] = new
    return found


@contextmanager
def writing_old_units(checkpoint: Checkpoint, done: Mapping[str, Array]) -> Iterator[Write]:
    """Yield a ``Write`` that writes only units that are not written yet, into shards that are aside."""
    fds = {}
    try:
        for shard in {checkpoint.tensors[name].shard for name in done}:
            fds[shard] = output.open_existing(checkpoint.path / (shard + ASIDE))

        def write(tensor: TensorAt, offset: int, data: memoryview) -> None:
            path, fd = checkpoint.path / (tensor.shard + ASIDE), fds[tensor.shard]
            first = (tensor.begin + offset) // PAGE - tensor.begin // PAGE
            for begin, end in old_runs(done[tensor.entry.name], first, tensor.begin + offset, len(data)):
                output.write_at(fd, data[begin:end], tensor.begin + offset + begin, path)

        yield InUnits(write)
    finally:
        for fd in fds.values():
            os.close(fd)


def old_runs(done: Array, first: int, position: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of the pieces of ``size`` bytes at ``position`` in the file whose units are still old.

    ``done`` says of each unit of the tensor whether it is new; the piece begins with unit ``first``.
    """
    spans = units(position, size)
    start: int | None = None
    for number, (begin, end) in enumerate(spans):
        if done[first + number]:
            if start is not None:
                yield start, begin
            start = None
        elif start is None:
            start = begin
        if number == len(spans) - 1 and start is not None:
            yield start, end


def check_in_place(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Refuse to write into files that others see under another name, or whose elements straddle pages.

    Raises:
        ConflictError: naming the file.
    """
    if not checkpoint.path.is_dir():
        raise ConflictError(f"{checkpoint.path} is a single file; in place needs its directory; or give --out")
    for name in names:
        tensor = checkpoint.tensors[name]
        path = checkpoint.path / tensor.shard
        if path.is_symlink():
            raise ConflictError(f"{path} is a link, perhaps into a cache that others use; give --out instead")
        if path.exists() and path.stat().st_nlink > 1:
            raise ConflictError(f"{path} has other names (hard links), which would change, too; give --out instead")
        if tensor.begin % max(tensor.itemsize, 1):
            raise ConflictError(
                f"{path}: tensor {name!r} lies at an odd offset, where in place is not safe; give --out"
            )
