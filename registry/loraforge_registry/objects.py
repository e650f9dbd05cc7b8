"""Blobs and manifests: immutable bytes under the name of their own SHA-256."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from loraforge_registry.digest import Digest
from loraforge_registry.errors import DigestMismatchError, NotFoundError, ReferenceSyntaxError, StoreError
from loraforge_registry.files import Files, Temporary
from loraforge_registry.new_store import SHARDS
from loraforge_registry.sessions import Session
from loraforge_registry.system import Buffer, read_chunks

BLOBS = "blobs/sha256"
MANIFESTS = "manifests/sha256"

_PARALLEL_FROM = 1024 * 1024  # below this a thread's start costs more than the hash
_FLUSH_EVERY = 16  # chunks; the disk then writes while the next are hashed, and the last fsync is short


def put(
    files: Files,
    session: Session,
    area: str,
    chunks: Iterable[Buffer],
    *,
    expected: Digest | None = None,
    observe: Callable[[Buffer], None] | None = None,
    check: Callable[[], None] | None = None,
) -> tuple[Digest, int]:
    """Store bytes and return their digest and length; durable when this returns.

    ``observe`` sees every chunk, in order, from another thread; ``check`` runs behind the last one, and what it raises
    keeps the bytes from being published. The order of steps is SPEC.md section 7.

    Cost: one read of ``chunks``, one write; SHA-256, ``observe`` and the write run side by side.

    Raises:
        DigestMismatchError: the bytes are not those of ``expected``; nothing is published.
        InputOutputError: the bytes could not be written; nothing is left but what is in ``tmp/`` after a crash.
    """
    temporary = files.new_temporary(session.name)
    try:
        digest, size = _write_hashed(files, temporary, chunks, observe)
        if expected is not None and digest != expected:
            raise DigestMismatchError(f"expected {expected}, the bytes that came are {digest}")
        if check is not None:
            check()
        session.pin(digest)
        if is_whole(files, area, digest, size):
            make_durable(files, area, digest)
        else:
            files.seal(temporary)
            _publish(files, temporary, area, digest, size)
    finally:
        files.discard(temporary)
    return digest, size


def read_all(files: Files, area: str, digest: Digest, limit: int) -> bytes:
    """Return the bytes of an object, checked against its name.

    Raises:
        NotFoundError: it is not there.
        StoreError: its bytes are not the ones its name promises.
    """
    data = files.read(shard(area, digest), digest.hex, limit)
    if data is None:
        raise NotFoundError(f"{digest} is not in the store {files.root}")
    if Digest.of(data) != digest:
        raise StoreError(f"{files.root}: the bytes stored as {digest} are damaged")
    return data


@contextmanager
def opened(files: Files, area: str, digest: Digest, size: int) -> Iterator[int]:
    """Open an object whose length is known; the bytes are not hashed.

    Raises:
        NotFoundError: it is not there.
        StoreError: its length is another.
    """
    with files.opened(shard(area, digest), digest.hex) as fd:
        found = files.size(shard(area, digest), digest.hex)
        if fd is None or found is None:
            raise NotFoundError(f"{digest} is not in the store {files.root}")
        if found != size:
            raise StoreError(f"{files.root}: {digest} has {found} bytes, expected {size}: it is damaged")
        yield fd


def verified(files: Files, area: str, digest: Digest, size: int) -> Iterator[Buffer]:
    """Yield an object's bytes; what is damaged raises at its end.

    Raises:
        NotFoundError: it is not there.
        StoreError: its bytes are not the ones its name promises.
    """
    sha256 = hashlib.sha256()
    with opened(files, area, digest, size) as fd:
        for chunk in read_chunks(fd):
            sha256.update(chunk)
            yield chunk
    if sha256.hexdigest() != digest.hex:
        raise StoreError(f"{files.root}: the bytes stored as {digest} are damaged")


def list_digests(files: Files, area: str, prefix: str = "") -> Iterator[Digest]:
    """Yield the digests in an area whose hex begins with ``prefix``; names that are no digest are passed over."""
    for part in [prefix[:2]] if len(prefix) >= 2 else SHARDS:
        for name in files.names(f"{area}/{part}"):
            if name.startswith(prefix) and (digest := _digest(name)) is not None:
                yield digest


def is_whole(files: Files, area: str, digest: Digest, size: int | None = None) -> bool:
    """Whether an object is there with the bytes its name promises, and the length, where that is known."""
    found = files.size(shard(area, digest), digest.hex)
    if found is None or size not in (None, found):
        return False
    sha256 = hashlib.sha256()
    for chunk in files.chunks(shard(area, digest), digest.hex):
        sha256.update(chunk)
    return sha256.hexdigest() == digest.hex


def make_durable(files: Files, area: str, digest: Digest) -> None:
    """Make an object that is there last, and its name: whoever wrote it may not have got so far.

    Raises:
        NotFoundError: it is not there.
    """
    with files.opened(shard(area, digest), digest.hex) as fd:
        if fd is None:
            raise NotFoundError(f"{digest} is not in the store {files.root}")
        files.sync_file(fd, shard(area, digest))
    files.sync(shard(area, digest))


def shard(area: str, digest: Digest) -> str:
    """The directory of an object."""
    return f"{area}/{digest.hex[:2]}"


def _publish(files: Files, temporary: Temporary, area: str, digest: Digest, size: int) -> None:
    directory = shard(area, digest)
    if not files.link(temporary, directory, digest.hex):
        if is_whole(files, area, digest, size):
            return make_durable(files, area, digest)
        files.rename(temporary, directory, digest.hex)  # the name was taken by damaged bytes; these are right
    return files.sync(directory)


def _write_hashed(
    files: Files, temporary: Temporary, chunks: Iterable[Buffer], observe: Callable[[Buffer], None] | None
) -> tuple[Digest, int]:
    from concurrent.futures import Future, ThreadPoolExecutor  # noqa: PLC0415 - only writers pay for it

    sha256 = hashlib.sha256()
    observers = [sha256.update, *([observe] if observe else [])]
    size = 0
    flush: Future[None] | None = None
    with ThreadPoolExecutor(3) as pool:
        for number, chunk in enumerate(chunks):
            length = memoryview(chunk).nbytes
            if length < _PARALLEL_FROM:
                for observer in observers:
                    observer(chunk)
                files.write(temporary, chunk)
            else:
                jobs = [pool.submit(observer, chunk) for observer in observers]
                files.write(temporary, chunk)
                for job in jobs:
                    job.result()
                if number % _FLUSH_EVERY == _FLUSH_EVERY - 1 and (flush is None or flush.done()):
                    # only a head start for the disk: seal() is what makes the file durable, and reports errors
                    flush = pool.submit(files.flush, temporary)
            size += length
        if flush is not None:
            flush.result()
    return Digest("sha256", sha256.hexdigest()), size


def _digest(name: str) -> Digest | None:
    try:
        return Digest("sha256", name)
    except ReferenceSyntaxError:
        return None
