"""The only module here that changes a file system: every call below is one step that a crash can fall before.

Tests put their own ``os`` in place of this module's, and stop the process before each call in turn.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loraforge.errors import ConflictError, InputOutputError
from loraforge_registry.system import named_error

_CLONE = 0x40049409  # FICLONE: share a whole file's blocks where the file system can (btrfs, xfs, bcachefs)
_COPY = 64 * 1024 * 1024
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF, errno.EPERM)


def make_directory(path: Path) -> None:
    """Create a directory, and those above it; one that is there is fine."""
    if not path.parent.exists():
        make_directory(path.parent)
    with naming(path), suppress(FileExistsError):
        os.mkdir(path)  # noqa: PTH102 - through this module's os, where tests stand in


def open_new(path: Path) -> int:
    """Create a file that is not there, and open it for reading and writing."""
    with naming(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def open_existing(path: Path) -> int:
    """Open a file for reading and writing; a link is not followed."""
    with naming(path):
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def reserve(fd: int, size: int, path: Path) -> None:
    """Give a file its size, and its blocks, so that a full disk shows now."""
    with naming(path):
        if size == 0:
            return
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            os.ftruncate(fd, size)


def write_at(fd: int, data: memoryview | bytes, position: int, path: Path) -> None:
    """Write all of ``data``; a short write goes on."""
    rest = memoryview(data).cast("B")
    with naming(path):
        while rest:
            count = os.pwrite(fd, rest, position)
            position, rest = position + count, rest[count:]


def start_writing(fd: int, begin: int, size: int) -> None:
    """Let the kernel begin to put written bytes onto the disk, and do not wait: the last fsync has less to do then.

    The name of the call says otherwise, but what is not on the disk yet stays in memory, and Linux begins to write it.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, begin, size, os.POSIX_FADV_DONTNEED)


def clone(source: int, target: int, path: Path) -> bool:
    """Make ``target`` share all blocks of ``source``; False where the file system cannot."""
    with naming(path):
        try:
            fcntl.ioctl(target, _CLONE, source)
        except OSError as error:
            if error.errno in _CANNOT_COPY:
                return False
            raise
    return True


def copy_range(source: int, target: int, begin: int, end: int, path: Path) -> None:
    """Copy bytes begin to end to the same place, in the kernel where it can.

    Raises:
        InputOutputError: the source ends early, or the target cannot be written.
    """
    with naming(path):
        position = begin
        while position < end:
            count = _copy_some(source, target, position, min(end - position, _COPY))
            if count == 0:
                raise InputOutputError(errno.EIO, f"{path}: its source was cut short while it was copied")
            position += count


def _copy_some(source: int, target: int, position: int, count: int) -> int:
    try:
        return os.copy_file_range(source, target, count, position, position)
    except OSError as error:
        if error.errno not in _CANNOT_COPY:
            raise
    return os.pwrite(target, os.pread(source, min(count, 4 * 1024 * 1024), position), position)


def write_file(path: Path, data: bytes) -> None:
    """Write a new small file, durably, under a name that is not yet the one it is for."""
    fd = open_new(path)
    try:
        write_at(fd, data, 0, path)
        sync(fd, path)
    finally:
        os.close(fd)


def sync(fd: int, path: Path) -> None:
    """Make a file durable. A failed fsync is never tried again."""
    with naming(path):
        os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    with naming(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Give a file or directory another name in the same directory tree."""
    with naming(target):
        os.rename(source, target)  # noqa: PTH104 - as make_directory


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    with naming(path), suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 - as make_directory


def remove_directory(path: Path) -> None:
    """Remove a directory and what is in it; on the way it is no model with less in it."""
    with naming(path), suppress(FileNotFoundError):
        for name in os.listdir(path):
            if name.endswith(".safetensors"):
                with suppress(InputOutputError):  # a full disk may refuse a new name, and still lets go of an old one
                    rename(path / name, path / f"{name}.part")
        for name in os.listdir(path):
            inside = path / name
            if inside.is_dir() and not inside.is_symlink():
                remove_directory(inside)
            else:
                remove(inside)
        os.rmdir(path)  # noqa: PTH106 - as make_directory


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a directory by flock, which the kernel lets go of when the process dies.

    Raises:
        ConflictError: another process holds it.
    """
    with naming(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConflictError(f"{what} is being written by another process; wait for it to end") from error
    finally:
        os.close(fd)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError into one whose message names the path."""
    try:
        yield
    except (InputOutputError, BlockingIOError):
        raise
    except OSError as error:
        raise named_error(error, path) from error
