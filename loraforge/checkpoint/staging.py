"""Where an output is made: a hidden directory beside it, which becomes the output by one rename, or never.

    .<name>.<key>.loraforge/
        loraforge.<shard>.part  the shards, under names that no loader takes, until all of them are whole
        loraforge.undo          undo records, in the order in which tensors were done
        loraforge.progress      one frame for each tensor that is done; a second run believes what its digests prove

What comes along from the base never has such a name (``travelling``), so a stray ``model.safetensors.part`` in it
cannot take the place of a shard.

The key says what is being made (base, adapters, weights), so a run that was killed is taken up by the same command
and by no other; what another one left is swept away.
"""

import glob
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePath

from blake3 import blake3

from loraforge.checkpoint import output
from loraforge.checkpoint.engine import Done
from loraforge.checkpoint.reader import Checkpoint, Shard, TensorAt
from loraforge.checkpoint.receipt import NAME as RECEIPT
from loraforge.checkpoint.receipt import (
    Receipt,
    Record,
    in_order,
    pieces_of,
    record_of,
    record_of_done,
    row_of,
    write_receipt,
)
from loraforge.errors import ConflictError
from loraforge_registry import canonical
from loraforge_registry.digest import Digest

_END = ".loraforge"
_OURS = "loraforge."  # receipts, journals: they say something of the base, and nothing of what is made from it
_PART = ".part"
_UNDO = _OURS + "undo"
_PROGRESS = _OURS + "progress"
# Weights in other formats would be those of the base, beside a merged model.
STALE = (
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".safetensors",
    ".lock",
)


@contextmanager
def staging(base: Checkpoint, out: Path, key: Digest) -> Iterator["Staging"]:
    """Open the staging directory of an output, new or left by a killed run of the same command.

    On an error it is removed; on an interruption it stays, and the next run of the same command goes on from it.

    Raises:
        ConflictError: ``out`` is there, lies inside the base, or is being written by another process.
    """
    check_place(base, out)
    directory = out.parent / _hidden(out, key.short)
    output.make_directory(directory)
    with ExitStack() as stack:
        stack.enter_context(output.locked(directory, str(out)))
        _sweep(out, directory)
        try:
            yield Staging(base, out, directory, stack)
        except Exception:
            output.remove_directory(directory)
            raise


def check_place(base: Checkpoint, out: Path) -> None:
    """Refuse an output that exists, that lies in its own input, or beside which nothing can be made."""
    if not out.name:
        raise ConflictError(f"{out} has no name that a finished output could be given; name a new directory")
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ConflictError(f"{out} exists already; name a new directory, or remove it first")
    if out.resolve().is_relative_to(base.path.resolve()):
        raise ConflictError(f"{out} is inside the input {base.path}; name a directory elsewhere")


