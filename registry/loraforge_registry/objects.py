"""Blobs and manifests: immutable bytes under the name of their own SHA-256."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator

from loraforge_registry.digest import Digest
from loraforge_registry.errors import NotFoundError, ReferenceSyntaxError, StoreError
from loraforge_registry.files import Buffer, Files, Temporary
from loraforge_registry.sessions import Session

BLOBS = "blobs/sha256"
MANIFESTS = "manifests/sha256"

CHUNK = 8 * 1024 * 1024
_PARALLEL_FROM = 1024 * 1024  # below this a thread's start costs more than the hash
_FLUSH_EVERY = 16  # chunks; the disk then writes while the next are hashed, and the last fsync is short


def put(
    files: Files,
    session: Session,
    area: str,
    chunks: Iterable[Buffer],
    *,
    observe: Callable[[Buffer], None] | None = None,
    check: Callable[[], None] | None = None,
) -> tuple[Digest, int]:
    """Store bytes and return their digest and length; durable when this returns.

    ``observe`` sees every chunk, in order, from another thread; ``check`` runs behind the last one, and what it raises
    keeps the bytes from being published. The order of steps is SPEC.md section 7.

    Cost: one read of ``chunks``, one write; SHA-256, ``observe`` and the write run side by side.

    Raises:
        InputOutputError: the bytes could not be written; nothing is left but what is in ``tmp/`` after a crash.
    """
    temporary = files.new_temporary()
    try:
        digest, size = _write_hashed(files, temporary, chunks, observe)
        if check is not None:
            check()
        session.pin(digest)
        files.seal(temporary)
        directory = _shard(area, digest)
        if not files.link(temporary, directory, digest.hex) and not _is_intact(files, area, digest, size):
            files.rename(temporary, directory, digest.hex)  # the name was taken by damaged bytes; these are right
        files.sync(directory)
    finally:
        files.discard(temporary)
    return digest, size


def read_all(files: Files, area: str, digest: Digest, limit: int) -> bytes:
    """Return the bytes of an object, checked against its name.

    Raises:
        NotFoundError: it is not there.
        StoreError: its bytes are not the ones its name promises.
    """
    data = files.read(_shard(area, digest), digest.hex, limit)
    if data is None:
        raise NotFoundError(f"{digest} is not in the store {files.root}")
    if Digest.of(data) != digest:
        raise StoreError(f"{files.root}: the bytes stored as {digest} are damaged")
    return data


def open_object(files: Files, area: str, digest: Digest, size: int) -> int:
    """Open an object whose length is known; the bytes are not hashed.

    Raises:
        NotFoundError: it is not there.
        StoreError: its length is another.
    """
    fd = files.open(_shard(area, digest), digest.hex)
    if fd is None:
        raise NotFoundError(f"{digest} is not in the store {files.root}")
    found = os.fstat(fd).st_size
    if found != size:
        os.close(fd)
        raise StoreError(f"{files.root}: {digest} has {found} bytes, expected {size}: it is damaged")
    return fd


def read_chunks(fd: int) -> Iterator[memoryview]:
    """Yield a file from its beginning to its end, by pread: a file that shrinks meanwhile ends early, no more.

    A chunk is valid until the next one is asked for: they share one buffer.
    """
    buffer = memoryview(bytearray(min(CHUNK, os.fstat(fd).st_size + 1)))
    position = 0
    while count := os.preadv(fd, [buffer], position):
        yield buffer[:count]
        position += count


def list_digests(files: Files, area: str, prefix: str = "") -> Iterator[Digest]:
    """Yield the digests in an area whose hex begins with ``prefix``; names that are no digest are passed over."""
    shards = [prefix[:2]] if len(prefix) >= 2 else [f"{shard:02x}" for shard in range(256)]
    for shard in shards:
        for name in files.names(f"{area}/{shard}"):
            if name.startswith(prefix) and (digest := _digest(name)) is not None:
                yield digest


def size_of(files: Files, area: str, digest: Digest) -> int:
    """The length of an object; 0 where it is missing."""
    fd = files.open(_shard(area, digest), digest.hex)
    if fd is None:
        return 0
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


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
                    flush = pool.submit(os.fdatasync, temporary.fd)
            size += length
        if flush is not None:
            flush.result()
    return Digest("sha256", sha256.hexdigest()), size


def _is_intact(files: Files, area: str, digest: Digest, size: int) -> bool:
    """Whether the object that has this name holds these bytes; if so, make it durable: its writer may not have."""
    fd = files.open(_shard(area, digest), digest.hex)
    if fd is None:
        return False
    try:
        sha256 = hashlib.sha256()
        if os.fstat(fd).st_size != size:
            return False
        for chunk in read_chunks(fd):
            sha256.update(chunk)
        if sha256.hexdigest() != digest.hex:
            return False
        files.sync_file(fd, _shard(area, digest))
    finally:
        os.close(fd)
    return True


def _digest(name: str) -> Digest | None:
    try:
        return Digest("sha256", name)
    except ReferenceSyntaxError:
        return None


def _shard(area: str, digest: Digest) -> str:
    return f"{area}/{digest.hex[:2]}"
