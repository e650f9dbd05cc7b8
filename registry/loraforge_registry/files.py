"""The only module that writes into a store, or opens what is in one.

Everything goes through a directory's file descriptor, never through a joined path: names are checked types, links
are not followed, and only regular files are opened. Tests inject faults here.
"""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from loraforge_registry.errors import InputOutputError, StoreError

Buffer: TypeAlias = bytes | bytearray | memoryview

FORMAT = b"loraforge-store 1\n"
AREAS = ("blobs/sha256", "manifests/sha256")
DIRECTORIES = ("blobs", "manifests", *AREAS, "refs", "reflog", "sessions", "tmp", "trash", "locks")
LOCKS = ("gc", "refs")

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # NONBLOCK: a FIFO must not hang the open
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Temporary:
    """A file in ``tmp/`` that is being written."""

    fd: int
    name: str


class Files:
    """The files of one store.

    Raises (every method):
        InputOutputError: the operating system said no; the message names the path.
        StoreError: something in the store is not a regular file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._directories: dict[str, int] = {}
        with _naming(root):
            self._directories[""] = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __del__(self) -> None:
        for fd in getattr(self, "_directories", {}).values():
            with suppress(OSError):
                os.close(fd)

    def read(self, directory: str, name: str, limit: int) -> bytes | None:
        """Return the bytes of a small file, or None where there is none."""
        fd = self.open(directory, name)
        if fd is None:
            return None
        try:
            # what is there, not the limit: reading allocates as much as it asks for
            data = os.read(fd, min(limit, os.fstat(fd).st_size) + 1)
        finally:
            os.close(fd)
        if len(data) > limit:
            raise StoreError(f"{self.root / directory / name}: more than {limit} bytes")
        return data

    def open(self, directory: str, name: str) -> int | None:
        """Open a regular file for reading, or return None where there is none."""
        try:
            fd = os.open(name, _READ, dir_fd=self._directory(directory))
        except FileNotFoundError:
            return None
        except OSError as error:
            path = self.root / directory / name
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise StoreError(f"{path}: a link or special file, expected a regular file") from error
            raise named_error(error, path) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StoreError(f"{self.root / directory / name}: not a regular file")
        return fd

    def exists(self, directory: str, name: str) -> bool:
        """Whether anything is there."""
        try:
            os.stat(name, dir_fd=self._directory(directory), follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def names(self, directory: str) -> list[str]:
        """The names in a directory, sorted."""
        with _naming(self.root / directory):
            return sorted(os.listdir(self._directory(directory)))

    def new_temporary(self) -> Temporary:
        """Create a file in ``tmp/`` under a name nobody can have planted."""
        name = secrets.token_hex(12)
        with _naming(self.root / "tmp" / name):
            return Temporary(os.open(name, _NEW, 0o600, dir_fd=self._directory("tmp")), name)

    def write(self, temporary: Temporary, data: Buffer) -> None:
        """Append all of ``data``: a short write goes on, an error does not."""
        rest = memoryview(data).cast("B")
        with _naming(self.root / "tmp" / temporary.name):
            while rest:
                rest = rest[os.write(temporary.fd, rest) :]

    def seal(self, temporary: Temporary, mode: int = 0o444) -> None:
        """Give a written file its mode and make it durable. A failed fsync is never tried again on the same file."""
        with _naming(self.root / "tmp" / temporary.name):
            os.fchmod(temporary.fd, mode)
            os.fsync(temporary.fd)

    def link(self, temporary: Temporary, directory: str, name: str) -> bool:
        """Publish under a name that nobody has; False, and nothing done, where it is taken."""
        try:
            with _naming(self.root / directory / name):
                os.link(
                    temporary.name,
                    name,
                    src_dir_fd=self._directory("tmp"),
                    dst_dir_fd=self._directory(directory),
                )
        except InputOutputError as error:
            if error.errno == errno.EEXIST:
                return False
            raise
        return True

    def rename(self, temporary: Temporary, directory: str, name: str) -> None:
        """Publish under a name, in place of what has it now."""
        with _naming(self.root / directory / name):
            os.rename(temporary.name, name, src_dir_fd=self._directory("tmp"), dst_dir_fd=self._directory(directory))

    def discard(self, temporary: Temporary) -> None:
        """Close a temporary file and remove its name, if it still has one."""
        os.close(temporary.fd)
        with _naming(self.root / "tmp" / temporary.name), suppress(FileNotFoundError):
            os.unlink(temporary.name, dir_fd=self._directory("tmp"))

    def remove(self, directory: str, name: str) -> None:
        """Remove a name."""
        with _naming(self.root / directory / name):
            os.unlink(name, dir_fd=self._directory(directory))

    def append(self, directory: str, name: str, line: bytes) -> None:
        """Append one record and make it durable, with its directory: the file may be new."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with _naming(self.root / directory / name):
            fd = os.open(name, flags, 0o644, dir_fd=self._directory(directory))
            try:
                size = os.fstat(fd).st_size
                if size and os.pread(fd, 1, size - 1) != b"\n":
                    line = b"\n" + line  # a record that a crash tore stays its own, damaged line
                if os.write(fd, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(fd)
            finally:
                os.close(fd)
        self.sync(directory)

    def sync(self, directory: str) -> None:
        """Make the names in a directory durable."""
        with _naming(self.root / directory):
            os.fsync(self._directory(directory))

    @contextmanager
    def lock(self, name: str, *, shared: bool = False) -> Iterator[None]:
        """Hold ``locks/<name>``; the kernel lets go when the process dies."""
        with _naming(self.root / "locks" / name):
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600,
                         dir_fd=self._directory("locks"))  # fmt: skip
        try:
            with _naming(self.root / "locks" / name):
                fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def new_session(self) -> tuple[int, str]:
        """Create a session file and hold it by flock, so that a collector sees that its owner lives."""
        name = secrets.token_hex(12)
        with _naming(self.root / "sessions" / name):
            fd = os.open(name, _NEW | os.O_APPEND, 0o600, dir_fd=self._directory("sessions"))
            fcntl.flock(fd, fcntl.LOCK_EX)
        return fd, name

    def pin(self, session_fd: int, line: bytes) -> None:
        """Append to an open session file, while no collector runs."""
        with self.lock("gc", shared=True), _naming(self.root / "sessions"):
            os.write(session_fd, line)

    def sync_file(self, fd: int, directory: str) -> None:
        """Make an object that is there already durable: whoever wrote it may not have got so far."""
        with _naming(self.root / directory):
            os.fsync(fd)

    def _directory(self, path: str) -> int:
        """Open a directory of the store one component at a time, so that no link leads out of it."""
        if path not in self._directories:
            parent, _, name = path.rpartition("/")
            with _naming(self.root / path):
                self._directories[path] = os.open(name, _DIRECTORY, dir_fd=self._directory(parent))
        return self._directories[path]


