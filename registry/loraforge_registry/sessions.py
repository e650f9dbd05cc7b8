"""Pins: what a running writer is about to refer to, and so must not be collected."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from loraforge_registry.digest import Digest
from loraforge_registry.files import Files


class Session:
    """One writer's pins. A collector that finds the file's flock free knows that its owner is dead."""

    def __init__(self, files: Files, fd: int) -> None:
        self._files = files
        self._fd = fd

    def pin(self, digest: Digest) -> None:
        """Keep ``digest`` from collection until the session ends; called before looking whether it exists."""
        self._files.pin(self._fd, f"{digest}\n".encode())


@contextmanager
def open_session(files: Files) -> Iterator[Session]:
    """Begin a session; it ends with the block, or with the process."""
    with files.lock("gc", shared=True):
        fd, name = files.new_session()
    try:
        yield Session(files, fd)
    finally:
        files.remove("sessions", name)
        os.close(fd)
