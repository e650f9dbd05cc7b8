"""Artifacts with their lineage as one file, and its strict reader (SPEC.md section 11).

The same artifacts and names give the same bytes. A reader believes nothing: the index is canonical and must account
for every byte of the file, and each artifact passes the same gates as a push before anything is written.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loraforge_registry import canonical, config, objects
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, FormatError, ReferenceSyntaxError, StoreError
from loraforge_registry.export import write_file
from loraforge_registry.files import Files
from loraforge_registry.header import header_length, parse_header
from loraforge_registry.ingest import MAX_README, Incoming, examine
from loraforge_registry.manifest import CONFIG_FILE, README_FILE, WEIGHTS_FILE, Manifest
from loraforge_registry.names import RefName
from loraforge_registry.records import Record, Records, by_need, decode_record
from loraforge_registry.sessions import Session
from loraforge_registry.system import CHUNK, Buffer
from loraforge_registry.trees import TreeRecord, untruths

MAGIC = b"loraforge-bundle 1\n"
SCHEMA = "loraforge.bundle/1"
_START = len(MAGIC) + 8
_KEYS = {"schema", "names", "roots", "manifests", "blobs"}


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a bundle: where its bytes begin, and how many there are."""

    begin: int
    size: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """An open bundle whose every byte is accounted for; ``read_bundle`` has checked the artifacts, too."""

    fd: int
    names: tuple[tuple[RefName, Digest], ...]
    roots: tuple[Digest, ...]
    records: Mapping[Digest, Record]
    entries: Mapping[Digest, Entry]
    blobs: tuple[Digest, ...]

    def chunks(self, digest: Digest) -> Iterator[Buffer]:
        """Yield an object's bytes."""
        entry = self.entries[digest]
        return _range(self.fd, entry.begin, entry.size)


def write_bundle(files: Files, roots: Sequence[Digest], names: Mapping[RefName, Digest], target: Path) -> int:
    """Write artifacts, and what of their lineage is in the store, into the file ``target``; return its size.

    Raises:
        ConflictError: ``target`` exists with other contents.
        StoreError: something stored is damaged; nothing is left at ``target``.
    """
    records = Records(files).reachable(roots)
    blobs = {digest: size for record in records.values() for digest, size in record.blobs.items()}
    sizes = {digest: files.size(objects.shard(objects.MANIFESTS, digest), digest.hex) or 0 for digest in records}
    index = canonical.encode(
        {
            "schema": SCHEMA,
            "names": [[name.name, name.tag, digest.raw] for name, digest in sorted(names.items())],
            "roots": [digest.raw for digest in sorted(set(roots))],
            "manifests": [[digest.raw, size] for digest, size in sorted(sizes.items())],
            "blobs": [[digest.raw, size] for digest, size in sorted(blobs.items())],
        }
    )

    def contents() -> Iterator[Buffer]:
        yield MAGIC + len(index).to_bytes(8, "little") + index
        for area, found in ((objects.MANIFESTS, sizes), (objects.BLOBS, blobs)):
            for digest, size in sorted(found.items()):
                yield from objects.verified(files, area, digest, size)

    return write_file(target, contents)


def read_bundle(path: Path, fd: int) -> Bundle:
    """Read and check an open bundle, all of it.

    Cost: reads and hashes every byte; memory for one manifest's tensors, and the index.

    Raises:
        FormatError: it is none, is damaged, or holds an adapter that a push would refuse.
    """
    try:
        bundle = _open(fd)
        for digest, record in bundle.records.items():
            if isinstance(record, Manifest):
                _check_truth(bundle, digest, record)
            elif isinstance(record, TreeRecord):
                for untrue in untruths(record, bundle.records.__getitem__):
                    raise FormatError(f"tree {digest.short}: {untrue}")
    except FormatError as error:
        raise type(error)(f"{path}: {error}") from error
    return bundle


def store_bundle(files: Files, session: Session, bundle: Bundle) -> None:
    """Store the objects of a checked bundle: blobs, then the records that need them, then those that need these.

    Raises:
        ConflictError: the file changed since it was checked.
    """
    try:
        for digest in bundle.blobs:
            objects.put(files, session, objects.BLOBS, bundle.chunks(digest), expected=digest)
        for wave in by_need({digest: record.needs for digest, record in bundle.records.items()}):
            for digest in wave:
                objects.put(files, session, objects.MANIFESTS, bundle.chunks(digest), expected=digest)
    except StoreError as error:
        raise ConflictError(f"the bundle changed while it was read: {error}") from error


def _open(fd: int) -> Bundle:
    size = os.fstat(fd).st_size
    start = os.pread(fd, _START, 0)
    if not start.startswith(MAGIC) or len(start) < _START:
        raise FormatError(f"not a bundle: it begins with {start[:24]!r}, expected {MAGIC!r}")
    length = int.from_bytes(start[len(MAGIC) :], "little")
    if length > min(canonical.MAX_BYTES, size - _START):
        raise FormatError(f"{size} bytes that announce an index of {length}")
    names, roots, manifests, blobs = _index(_exactly(fd, _START, length))
    entries: dict[Digest, Entry] = {}
    position = _START + length
    for digest, found in (*manifests, *blobs):
        if digest in entries:
            raise FormatError(f"{digest} stands twice")
        entries[digest] = Entry(position, found)
        position += found
    if position != size:
        raise FormatError(f"{size} bytes, its index accounts for {position}: it is cut short, or something was added")
    read = {digest: _record(fd, digest, entries[digest]) for digest, _ in manifests}
    bundle = Bundle(fd, names, roots, read, entries, tuple(digest for digest, _ in blobs))
    _check_closure(bundle)
    return bundle


