"""An adapter from a remote into a store: only what is missing, every byte hashed here, the name last.

What is cut off is simply run again: each file that arrived whole is there, and is not fetched again.
"""

import errno
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from shutil import disk_usage

from loraforge_registry.config import MAX_BYTES, parse_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, DigestMismatchError, FormatError, InputOutputError, RemoteError
from loraforge_registry.git import git_id
from loraforge_registry.header import Header, header_length, parse_header
from loraforge_registry.ingest import MAX_README, Incoming
from loraforge_registry.manifest import CONFIG_FILE, README_FILE, WEIGHTS_FILE, File
from loraforge_registry.names import DEFAULT_TAG, RefName
from loraforge_registry.remotes.offer import Offer, Remote, RemoteFile
from loraforge_registry.store import Store
from loraforge_registry.system import Buffer

LIMITS = {CONFIG_FILE: MAX_BYTES, README_FILE: 2 * MAX_README}
MAX_LINEAGE = 10_000  # artifacts above one


@dataclass(frozen=True, slots=True)
class Received:
    """What a pull did: the artifact, bytes of files that came and that were here already, parents found nowhere."""

    digest: Digest
    received: int
    skipped: int
    missing: tuple[Digest, ...] = ()


def receive(
    store: Store, remote: Remote, offer: Offer, name: RefName, *, force: bool, lineage: bool, what: str
) -> Received:
    """Store what a remote offers, with ``lineage`` also what it was made from, and name it.

    Raises:
        ConflictError: the name means another artifact.
        FormatError: an adapter is refused; neither it nor the name is there.
        RemoteError: the remote stopped, or its bytes are not those that it announced.
    """
    _check_free(store, offer, name, force=force)
    with store.session() as session:
        known = store.lookup(name)
        root = _Transfer(store, remote, known).take(offer)
        session.pin(root.digest)
        above, missing = ancestors(store, remote, [root.digest], fetch=lineage)
        store.tag(root.digest, name, force=force, what=what)
    got = [root, *above]
    return Received(root.digest, sum(r.received for r in got), sum(r.skipped for r in got), tuple(missing))


def _check_free(store: Store, offer: Offer, name: RefName, *, force: bool) -> None:
    """Say before anything is fetched that a fixed tag is taken."""
    old = store.lookup(name)
    if old is None or offer.artifact in (None, old) or force or name.tag == DEFAULT_TAG:
        return
    raise ConflictError(f"{name} is {old} already; {offer.where} is {offer.artifact}: choose another tag, or --force")


def take(store: Store, remote: Remote, offer: Offer) -> Received:
    """Store one artifact that a remote offers, without a name, within a session of the store."""
    return _Transfer(store, remote, None).take(offer)


def ancestors(
    store: Store, remote: Remote, roots: Sequence[Digest], *, fetch: bool
) -> tuple[list[Received], list[Digest]]:
    """Take what artifacts were made from, as far as the remote has it; return what was done, and what nobody has.

    Without ``fetch`` only those that they were made from themselves are looked for, here.
    """
    done: list[Received] = []
    missing: list[Digest] = []
    todo, seen = list(roots), set(roots)
    while todo:
        for parent in _parents(store, todo.pop()):
            if parent in seen:
                continue
            seen.add(parent)
            if len(seen) > MAX_LINEAGE:
                raise FormatError(f"more than {MAX_LINEAGE} ancestors")
            if not store.has(parent):
                offer = remote.find(parent) if fetch else None
                if offer is None:
                    missing.append(parent)
                    continue
                done.append(take(store, remote, offer))
            if fetch:
                todo.append(parent)
    return done, missing


def _parents(store: Store, digest: Digest) -> tuple[Digest, ...]:
    derivation = store.manifest(digest).derivation
    return derivation.artifacts() if derivation else ()


