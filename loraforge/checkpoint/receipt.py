"""The receipt that a merge leaves in its output: what went in, what came out, and what it takes to go back.

On disk a container: the document says for every tensor of the base its digest before and, where it was touched,
after, with the place of its undo record in the payload.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loraforge.checkpoint.container import Container, write_container
from loraforge.checkpoint.engine import Done
from loraforge.checkpoint.fidelity import Fidelity
from loraforge.checkpoint.residual import Residual, decode
from loraforge.errors import FormatError, ManifestError
from loraforge_registry import canonical
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.header import BITS, TensorEntry

NAME = "loraforge.receipt"
_MAGIC = b"loraforge-receipt 1\n"
_PIECE = 4 * 1024 * 1024
_SCHEMA = "loraforge.receipt/1"


@dataclass(frozen=True, slots=True)
class Used:
    """An adapter that went in: what it was called, its weight, what it computes, and its artifact if it had one."""

    label: str
    weight: float
    content_id: Digest
    digest: Digest | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One tensor: its digests before and after (equal where it was not touched), and where its undo record lies."""

    entry: TensorEntry
    before: Digest
    after: Digest
    kind: str = ""
    aux: bytes = b""
    begin: int = 0
    size: int = 0
    fidelity: Fidelity = Fidelity()  # noqa: RUF009 - frozen

    @property
    def touched(self) -> bool:
        """Whether an adapter changed it."""
        return self.kind != ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a merge did."""

    used: tuple[Used, ...]
    compute: str
    records: Mapping[str, Record]

    @property
    def base(self) -> Digest:
        """The digest of the base: its tensors' names, types, shapes and digests."""
        return checkpoint_digest((r.entry, r.before) for r in self.records.values())

    @property
    def merged(self) -> Digest:
        """The digest of the result."""
        return checkpoint_digest((r.entry, r.after) for r in self.records.values())

    @property
    def fidelity(self) -> Fidelity:
        """How much of the updates survived, over all tensors."""
        return sum((r.fidelity for r in self.records.values()), Fidelity())


def checkpoint_digest(tensors: Iterable[tuple[TensorEntry, Digest]]) -> Digest:
    """Return the digest of a set of tensors: a model known by its content, whatever files it lies in."""
    rows = sorted((entry.name, entry.dtype, entry.shape, digest.raw) for entry, digest in tensors)
    document: Value = [[name, dtype, list(shape), raw] for name, dtype, shape, raw in rows]
    return Digest.of(canonical.encode(document, max_bytes=None))  # never read back


def write_receipt(path: Path, receipt: Receipt, payload: Iterable[bytes]) -> int:
    """Write a receipt whose records say where in ``payload`` their undo records lie; return its size.

    Raises:
        FormatError: more tensors than a receipt can hold.
    """
    document: Value = {
        "schema": _SCHEMA,
        "adapters": [_used_out(used) for used in receipt.used],
        "compute": receipt.compute,
        "tensors": [row_of(record) for _, record in sorted(receipt.records.items())],
    }
    try:
        return write_container(path, _MAGIC, document, payload)
    except ManifestError as error:
        count = len(receipt.records)
        raise FormatError(f"no receipt can hold {count} tensors: {error}; merge with --no-receipt") from error