class Staging:
    """An output in the making."""

    def __init__(self, base: Checkpoint, out: Path, directory: Path, stack: ExitStack) -> None:
        self._base, self._out, self._directory = base, out, directory
        self._fds: dict[str, int] = {}
        self._cloned: set[str] = set()
        for name, shard in base.shards.items():
            self._fds[name] = self._open_shard(stack, name, shard)
        self._undo = self._open(stack, _UNDO)
        self._progress = self._open(stack, _PROGRESS)
        self._records: dict[str, Record] = {}
        self._undo_end = self._progress_end = 0

    def take_up(self, wanted: Mapping[str, str]) -> set[str]:
        """Return which tensors (name to kind of change) a killed run has done, by what their bytes prove now."""
        end = 0
        for frame_end, record, undo in _frames(self._progress):
            end, name = frame_end, record.entry.name
            self._undo_end = max(self._undo_end, record.begin + record.size)
            if wanted.get(name) == record.kind and self._is_whole(self._base.tensors[name], record, undo):
                self._records[name] = record
        self._progress_end = end
        return set(self._records)

    def write(self, tensor: TensorAt, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor."""
        fd, begin = self._fds[tensor.shard], tensor.begin + offset
        output.write_at(fd, data, begin, self._directory / tensor.shard)
        output.start_writing(fd, begin, len(data))

    def copy(self, tensor: TensorAt) -> None:
        """Copy a tensor that stays as it is, in the kernel."""
        self._copy(tensor.shard, tensor.begin, tensor.begin + tensor.nbytes)

    def copy_headers(self) -> None:
        """Copy what lies before the tensors."""
        for name, shard in self._base.shards.items():
            self._copy(name, 0, shard.header.data_start)

    def _copy(self, shard: str, begin: int, end: int) -> None:
        if shard not in self._cloned:
            source, path = self._base.shards[shard].fd, self._directory / shard
            output.copy_range(source, self._fds[shard], begin, end, path)

    def finished(self, done: Done, kind: str) -> None:
        """Note that a tensor is whole, with its undo record."""
        if done.original is None or done.result is None:
            return  # without digests nothing can be proved, and a second run begins anew
        begin = self._undo_end
        output.write_at(self._undo, done.residual, begin, self._directory / _UNDO)
        self._undo_end += len(done.residual)
        record = record_of_done(done, kind, begin)
        self._records[done.tensor.entry.name] = record
        frame = _frame(record, blake3(done.residual).digest())
        output.write_at(self._progress, frame, self._progress_end, self._directory / _PROGRESS)
        self._progress_end += len(frame)

    def records(self) -> dict[str, Record]:
        """What is done, by tensor."""
        return dict(self._records)

    def publish(self, receipt: Receipt | None) -> int:
        """Make everything durable, and let it appear; return the receipt's size."""
        for name, fd in self._fds.items():
            output.sync(fd, self._directory / name)
        self._copy_others()
        output.remove(self._directory / RECEIPT)
        size = 0 if receipt is None else self._write_receipt(receipt)
        output.remove(self._directory / _UNDO)
        output.remove(self._directory / _PROGRESS)
        for name in self._fds:
            output.rename(self._directory / part_of(name), self._directory / name)
        output.sync_directory(self._directory)
        check_place(self._base, self._out)
        output.rename(self._directory, self._out)
        output.sync_directory(self._out.parent)
        return size

    def _open_shard(self, stack: ExitStack, name: str, shard: Shard) -> int:
        """Open a shard in the making: a copy that shares the base's blocks where the file system can, else empty."""
        if (self._directory / name).exists():
            output.rename(self._directory / name, self._directory / part_of(name))  # killed as it was about to appear
        fd = self._open(stack, part_of(name))
        if os.fstat(fd).st_size != shard.stamp.size:
            if output.clone(shard.fd, fd, self._directory / name):
                self._cloned.add(name)
            else:
                output.reserve(fd, shard.stamp.size, self._directory / name)
        return fd

    def _open(self, stack: ExitStack, name: str) -> int:
        path = self._directory / name
        fd = output.open_existing(path) if path.exists() else output.open_new(path)
        stack.callback(os.close, fd)
        return fd

    def _is_whole(self, tensor: TensorAt, record: Record, undo: bytes) -> bool:
        """Whether a tensor's bytes here, and its undo record's, still have the digests that were noted."""
        data = _hash(self._fds[tensor.shard], tensor.begin, tensor.nbytes)
        return data == record.after.raw and _hash(self._undo, record.begin, record.size) == undo

    def _copy_others(self) -> None:
        for name in travelling(self._base):
            path = self._directory / name
            output.make_directory(path.parent)
            output.remove(path)
            fd, source = output.open_new(path), os.open(self._base.path / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                output.copy_range(source, fd, 0, os.fstat(source).st_size, path)
                output.sync(fd, path)
            finally:
                os.close(fd)
                os.close(source)

    def _write_receipt(self, receipt: Receipt) -> int:
        """Write the receipt with its undo records in the order of the tensors' names: the same bytes in every run."""
        ordered, payload = in_order(receipt, self._undo)
        return write_receipt(self._directory / RECEIPT, ordered, payload)


def part_of(shard: str) -> str:
    """Return what a shard in the making is called."""
    return _OURS + shard + _PART


def travelling(base: Checkpoint) -> list[str]:
    """Return the files that come along: configuration, tokenizer, licence, but no weights in other formats.

    Nor what lies beside such weights in a directory of theirs: it says something of them.
    """
    weighty = {str(PurePath(name).parent) for name in base.others if name.endswith(STALE)} - {"."}
    names = [name for name in base.others if not name.endswith(STALE) and not name.startswith(_OURS)]
    return [name for name in names if str(PurePath(name).parent) not in weighty]


def left_out(base: Checkpoint) -> tuple[str, ...]:
    """Return the files that do not come along."""
    return tuple(name for name in base.others if name.endswith(STALE) and not name.startswith(_OURS))


def _hidden(out: Path, key: str) -> str:
    return f".{out.name[:100]}.{key}{_END}"


def _sweep(out: Path, keep: Path) -> None:
    """Remove what killed runs of other commands left for the same output; not what one is writing now."""
    for path in out.parent.glob(f".{glob.escape(out.name[:100])}.*{_END}"):
        key = path.name.removesuffix(_END).rpartition(".")[2]
        is_ours = path.name == _hidden(out, key)  # not that of an output whose name goes on with a dot
        if is_ours and path != keep and path.is_dir() and not path.is_symlink():
            with suppress(ConflictError), output.locked(path, str(out)):
                output.remove_directory(path)


def _frame(record: Record, undo: bytes) -> bytes:
    data = canonical.encode([row_of(record), undo])
    return len(data).to_bytes(4, "little") + blake3(data).digest()[:8] + data


def _frames(fd: int) -> Iterator[tuple[int, Record, bytes]]:
    """Yield (where it ends, record, digest of its undo record) of each frame that is whole."""
    position = 0
    while len(head := os.pread(fd, 12, position)) == 12:
        data = os.pread(fd, int.from_bytes(head[:4], "little"), position + 12)
        if blake3(data).digest()[:8] != head[4:]:
            return
        position += 12 + len(data)
        match canonical.decode(data):
            case [list(row), bytes(undo)]:
                yield position, record_of(row), undo


def _hash(fd: int, begin: int, size: int) -> bytes:
    hasher = blake3()
    for chunk in pieces_of(fd, begin, size):
        hasher.update(chunk)
    return hasher.digest()
