"""The cache behind ``ls``: a line about each artifact, in a file that may be deleted at any moment.

A row is keyed by an artifact digest, whose meaning never changes, so no row can be stale; it carries a checksum, so a
damaged one is no answer. The cache is written without fsync and gives way to anything: it saves time, nothing else.
"""

import hashlib
import sqlite3
import stat
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import msgpack

from loraforge_registry.digest import Digest
from loraforge_registry.repositories import CommittedFile, Outline

_VERSION = 1
_BUSY = 0.2  # seconds to wait for another writer before doing without


@dataclass(frozen=True, slots=True)
class Summary:
    """What ``ls`` says about an artifact: the largest rank, the number of parameters, the bytes of all files."""

    content_id: Digest
    base: str | None
    rank: int
    targets: int
    parameters: int
    size: int
    operation: str | None


def read_summaries(root: Path) -> dict[Digest, Summary]:
    """Return every intact row; empty where the cache is missing, damaged or locked."""
    try:
        with closing(_connect(root, write=False)) as database:
            rows = database.execute("SELECT digest, check_sum, row FROM summary").fetchall()
    except sqlite3.Error:
        return {}
    return {Digest.from_raw("sha256", digest): _unpack(row)
            for digest, check, row in rows if _is_intact(digest, check, row)}  # fmt: skip


def write_summaries(root: Path, summaries: Mapping[Digest, Summary]) -> None:
    """Remember what ``ls`` says."""
    packed = [(digest.raw, _pack(summary)) for digest, summary in summaries.items()]
    rows = [(digest, _check_sum(digest, row), row) for digest, row in packed]
    _write(root, "summary (digest BLOB PRIMARY KEY, check_sum BLOB, row BLOB)", rows)


def read_result(root: Path, key: Digest) -> Digest | None:
    """Return the artifact that a piece of work, known by ``key``, came to on this machine; None where nobody knows."""
    found = _read(root, "SELECT check_sum, artifact FROM result WHERE key = ?", key)
    return Digest.from_raw("sha256", found) if found is not None and len(found) == 32 else None


def write_result(root: Path, key: Digest, artifact: Digest) -> None:
    """Remember what a piece of work came to; like every row, one that may be lost."""
    row = (key.raw, _check_sum(key.raw, artifact.raw), artifact.raw)
    _write(root, "result (key BLOB PRIMARY KEY, check_sum BLOB, artifact BLOB)", [row])


def read_spectra(root: Path, content_id: Digest) -> bytes | None:
    """Return what was kept of the spectra of adapters that compute this; None where nobody knows."""
    return _read(root, "SELECT check_sum, row FROM spectra WHERE content_id = ?", content_id)


def write_spectra(root: Path, content_id: Digest, row: bytes) -> None:
    """Keep the spectra of whatever computes this; like every row, one that may be lost."""
    columns = "spectra (content_id BLOB PRIMARY KEY, check_sum BLOB, row BLOB)"
    _write(root, columns, [(content_id.raw, _check_sum(content_id.raw, row), row)])


def read_outlines(root: Path, head: Digest) -> dict[Digest, Outline]:
    """Return what is remembered of a commit and those before it, as far as it is; all in one step of SQLite's."""
    query = """
        WITH RECURSIVE past(digest, parent) AS (
            SELECT digest, parent FROM outline WHERE digest = ?
            UNION SELECT outline.digest, outline.parent FROM past JOIN outline ON outline.digest = past.parent)
        SELECT group_concat(hex(digest) || hex(check_sum) || hex(row)) FROM past JOIN outline USING (digest)"""
    try:
        with closing(_connect(root, write=False)) as database:
            (found,) = database.execute(query, [head.raw]).fetchone()
        rows = [bytes.fromhex(text) for text in (found or "").split(",")]
        return {Digest.from_raw("sha256", row[:32]): _unpack_outline(row[40:])
                for row in rows if _is_intact(row[:32], row[32:40], row[40:])}  # fmt: skip
    except (sqlite3.Error, ValueError, TypeError, AttributeError):  # AttributeError: a number where bytes should be
        return {}