class ReceiptFile:
    """An open receipt; undo records are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Read and check a receipt.

        Raises:
            NotFoundError: there is none.
            FormatError: it is damaged, or of a newer format.
        """
        self.path = path
        try:
            self._container = Container(path, _MAGIC)
            self.receipt = _decode(self._container.document)
        except FormatError as error:
            raise FormatError(f"{path}: not a receipt that this version can read: {error}") from error

    def residual(self, name: str) -> Residual:
        """Return the undo record of a touched tensor."""
        record, entry = self.receipt.records[name], self.receipt.records[name].entry
        data = self._container.payload(record.begin, record.size)
        return decode(data, entry.elements, (entry.end - entry.begin) // max(entry.elements, 1) or 1)


def merged_already(directory: Path) -> list[str]:
    """Return the labels of the adapters that a merge's receipt in a directory names; none without a receipt."""
    path = directory / NAME
    return [used.label for used in ReceiptFile(path).receipt.used] if path.is_file() else []


def record_of_done(done: Done, kind: str, begin: int) -> Record:
    """Return the record of a tensor whose undo record lies at ``begin``."""
    assert done.original is not None, "hashed"  # noqa: S101 - run_jobs hashes unless told not to
    assert done.result is not None, "hashed"  # noqa: S101 - as above
    return Record(
        done.tensor.entry, done.original, done.result, kind, done.aux, begin, len(done.residual), done.fidelity
    )


def in_order(receipt: Receipt, undo: int) -> tuple[Receipt, Iterator[bytes]]:
    """Return a receipt with its undo records laid out by name, and these, from the file they were collected in."""
    records, moves, position = {}, [], 0
    for name, record in sorted(receipt.records.items()):
        records[name] = replace(record, begin=position) if record.touched else record
        if record.touched:
            moves.append((record.begin, record.size))
            position += record.size
    payload = (piece for begin, size in moves for piece in pieces_of(undo, begin, size))
    return replace(receipt, records=records), payload


def pieces_of(fd: int, begin: int, size: int) -> Iterator[bytes]:
    """Yield some bytes of an open file, a few MB at a time."""
    end = begin + size
    while begin < end and (piece := os.pread(fd, min(_PIECE, end - begin), begin)):
        yield piece
        begin += len(piece)


def _used_out(used: Used) -> Value:
    return {
        "label": used.label,
        "weight": used.weight,
        "content_id": used.content_id.raw,
        "digest": None if used.digest is None else used.digest.raw,
    }


def row_of(record: Record) -> Value:
    """Return a record as the document spells it."""
    entry, seen = record.entry, record.fidelity
    row: list[Value] = [entry.name, entry.dtype, list(entry.shape), record.before.raw]
    if record.touched:
        figures: list[Value] = [seen.wanted, seen.lost, seen.changed, seen.measured]
        row += [record.after.raw, record.kind, record.aux, record.begin, record.size, figures]
    return row


def _decode(value: Value) -> Receipt:
    try:
        match value:
            case {"schema": str(schema), "adapters": list(adapters), "compute": str(compute), "tensors": list(rows)}:
                if schema != _SCHEMA:
                    raise FormatError(f"its schema is {schema!r}, expected {_SCHEMA!r}")
                records = {record.entry.name: record for record in map(record_of, rows)}
                return Receipt(tuple(map(_used, adapters)), compute, records)
            case _:
                raise FormatError("its document has other fields")
    except (TypeError, ValueError, IndexError, KeyError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"a field of another type: {error}") from error


def _used(value: Value) -> Used:
    match value:
        case {"label": str(label), "weight": float(weight), "content_id": bytes(content), "digest": digest}:
            found = Digest.from_raw("sha256", digest) if isinstance(digest, bytes) else None
            return Used(label, weight, Digest.from_raw("sha256", content), found)
        case _:
            raise FormatError("an adapter that is not described as one")


def record_of(value: Value) -> Record:
    """Read a record.

    Raises:
        FormatError: it is none.
    """
    match value:
        case [str(name), str(dtype), list(shape), bytes(before)]:
            digest = Digest.from_raw("blake3", before)
            return Record(_entry(name, dtype, shape), digest, digest)
        case [str(name), str(dtype), list(shape), bytes(before), bytes(after), *more]:
            match more:
                case [str(kind), bytes(aux), int(begin), int(size), list(figures)]:
                    old, new = Digest.from_raw("blake3", before), Digest.from_raw("blake3", after)
                    return Record(_entry(name, dtype, shape), old, new, kind, aux, begin, size, _figures(figures))
                case _:
                    raise FormatError("a touched tensor that is not described as one")
        case _:
            raise FormatError("a tensor that is not described as one")


def _figures(value: list[Value]) -> Fidelity:
    match value:
        case [float(wanted), float(lost), int(changed), int(measured)]:
            return Fidelity(wanted, lost, changed, measured)
        case _:
            raise FormatError("a fidelity that is not described as one")


def _entry(name: str, dtype: str, shape: list[Value]) -> TensorEntry:
    sizes = tuple(item for item in shape if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
    if len(sizes) != len(shape):
        raise FormatError(f"tensor {name!r}: {shape} is no shape")
    entry = TensorEntry(name, dtype, sizes, 0, 0)
    return TensorEntry(name, dtype, sizes, 0, entry.elements * BITS[dtype] // 8)