def make_store(root: Path) -> None:
    """Turn an empty or absent directory into a store; finish one that a crash left unmarked.

    Every shard directory exists and is durable before FORMAT says that this is a store.

    Raises:
        StoreError: the directory holds something else.
        InputOutputError: it cannot be made.
    """
    with _naming(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        strangers = sorted(set(os.listdir(root)) - {d.partition("/")[0] for d in DIRECTORIES} - {"index.sqlite"})
        if strangers:
            raise StoreError(
                f"{root} holds {strangers[0]!r} and is not a loraforge store; name an empty or absent directory"
            )
        shards = [f"{area}/{shard:02x}" for area in AREAS for shard in range(256)]
        for directory in (*DIRECTORIES, *shards):
            (root / directory).mkdir(mode=0o700, exist_ok=True)
        for name in LOCKS:
            os.close(os.open(root / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    for directory in ("", *DIRECTORIES):
        _sync_path(root / directory)
    _sync_path(root.parent)
    _write_format(root)


def check_format(root: Path) -> bool:
    """Whether a store is there.

    Raises:
        StoreError: the marker is another format's, or a directory with other things in it has none.
    """
    try:
        fd = os.open(root / "FORMAT", _READ)
    except FileNotFoundError:
        if (root / "blobs").is_dir() and (root / "refs").is_dir() and any((root / "refs").iterdir()):
            raise StoreError(f"{root} has refs but no FORMAT file; it is damaged, restore FORMAT") from None
        return False
    except NotADirectoryError as error:
        raise StoreError(f"{root} is not a directory") from error
    except OSError as error:
        raise named_error(error, root / "FORMAT") from error
    try:
        found = os.read(fd, 200) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)
    if found != FORMAT:
        raise StoreError(f"{root}/FORMAT says {found[:60]!r}, this version reads {FORMAT!r}: upgrade loraforge")
    return True


def _write_format(root: Path) -> None:
    temporary = root / "tmp" / secrets.token_hex(12)
    with _naming(root / "FORMAT"):
        fd = os.open(temporary, _NEW, 0o600)
        try:
            os.write(fd, FORMAT)
            os.fchmod(fd, 0o444)
            os.fsync(fd)
            temporary.replace(root / "FORMAT")
        finally:
            os.close(fd)
    _sync_path(root)


def _sync_path(path: Path) -> None:
    with _naming(path):
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
def _naming(path: Path) -> Iterator[None]:
    """Turn an OSError into one whose message names the path."""
    try:
        yield
    except InputOutputError:
        raise
    except OSError as error:
        raise named_error(error, path) from error
