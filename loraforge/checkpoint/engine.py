"""Tensors go through here in blocks: read, taken back, changed, hashed, measured, written.

One tensor is one job, done from its first block to its last by one thread, so digests and records need no
reassembling; several threads take several tensors. What is computed does not depend on blocks or threads.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import local
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from loraforge.adapter import DTYPES
from loraforge.checkpoint.changes import Change, Outcome
from loraforge.checkpoint.exact import corrected
from loraforge.checkpoint.fidelity import Fidelity
from loraforge.checkpoint.floats import FORMATS, bits_of, largest_bits
from loraforge.checkpoint.reader import Checkpoint, TensorAt
from loraforge.checkpoint.residual import Residual, ResidualWriter
from loraforge.checkpoint.workspace import Workspace
from loraforge.errors import NumericalError
from loraforge_registry.digest import Digest

BLOCK = 1 << 20  # elements: what a thread holds, and hands to the kernel, at a time
MEASURED = 2  # blocks of a tensor, evenly spread, in which fidelity is measured
SAMPLE = 65_536  # elements of such a block, in rows evenly spread: rows differ, so a few would say little
MAX_WORKERS = 4
_PIECE = 1 << 20  # bytes

T = TypeVar("T")
Write: TypeAlias = Callable[[TensorAt, int, memoryview], None]
"""Takes (tensor, byte offset in it, bytes)."""


@dataclass(frozen=True, slots=True)
class Undo:
    """How the tensor that is read is taken back to what it was before an earlier merge."""

    change: Change
    residual: Callable[[], Residual]


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor: with ``undo`` taken back to its original, with ``change`` changed from there; or left as it is."""

    tensor: TensorAt
    change: Change | None = None
    undo: Undo | None = None

    @property
    def stays(self) -> bool:
        """Whether it is only looked at, or copied."""
        return self.change is None and self.undo is None


@dataclass(frozen=True, slots=True)
class Done:
    """What became of one tensor: digests of what was read, of the original, of the result, and the undo record."""

    tensor: TensorAt
    read: Digest | None
    original: Digest | None
    result: Digest | None
    residual: bytes = b""
    aux: bytes = b""
    fidelity: Fidelity = field(default_factory=Fidelity)


def run_jobs(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    write: Write | None,
    *,
    copy: Callable[[TensorAt], None] | None = None,
    hashed: bool = True,
    sampled: bool = False,
    checked: bool = True,
) -> Iterator[Done]:
    """Do every job, the largest first; yield each as it ends.

    ``write`` takes what becomes of a tensor that changes, ``copy`` copies one that stays as it is. Without ``hashed``
    there are no digests and no undo records; ``sampled`` does only the blocks that are measured; without ``checked``
    infinities pass (some of what is read may be pages that are done already).

    Cost: one pass over the tensors; memory of some blocks a thread.

    Raises:
        NumericalError: NaN or infinity in a result, naming the tensor.
        InputOutputError: it cannot be read or written.
    """
    spaces = local()

    def run(job: Job) -> Done:
        torch.set_num_threads(1)
        if not hasattr(spaces, "own"):
            spaces.own = Workspace()
        try:
            one = _Pass(checkpoint, job, spaces.own, hashed=hashed, checked=checked)
            return one.carry(copy) if job.stays else one.run(write, sampled=sampled)
        finally:
            for change in filter(None, (job.change, None if job.undo is None else job.undo.change)):
                change.release()

    yield from in_threads(run, sorted(jobs, key=lambda job: -job.tensor.nbytes))


