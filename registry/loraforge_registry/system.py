"""What several modules ask of the operating system: whole writes, reading by pread, errors that name a path."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from loraforge_registry.errors import InputOutputError

Buffer: TypeAlias = bytes | bytearray | memoryview

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # NONBLOCK: a FIFO must not hang the open
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
CHUNK = 8 * 1024 * 1024


def read_chunks(fd: int) -> Iterator[memoryview]:
    """Yield a file from its beginning to its end, by pread: a file that shrinks meanwhile ends early, no more.

    A chunk is valid until the next one is asked for: they share one buffer.
    """
    buffer = memoryview(bytearray(min(CHUNK, os.fstat(fd).st_size + 1)))
    position = 0
    while count := os.preadv(fd, [buffer], position):
        yield buffer[:count]
        position += count


def write_new(path: Path, chunks: Iterable[Buffer]) -> None:
    """Write a user's file, which must not exist, and make it durable."""
    with naming(path):
        fd = os.open(path, NEW, 0o666)
    try:
        for chunk in chunks:
            with naming(path):
                write_all(fd, chunk)
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def remove_path(path: Path) -> None:
    """Remove a user's file, where it is there."""
    with naming(path), suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 - what tests count


def write_all(fd: int, data: Buffer) -> None:
    """Write all of ``data``: a short write goes on, an error does not."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_path(path: Path) -> None:
    """Make the names in a directory durable."""
    with naming(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def named_error(error: OSError, path: Path) -> InputOutputError:
    """An OSError as one whose message names the path."""
    number = error.errno or 0
    return InputOutputError(number, f"{path}: {os.strerror(number)}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError into one whose message names the path."""
    try:
        yield
    except InputOutputError:
        raise
    except OSError as error:
        raise named_error(error, path) from error