class _Transfer:
    """One artifact on its way; counts bytes that came and that did not have to."""

    def __init__(self, store: Store, remote: Remote, known: Digest | None) -> None:
        self._store = store
        self._remote = remote
        self._known = store.manifest(known).files if known is not None and store.has(known) else ()
        self._received = 0
        self._skipped = 0

    def take(self, offer: Offer) -> Received:
        """Store an artifact that the remote offers."""
        files = tuple(replace(file, digest=file.digest or self._recognised(file)) for file in offer.files)
        offer = replace(offer, files=files)
        if offer.artifact is not None and self._store.has(offer.artifact):
            return Received(offer.artifact, 0, sum(file.size - file.skip for file in files))
        self._check_space(offer)
        try:
            with closing(self._weights(offer)) as chunks:
                artifact = self._store.put(
                    self._incoming(offer, chunks),
                    derivation=offer.derivation,
                    report=offer.report,
                    expected=offer.artifact,
                )
        except DigestMismatchError as error:
            raise RemoteError(f"{offer.where}: {WEIGHTS_FILE}: {error}; nothing was stored") from error
        except FormatError as error:
            raise type(error)(f"{offer.where}: {error}") from error
        return Received(artifact.digest, self._received, self._skipped)

    def _check_space(self, offer: Offer) -> None:
        """Refuse what cannot fit, before a stranger's number fills the disk."""
        wanted, free = sum(file.size for file in offer.files), _free(self._store.path)
        if wanted > free:
            number = errno.ENOSPC
            raise InputOutputError(number, f"{offer.where}: {wanted} bytes; {self._store.path} has room for {free}")

    def _incoming(self, offer: Offer, chunks: Iterator[Buffer]) -> Incoming:
        config, readme = self._small(offer, CONFIG_FILE), self._small(offer, README_FILE)
        weights = offer.file(WEIGHTS_FILE)
        if config is None or weights is None:
            raise FormatError(f"no {CONFIG_FILE} beside {WEIGHTS_FILE}")
        parse_config(config)  # before a byte of the weights is asked for
        header, chunks = _header(chunks, weights.size)
        return Incoming(config, header, chunks, readme, weights.digest)

    def _small(self, offer: Offer, path: str) -> bytes | None:
        file = offer.file(path)
        if file is None:
            return None
        if file.size > LIMITS[path]:
            raise FormatError(f"{path}: {file.size} bytes; the limit is {LIMITS[path]}")
        data = b"".join(bytes(chunk) for chunk in self._chunks(offer, file))
        data = data[len(data) - (file.size - file.skip) :]
        if file.digest is not None and Digest.of(data) != file.digest:
            raise RemoteError(
                f"{offer.where}: {path}: expected {file.digest}, the bytes that came are {Digest.of(data)}"
            )
        return data

    def _weights(self, offer: Offer) -> Generator[Buffer]:
        file = offer.file(WEIGHTS_FILE)
        if file is not None:
            yield from self._chunks(offer, file)

    def _chunks(self, offer: Offer, file: RemoteFile) -> Iterator[Buffer]:
        """Yield a file's bytes, from here where they are here."""
        stored = None if file.digest is None else File(file.path, file.digest, file.size - file.skip)
        if stored is not None and self._store.holds(stored):
            self._skipped += stored.size
            yield from self._store.chunks(stored)
            return
        for chunk in self._remote.fetch(offer, file):
            self._received += memoryview(chunk).nbytes
            yield chunk

    def _recognised(self, file: RemoteFile) -> Digest | None:
        """Git's id of a file says which one it is, if the artifact that has the name already holds the same."""
        same = (known for known in self._known if known.path == file.path and known.size == file.size)
        return next((k.digest for k in same if git_id(self._store.chunks(k), k.size) == file.git_id), None)


def _free(path: Path) -> int:
    """The bytes that still fit where a store is, or will be."""
    return disk_usage(next(place for place in (path, *path.absolute().parents) if place.exists())).free


def _header(chunks: Iterable[Buffer], size: int) -> tuple[Header, Iterator[Buffer]]:
    """Read the header from the first bytes that come, before the rest is asked for."""
    rest = iter(chunks)
    head = bytearray()
    while len(head) < min(32, size) and (chunk := next(rest, None)) is not None:
        head += chunk
    length = header_length(bytes(head[:32]), size)
    while len(head) < 8 + length and (chunk := next(rest, None)) is not None:
        head += chunk
    return parse_header(bytes(head[8 : 8 + length]), size), chain([head], rest)