def blocks_of(tensor: TensorAt) -> list[slice]:
    """Return the rows of each block: a function of the shape alone."""
    rows, columns = matrix_shape(tensor)
    step = max(1, BLOCK // max(columns, 1))
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def matrix_shape(tensor: TensorAt) -> tuple[int, int]:
    """Return a tensor's shape as a matrix: the first dimension by all the others."""
    shape = tensor.entry.shape
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def read_block(checkpoint: Checkpoint, tensor: TensorAt, rows: slice, space: Workspace) -> Tensor:
    """Read some rows into a buffer of ``space``."""
    columns = matrix_shape(tensor)[1]
    block = space("raw", DTYPES[tensor.entry.dtype], (rows.stop - rows.start, columns))
    checkpoint.read_into(tensor, rows.start * columns * tensor.itemsize, as_bytes(block))
    return block


def as_bytes(values: Tensor) -> memoryview:
    """Return the bytes of a contiguous matrix, without a copy."""
    return memoryview(values.view(torch.uint8).numpy().reshape(-1).data)


class _Pass:
    """One job on its way through its blocks."""

    def __init__(self, checkpoint: Checkpoint, job: Job, space: Workspace, *, hashed: bool, checked: bool) -> None:
        self.checkpoint, self.job, self.space = checkpoint, job, space
        self.columns = matrix_shape(job.tensor)[1]
        self.checked = checked
        self.read, self.original, self.result = (blake3() if hashed else None for _ in range(3))
        self.record = ResidualWriter(job.tensor.itemsize)
        self.fidelity = Fidelity()
        self.residual = None if job.undo is None else job.undo.residual()

    def run(self, write: Write | None, *, sampled: bool) -> Done:
        """Do the job."""
        tensor, blocks = self.job.tensor, blocks_of(self.job.tensor)
        stride = max(1, len(blocks) // MEASURED)
        if self.job.change is not None:
            self.job.change.prepare(lambda rows: self._original(rows, None), blocks, self.space)
        for number, rows in enumerate(blocks):
            if sampled and number % stride:
                continue
            block = self._original(rows, self.read)
            values = block
            if self.job.change is not None:
                values = self._changed(self.job.change, block, rows, measured=number % stride == 0)
            data = as_bytes(values)
            _update(self.original, data if values is block else as_bytes(block))
            if self.job.change is not None:
                _update(self.result, data)
            if write is not None:
                write(tensor, rows.start * self.columns * tensor.itemsize, data)
        return self._done()

    def carry(self, copy: Callable[[TensorAt], None] | None) -> Done:
        """Let a tensor stay as it is, of whatever type."""
        tensor = self.job.tensor
        if copy is not None:
            copy(tensor)
        if self.original is not None:
            raw = self.space("raw", torch.uint8, (_PIECE,)).numpy().data
            for offset in range(0, tensor.nbytes, _PIECE):
                piece = raw[: min(_PIECE, tensor.nbytes - offset)]
                self.checkpoint.read_into(tensor, offset, piece)
                self.original.update(piece)
        return self._done()

    def _original(self, rows: slice, read: "blake3 | None") -> Tensor:
        block = read_block(self.checkpoint, self.job.tensor, rows, self.space)
        if self.job.undo is None or self.residual is None:
            return block
        _update(read, as_bytes(block))
        guess = self.job.undo.change.guess(block, rows, self.space)
        found = self.residual.within(rows.start * self.columns, rows.stop * self.columns)
        return corrected(guess, found).clone()  # out of the workspace, which the change uses next

    def _changed(self, change: Change, block: Tensor, rows: slice, *, measured: bool) -> Tensor:
        outcome = change.forward(block, rows, self.space, back=self.result is not None)
        if self.checked:
            check_finite(self.job.tensor, block, outcome, rows)
        if measured:
            self.fidelity += _fidelity(change, block, outcome.values, rows, self.space)
        if outcome.back is not None:
            self.record.add(rows.start * self.columns, *outcome.back)
        return outcome.values

    def _done(self) -> Done:
        job = self.job
        original = _digest(self.original)
        return Done(
            tensor=job.tensor,
            read=original if job.undo is None else _digest(self.read),
            original=original,
            result=original if job.change is None else _digest(self.result),
            residual=b"" if job.change is None or self.result is None else self.record.encode(),
            aux=b"" if job.change is None else job.change.aux,
            fidelity=self.fidelity,
        )


def _update(hasher: "blake3 | None", data: memoryview) -> None:
    if hasher is not None:
        hasher.update(data)


def _digest(hasher: "blake3 | None") -> Digest | None:
    return None if hasher is None else Digest.from_raw("blake3", hasher.digest())


def check_finite(tensor: TensorAt, block: Tensor, outcome: Outcome, rows: slice) -> None:
    """Refuse NaN and infinity in new values.

    Raises:
        NumericalError: naming the tensor, the place, and what was there before.
    """
    values = outcome.values
    kind = FORMATS.get(values.dtype)
    if kind is None or not values.numel() or outcome.finite or largest_bits(values) < kind.exponent:
        return
    row, column = (int(i) for i in np.argwhere((bits_of(values) & kind.exponent) == kind.exponent)[0])
    before, after = float(block[row, column]), float(values[row, column])
    index = list(np.unravel_index((rows.start + row) * values.shape[1] + column, tensor.entry.shape or (1,)))
    where = f"tensor {tensor.entry.name!r} at {[int(i) for i in index]}"
    if not math.isfinite(before):
        raise NumericalError(f"{where}: the base holds {before}; nothing can be merged into it")
    raise NumericalError(f"{where}: {before:g} would become {after}, beyond what {tensor.entry.dtype} can hold")


def _fidelity(change: Change, block: Tensor, values: Tensor, rows: slice, space: Workspace) -> Fidelity:
    """Measure how a block fared on some of its rows, evenly spread."""
    step = -(-block.numel() // SAMPLE)
    old, new = block[::step], values[::step]
    changed = int(np.count_nonzero(bits_of(old) != bits_of(new)))
    target = change.target(old, slice(rows.start, rows.stop, step), space)
    if target is None:
        return Fidelity(changed=changed, measured=old.numel())
    wide = space("sample", torch.float64, (old.shape[0], old.shape[1]))
    wanted, lost = (_square(torch.sub(target, wide.copy_(side), out=wide)) for side in (old, new))
    return Fidelity(wanted, lost, changed, old.numel())


def _square(numbers: Tensor) -> float:
    """Sum the squares, to six digits: more would differ from machine to machine, and receipts with them."""
    flat = numbers.reshape(-1)
    return float(f"{float(torch.dot(flat, flat)):.6g}")


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Let torch use one thread a worker: blocks are small, and two workers on two tensors beat two on one."""
    before = torch.get_num_threads()
    try:
        yield max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else before))
    finally:
        torch.set_num_threads(before)


def in_threads(run: Callable[[Job], T], jobs: Iterable[Job]) -> Iterator[T]:
    """Run jobs on a few threads; the first error stops the rest and is raised."""
    waiting = iter(jobs)
    running: set[Future[T]] = set()
    with _one_thread_each() as workers, ThreadPoolExecutor(workers) as pool:
        try:
            for job in waiting:
                running.add(pool.submit(run, job))
                if len(running) > workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in running:
                future.cancel()
