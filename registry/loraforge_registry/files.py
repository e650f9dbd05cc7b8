"""The only module that writes into a store, or opens what is in one.

Everything goes through a directory's file descriptor, never through a joined path: names are checked types, links
are not followed, and only regular files are opened. Tests inject faults here.

A lock is a flock on a file that is never removed: the kernel releases it with the process that held it, so there is
nothing stale to break. Whether this file system keeps that promise is tried each time a lock is taken alone.
"""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from loraforge_registry.errors import InputOutputError, StoreError

Buffer: TypeAlias = bytes | bytearray | memoryview

FORMAT = b"loraforge-store 1\n"
AREAS = ("blobs/sha256", "manifests/sha256")
DIRECTORIES = ("blobs", "manifests", *AREAS, "refs", "reflog", "sessions", "tmp", "trash", "quarantine", "locks")
SHARDS = tuple(f"{shard:02x}" for shard in range(256))
LOCKS = ("gc", "refs", "turn")

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # NONBLOCK: a FIFO must not hang the open
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_LOCK = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
CHUNK = 8 * 1024 * 1024
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

    @contextmanager
    def opened(self, directory: str, name: str) -> Iterator[int | None]:
        """Open a regular file for a while."""
        fd = self.open(directory, name)
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def chunks(self, directory: str, name: str) -> Iterator[Buffer]:
        """Yield a file from its beginning to its end; nothing where there is none."""
        with self.opened(directory, name) as fd, _naming(self.root / directory / name):
            if fd is not None:
                yield from read_chunks(fd)

    def size(self, directory: str, name: str) -> int | None:
        """The length of a regular file, or None where there is none."""
        with self.opened(directory, name) as fd:
            return None if fd is None else os.fstat(fd).st_size

    def exists(self, directory: str, name: str) -> bool:
        """Whether anything is there."""
        with _naming(self.root / directory / name):
            try:
                os.stat(name, dir_fd=self._directory(directory), follow_symlinks=False)
            except FileNotFoundError:
                return False
        return True

    def names(self, directory: str) -> list[str]:
        """The names in a directory, sorted."""
        with _naming(self.root / directory):
            return sorted(os.listdir(self._directory(directory)))

    def new_temporary(self, session: str) -> Temporary:
        """Create a file in ``tmp/`` under a name nobody can have planted, and which says whose it is."""
        name = f"{session}.{secrets.token_hex(12)}"
        with _naming(self.root / "tmp" / name):
            return Temporary(os.open(name, _NEW, 0o600, dir_fd=self._directory("tmp")), name)

    def write(self, temporary: Temporary, data: Buffer) -> None:
        """Append all of ``data``: a short write goes on, an error does not."""
        with _naming(self.root / "tmp" / temporary.name):
            _write_all(temporary.fd, data)

    def flush(self, temporary: Temporary) -> None:
        """Give the disk a head start; ``seal`` is what makes the file durable."""
        os.fdatasync(temporary.fd)

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

    def move(self, directory: str, name: str, target: str, new_name: str) -> None:
        """Give a file another name in another directory of the store; one that is not there is passed over."""
        with _naming(self.root / directory / name), suppress(FileNotFoundError):
            os.rename(name, new_name, src_dir_fd=self._directory(directory), dst_dir_fd=self._directory(target))

    def keep_copy(self, directory: str, name: str, target: str, new_name: str) -> None:
        """Give a file a second name in another directory; what is no regular file is moved there."""
        source, there = self._directory(directory), self._directory(target)
        with _naming(self.root / directory / name), suppress(FileNotFoundError):
            if stat.S_ISREG(os.stat(name, dir_fd=source, follow_symlinks=False).st_mode):
                os.link(name, new_name, src_dir_fd=source, dst_dir_fd=there, follow_symlinks=False)
            else:
                os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=there)

    def make_directory(self, path: str) -> None:
        """Make a directory that a store has, durably, where it is missing."""
        parent, _, name = path.rpartition("/")
        with _naming(self.root / path), suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self._directory(parent))
        self.sync(parent)

    def remove(self, directory: str, name: str) -> None:
        """Remove a name; one that is not there is passed over."""
        with _naming(self.root / directory / name), suppress(FileNotFoundError):
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
    def lock(self, name: str, *, shared: bool = False) -> Iterator[bool]:
        """Hold ``locks/<name>``; the kernel lets go when the process dies. Yields whether it keeps others out.

        It does not where flock is missing, or grants a second holder what the first one has: then what must be
        alone has to refuse. A store that cannot be written needs no lock to be read.
        """
        try:
            fd = self._open_lock(name)
        except InputOutputError as error:
            if shared and error.errno in READ_ONLY:
                yield False
                return
            raise
        try:
            with _naming(self.root / "locks" / name):
                how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                held = self._flock_in_turn(fd, how) if name == "gc" else _flock(fd, how)
            yield held and (shared or self._keeps_out(name))
        finally:
            os.close(fd)

    def _open_lock(self, name: str) -> int:
        with _naming(self.root / "locks" / name):
            return os.open(name, _LOCK | os.O_CREAT, 0o600, dir_fd=self._directory("locks"))

    def _flock_in_turn(self, fd: int, how: int) -> bool:
        """Take a lock behind a turnstile: who waits to be alone waits for those inside, not for those who come."""
        turn = self._open_lock("turn")
        try:
            _flock(turn, fcntl.LOCK_EX)
            return _flock(fd, how)
        finally:
            os.close(turn)

    def _keeps_out(self, name: str) -> bool:
        second = self._open_lock(name)
        try:
            return not _flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(second)

    def new_session(self) -> tuple[int, str]:
        """Create a session file and hold it by flock, so that a collector sees that its owner lives."""
        name = secrets.token_hex(12)
        with _naming(self.root / "sessions" / name):
            fd = os.open(name, _NEW | os.O_APPEND, 0o600, dir_fd=self._directory("sessions"))
            try:
                _flock(fd, fcntl.LOCK_EX)
            except OSError:
                os.close(fd)
                raise
        return fd, name

    def end_session(self, fd: int, name: str) -> None:
        """Remove a session file, and let go of it."""
        try:
            self.remove("sessions", name)
        finally:
            os.close(fd)

    def pin(self, session_fd: int, lines: bytes) -> None:
        """Append to an open session file, while no collector runs."""
        with self.lock("gc", shared=True), _naming(self.root / "sessions"):
            if os.write(session_fd, lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def pins_of_the_living(self, session: str) -> bytes | None:
        """What a session file holds while its owner lives; None when nobody holds it any more."""
        try:
            with _naming(self.root / "sessions" / session):
                fd = os.open(session, _LOCK | os.O_NONBLOCK, dir_fd=self._directory("sessions"))
        except InputOutputError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        try:
            if _flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return None
            # through the descriptor: by its name the file could be gone by now, and its owner's last step unseen
            return b"".join(bytes(chunk) for chunk in read_chunks(fd))
        finally:
            os.close(fd)

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
    with _naming(path):
        fd = os.open(path, _NEW, 0o666)
    try:
        for chunk in chunks:
            with _naming(path):
                _write_all(fd, chunk)
        with _naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def remove_path(path: Path) -> None:
    """Remove a user's file, where it is there."""
    with _naming(path), suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 - what tests count


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
        shards = [f"{area}/{shard}" for area in AREAS for shard in SHARDS]
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
        lock = os.open(root / "locks" / "gc", _LOCK)
        try:
            _flock(lock, fcntl.LOCK_SH)  # where another process has just made this store, it may collect already
            fd = os.open(temporary, _NEW, 0o600)
            try:
                _write_all(fd, FORMAT)
                os.fchmod(fd, 0o444)
                os.fsync(fd)
                temporary.replace(root / "FORMAT")
            finally:
                os.close(fd)
        finally:
            os.close(lock)
    _sync_path(root)


def _write_all(fd: int, data: Buffer) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def _flock(fd: int, how: int) -> bool:
    """Take a lock; False where somebody else has it, or where this file system has none to give."""
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return False
        raise
    return True


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
