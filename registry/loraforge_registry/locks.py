"""Locks: a flock on a file that is never removed, and whether it keeps anybody out.

The kernel releases a flock with the process that held it, so there is nothing stale to break. Whether this file system
keeps that promise is tried each time a lock is taken alone.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraforge_registry.errors import InputOutputError
from loraforge_registry.system import READ_ONLY, naming

LOCKS = ("gc", "refs", "turn")
LOCK = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@dataclass(frozen=True, slots=True)
class Locks:
    """The lock files of a store: ``fd`` is their directory."""

    fd: int
    path: Path

    @contextmanager
    def hold(self, name: str, *, shared: bool = False) -> Iterator[bool]:
        """Hold ``locks/<name>``; the kernel lets go when the process dies. Yields whether it keeps others out.

        It does not where flock is missing, or grants a second holder what the first one has: then what must be
        alone has to refuse. A store that cannot be written needs no lock to be read.
        """
        try:
            fd = self._open(name)
        except InputOutputError as error:
            if shared and error.errno in READ_ONLY:
                yield False
                return
            raise
        try:
            with naming(self.path / name):
                how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                held = self._in_turn(fd, how) if name == "gc" else flock(fd, how)
            yield held and (shared or self._keeps_out(name))
        finally:
            os.close(fd)

    def _open(self, name: str) -> int:
        with naming(self.path / name):
            return os.open(name, LOCK | os.O_CREAT, 0o600, dir_fd=self.fd)

    def _in_turn(self, fd: int, how: int) -> bool:
        """Take a lock behind a turnstile: who waits to be alone waits for those inside, not for those who come."""
        turn = self._open("turn")
        try:
            flock(turn, fcntl.LOCK_EX)
            return flock(fd, how)
        finally:
            os.close(turn)

    def _keeps_out(self, name: str) -> bool:
        second = self._open(name)
        try:
            return not flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(second)


def flock(fd: int, how: int) -> bool:
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