def write_outlines(root: Path, outlines: Mapping[Digest, Outline]) -> None:
    """Remember what a walk along a history needs; like every row, one that may be lost."""
    rows = []
    for digest, outline in outlines.items():
        row = _pack_outline(outline)
        rows.append((digest.raw, _check_sum(digest.raw, row), row, outline.parent.raw if outline.parent else None))
    _write(root, "outline (digest BLOB PRIMARY KEY, check_sum BLOB, row BLOB, parent BLOB)", rows)


def _read(root: Path, query: str, key: Digest) -> bytes | None:
    """One intact value, the second column of what a query for a key finds; the first is its checksum."""
    try:
        with closing(_connect(root, write=False)) as database:
            found = database.execute(query, [key.raw]).fetchone()
    except sqlite3.Error:
        return None
    if found is None or not isinstance(found[1], bytes) or found[0] != _check_sum(key.raw, found[1]):
        return None
    return found[1]


def _write(root: Path, table: str, rows: Sequence[Sequence[bytes | None]]) -> None:
    """Keep rows; a damaged cache is thrown away and begun again, a locked or read-only one is left alone."""
    if not rows:
        return
    try:
        _insert(root, table, rows)
    except sqlite3.DatabaseError as error:
        if "locked" in str(error) or "readonly" in str(error) or "unable to open" in str(error):
            return
        with suppress(OSError, sqlite3.Error):
            (root / "index.sqlite").unlink(missing_ok=True)
            _insert(root, table, rows)
    except OSError:
        return


def _insert(root: Path, table: str, rows: Sequence[Sequence[bytes | None]]) -> None:
    with closing(_connect(root, write=True)) as database, database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        marks = ", ".join("?" * len(rows[0]))
        database.executemany(f"INSERT OR REPLACE INTO {table.split(maxsplit=1)[0]} VALUES ({marks})", rows)  # noqa: S608 - ours


def _connect(root: Path, *, write: bool) -> sqlite3.Connection:
    mode = "rwc" if write else "ro"
    with suppress(FileNotFoundError):
        if not stat.S_ISREG((root / "index.sqlite").lstat().st_mode):  # a FIFO would hang, a link lead elsewhere
            raise sqlite3.OperationalError("unable to open: not a regular file")
    uri = (root / "index.sqlite").absolute().as_uri()
    return sqlite3.connect(f"{uri}?mode={mode}", uri=True, timeout=_BUSY)


def _pack(summary: Summary) -> bytes:
    s = summary
    row = [_VERSION, s.content_id.raw, s.base, s.rank, s.targets, s.parameters, s.size, s.operation]
    packed: bytes = msgpack.packb(row)
    return packed


def _unpack(row: bytes) -> Summary:
    _, content, base, rank, targets, parameters, size, operation = msgpack.unpackb(row)
    return Summary(Digest.from_raw("sha256", content), base, rank, targets, parameters, size, operation)


def _pack_outline(outline: Outline) -> bytes:
    parent, adapter, file = (
        None if outline.parent is None else outline.parent.raw,
        None if outline.adapter is None else outline.adapter.raw,
        None if outline.stated is None else [outline.stated.digest.raw, outline.stated.size, outline.stated.blob],
    )
    packed: bytes = msgpack.packb([_VERSION, outline.id, parent, adapter, outline.time, file])
    return packed


def _unpack_outline(row: bytes) -> Outline:
    _, identity, parent, adapter, when, file = msgpack.unpackb(row)
    before, artifact = (None if raw is None else Digest.from_raw("sha256", raw) for raw in (parent, adapter))
    stated = None if file is None else CommittedFile(Digest.from_raw("sha256", file[0]), *file[1:])
    return Outline(identity, before, artifact, when, stated)


def _is_intact(digest: object, check: object, row: object) -> bool:
    return (
        isinstance(digest, bytes)
        and isinstance(row, bytes)
        and len(digest) == 32
        and check == _check_sum(digest, row)
        and row[1:2] == bytes([_VERSION])
    )


def _check_sum(digest: bytes, row: bytes) -> bytes:
    return hashlib.blake2b(digest + row, digest_size=8).digest()