def _index(
    data: bytes,
) -> tuple[tuple[tuple[RefName, Digest], ...], tuple[Digest, ...], list[tuple[Digest, int]], list[tuple[Digest, int]]]:
    fields = canonical.decode(data)
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA or set(fields) != _KEYS:
        raise FormatError(f"its index is not that of a {SCHEMA}")
    try:
        roots = tuple(_digest(item) for item in _list(fields["roots"]))
        named = [_list(item, 3) for item in _list(fields["names"])]
        names = tuple((RefName(str(name), str(tag)), _digest(digest)) for name, tag, digest in named)
    except ReferenceSyntaxError as error:
        raise FormatError(f"its index: {error}") from error
    if not roots or list(roots) != sorted(set(roots)) or [n for n, _ in names] != sorted({n for n, _ in names}):
        raise FormatError("its roots and names are not sorted, or one stands twice")
    if not {digest for _, digest in names} <= set(roots):
        raise FormatError("a name means an artifact that is no root")
    return names, roots, _sized(fields["manifests"]), _sized(fields["blobs"])


def _sized(value: Value) -> list[tuple[Digest, int]]:
    found = []
    for item in _list(value):
        digest, size = _list(item, 2)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**53:
            raise FormatError(f"its index: {str(size)[:40]} is not a size")
        found.append((_digest(digest), size))
    if [digest for digest, _ in found] != sorted({digest for digest, _ in found}):
        raise FormatError("its index is not sorted by digest")
    return found


def _list(value: Value, length: int | None = None) -> list[Value]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise FormatError("its index: a list of another length was expected")
    return value


def _digest(value: Value) -> Digest:
    if not isinstance(value, bytes) or len(value) != 32:
        raise FormatError("its index: a digest is 32 bytes")
    return Digest.from_raw("sha256", value)


def _record(fd: int, digest: Digest, entry: Entry) -> Record:
    if entry.size > canonical.MAX_BYTES:
        raise FormatError(f"a manifest of {entry.size} bytes; the limit is {canonical.MAX_BYTES}")
    data = _exactly(fd, entry.begin, entry.size)
    if Digest.of(data) != digest:
        raise FormatError(f"the bytes of the manifest {digest} are damaged")
    return decode_record(data)


def _check_closure(bundle: Bundle) -> None:
    """Everything that is needed is there, and everything that is there is needed."""
    todo, reached = list(bundle.roots), set[Digest]()
    while todo:
        digest = todo.pop()
        if digest in reached:
            continue
        if digest not in bundle.records:
            raise FormatError(f"{digest} is not in it, which is a root or needed by one")
        reached.add(digest)
        record = bundle.records[digest]
        todo += [*record.needs, *(parent for parent in record.lineage if parent in bundle.records)]
    needed = {blob: size for record in bundle.records.values() for blob, size in record.blobs.items()}
    if reached != set(bundle.records) or set(needed) != set(bundle.blobs):
        raise FormatError("it holds objects that no artifact of it needs, or lacks some that one does")
    for digest, size in needed.items():
        if bundle.entries[digest].size != size:
            raise FormatError(f"{digest} has {bundle.entries[digest].size} bytes, a manifest says {size}")


def _check_truth(bundle: Bundle, digest: Digest, manifest: Manifest) -> None:
    """Let the gates look at an artifact's files; its manifest must be the one they would give."""
    by_path = {file.path: bundle.entries[file.digest] for file in manifest.files}
    weights = by_path[WEIGHTS_FILE]
    small = partial(_small, bundle.fd)
    length = header_length(os.pread(bundle.fd, min(32, weights.size), weights.begin), weights.size)
    incoming = Incoming(
        config=small(by_path[CONFIG_FILE], config.MAX_BYTES),
        header=parse_header(_exactly(bundle.fd, weights.begin + 8, length), weights.size),
        chunks=_range(bundle.fd, weights.begin, weights.size),
        readme=small(by_path[README_FILE], MAX_README) if README_FILE in by_path else None,
    )
    try:
        true, _ = examine(incoming)
    except ConflictError as error:
        raise FormatError(f"artifact {digest.short}: {error}") from error
    if replace(true, derivation=manifest.derivation, report=manifest.report) != manifest:
        raise FormatError(f"artifact {digest.short}: its files are damaged, or not as its manifest describes them")


def _small(fd: int, entry: Entry, limit: int) -> bytes:
    if entry.size > limit:
        raise FormatError(f"a file of {entry.size} bytes; the limit is {limit}")
    return _exactly(fd, entry.begin, entry.size)


def _range(fd: int, begin: int, size: int) -> Iterator[Buffer]:
    """Yield bytes of a file; one that shrinks meanwhile ends early."""
    end = begin + size
    while begin < end and (data := os.pread(fd, min(CHUNK, end - begin), begin)):
        yield data
        begin += len(data)


def _exactly(fd: int, begin: int, size: int) -> bytes:
    data = b"".join(bytes(chunk) for chunk in _range(fd, begin, size))
    if len(data) != size:
        raise FormatError(f"it ends {size - len(data)} bytes too early")
    return data
