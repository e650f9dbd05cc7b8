"""Everything that is written into a store, or read from one: the files of a store that exists.

Everything goes through a directory's file descriptor, never through a joined path: names are checked types, links
are not followed, and only regular files are opened. Tests inject faults into the calls made here, in ``locks`` and in
``new_store``: no other module makes any.
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

from loraforge_registry.errors import InputOutputError, StoreError
from loraforge_registry.locks import LOCK, Locks, flock
from loraforge_registry.system import NEW, READ, Buffer, named_error, naming, read_chunks, write_all

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
        with naming(root):
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
            fd = os.open(name, READ, dir_fd=self._directory(directory))
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
        with self.opened(directory, name) as fd, naming(self.root / directory / name):
            if fd is not None:
                yield from read_chunks(fd)

    def size(self, directory: str, name: str) -> int | None:
        """The length of a regular file, or None where there is none."""
        with self.opened(directory, name) as fd:
            return None if fd is None else os.fstat(fd).st_size

    def exists(self, directory: str, name: str) -> bool:
        """Whether anything is there."""
        with naming(self.root / directory / name):
            try:
                os.stat(name, dir_fd=self._directory(directory), follow_symlinks=False)
            except FileNotFoundError:
                return False
        return True

    def names(self, directory: str) -> list[str]:
        """The names in a directory, sorted."""
        with naming(self.root / directory):
            # a descriptor of its own: where a listing is lies in the descriptor, and threads would share that
            fd = os.open(".", _DIRECTORY, dir_fd=self._directory(directory))
            try:
                return sorted(os.listdir(fd))
            finally:
                os.close(fd)

    def new_temporary(self, session: str) -> Temporary:
        """Create a file in ``tmp/`` under a name nobody can have planted, and which says whose it is."""
        name = f"{session}.{secrets.token_hex(12)}"
        with naming(self.root / "tmp" / name):
            return Temporary(os.open(name, NEW, 0o600, dir_fd=self._directory("tmp")), name)

    def write(self, temporary: Temporary, data: Buffer) -> None:
        """Append all of ``data``: a short write goes on, an error does not."""
        with naming(self.root / "tmp" / temporary.name):
            write_all(temporary.fd, data)

    def flush(self, temporary: Temporary) -> None:
        """Give the disk a head start; ``seal`` is what makes the file durable."""
        os.fdatasync(temporary.fd)

    def seal(self, temporary: Temporary, mode: int = 0o444) -> None:
        """Give a written file its mode and make it durable. A failed fsync is never tried again on the same file."""
        with naming(self.root / "tmp" / temporary.name):
            os.fchmod(temporary.fd, mode)
            os.fsync(temporary.fd)

    def link(self, temporary: Temporary, directory: str, name: str) -> bool:
        """Publish under a name that nobody has; False, and nothing done, where it is taken."""
        try:
            with naming(self.root / directory / name):
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
        with naming(self.root / directory / name):
            os.rename(temporary.name, name, src_dir_fd=self._directory("tmp"), dst_dir_fd=self._directory(directory))

    def discard(self, temporary: Temporary) -> None:
        """Close a temporary file and remove its name, if it still has one."""
        os.close(temporary.fd)
        with naming(self.root / "tmp" / temporary.name), suppress(FileNotFoundError):
            os.unlink(temporary.name, dir_fd=self._directory("tmp"))

    def move(self, directory: str, name: str, target: str, new_name: str) -> None:
        """Give a file another name in another directory of the store; one that is not there is passed over."""
        with naming(self.root / directory / name), suppress(FileNotFoundError):
            os.rename(name, new_name, src_dir_fd=self._directory(directory), dst_dir_fd=self._directory(target))

    def keep_copy(self, directory: str, name: str, target: str, new_name: str) -> None:
        """Give a file a second name in another directory; what is no regular file is moved there."""
        source, there = self._directory(directory), self._directory(target)
        with naming(self.root / directory / name), suppress(FileNotFoundError):
            if stat.S_ISREG(os.stat(name, dir_fd=source, follow_symlinks=False).st_mode):
                os.link(name, new_name, src_dir_fd=source, dst_dir_fd=there, follow_symlinks=False)
            else:
                os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=there)

    def make_directory(self, path: str) -> None:
        """Make a directory that a store has, durably, where it is missing."""
        parent, _, name = path.rpartition("/")
        with naming(self.root / path), suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self._directory(parent))
        self.sync(parent)

    def remove(self, directory: str, name: str) -> None:
        """Remove a name; one that is not there is passed over."""
        with naming(self.root / directory / name), suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._directory(directory))

    def append(self, directory: str, name: str, line: bytes) -> None:
        """Append one record and make it durable, with its directory: the file may be new."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with naming(self.root / directory / name):
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
        with naming(self.root / directory):
            os.fsync(self._directory(directory))

    @contextmanager
    def lock(self, name: str, *, shared: bool = False) -> Iterator[bool]:
        """Hold ``locks/<name>`` (see ``locks.Locks.hold``)."""
        with Locks(self._directory("locks"), self.root / "locks").hold(name, shared=shared) as alone:
            yield alone

    def new_session(self) -> tuple[int, str]:
        """Create a session file and hold it by flock, so that a collector sees that its owner lives."""
        name = secrets.token_hex(12)
        with naming(self.root / "sessions" / name):
            fd = os.open(name, NEW | os.O_APPEND, 0o600, dir_fd=self._directory("sessions"))
            try:
                flock(fd, fcntl.LOCK_EX)
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
        with self.lock("gc", shared=True), naming(self.root / "sessions"):
            if os.write(session_fd, lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def pins_of_the_living(self, session: str) -> bytes | None:
        """What a session file holds while its owner lives; None when nobody holds it any more."""
        try:
            with naming(self.root / "sessions" / session):
                fd = os.open(session, LOCK | os.O_NONBLOCK, dir_fd=self._directory("sessions"))
        except InputOutputError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        try:
            if flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return None
            # through the descriptor: by its name the file could be gone by now, and its owner's last step unseen
            return b"".join(bytes(chunk) for chunk in read_chunks(fd))
        finally:
            os.close(fd)

    def sync_file(self, fd: int, directory: str) -> None:
        """Make an object that is there already durable: whoever wrote it may not have got so far."""
        with naming(self.root / directory):
            os.fsync(fd)

    def _directory(self, path: str) -> int:
        """Open a directory of the store one component at a time, so that no link leads out of it."""
        if path not in self._directories:
            parent, _, name = path.rpartition("/")
            above = self._directory(parent)
            try:
                self._directories[path] = os.open(name, _DIRECTORY, dir_fd=above)
            except FileNotFoundError as error:
                said = f"{self.root / path} is missing: loraforge fsck --repair makes it again"
                raise InputOutputError(errno.ENOENT, said) from error
            except OSError as error:
                raise named_error(error, self.root / path) from error
        return self._directories[path]
