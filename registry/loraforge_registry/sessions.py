"""Pins: what a running process is about to refer to, or is reading, and so must not be collected."""

import errno
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from loraforge_registry.digest import Digest
from loraforge_registry.errors import InputOutputError
from loraforge_registry.files import Files
from loraforge_registry.system import READ_ONLY

_PIN = re.compile(rb"sha256:([0-9a-f]{64})")  # searched for: a pin that was cut short does not hide the next
_CANNOT_PIN = (*READ_ONLY, errno.ENOSPC, errno.EDQUOT)


class Session:
    """One process's pins. A collector that finds the file's flock free knows that its owner is dead."""

    def __init__(self, files: Files, fd: int, name: str) -> None:
        self.name = name
        self._files = files
        self._fd = fd

    def pin(self, *digests: Digest) -> None:
        """Keep objects from collection until the session ends; called before looking whether they exist.

        An artifact's digest keeps what its manifest names, too.
        """
        if digests:
            self._files.pin(self._fd, "".join(f"{digest}\n" for digest in digests).encode())


@contextmanager
def open_session(files: Files) -> Iterator[Session]:
    """Begin a session; it ends with the block, or with the process."""
    with files.lock("gc", shared=True):
        fd, name = files.new_session()
    try:
        yield Session(files, fd, name)
    finally:
        files.end_session(fd, name)


@contextmanager
def reading(files: Files, digest: Digest) -> Iterator[None]:
    """Keep an artifact from collection while it is read.

    Where the store cannot be written, or the disk is full, it is read unpinned: if somebody collects it meanwhile,
    the reader finds it gone, and says so.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(open_session(files)).pin(digest)
        except InputOutputError as error:
            if error.errno not in _CANNOT_PIN:
                raise
        yield


def pins_of_the_living(files: Files) -> tuple[set[Digest], set[str], set[str]]:
    """Return what running processes have pinned, their sessions, and the sessions of those that died.

    Only for a collector that holds the lock, so that nobody pins meanwhile.
    """
    pins: set[Digest] = set()
    living: set[str] = set()
    dead: set[str] = set()
    for name in files.names("sessions"):
        held = files.pins_of_the_living(name)
        if held is None:
            dead.add(name)
        else:
            living.add(name)
            pins |= {Digest("sha256", found.decode()) for found in _PIN.findall(held)}
    return pins, living, dead
