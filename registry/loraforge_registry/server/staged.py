"""What each user has uploaded, and may name in a commit: nobody gets at bytes by knowing their digest alone.

It outlives the server: an upload that was acknowledged is not sent again because the server was started anew before its
commit. A journal has a line for each; what is in it, and still in the store, is pinned when the next server begins.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from loraforge_registry.digest import Digest
from loraforge_registry.errors import ReferenceSyntaxError
from loraforge_registry.system import write_all

KEPT = 24 * 3600.0  # seconds that an upload waits for its commit


class Staged:
    """Uploads by user and digest. ``size_of`` gives the length of a blob, and pins it."""

    def __init__(self, journal: Path, size_of: Callable[[Digest], int | None]) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._sizes: dict[tuple[str, Digest], tuple[int, float]] = {}
        for user, digest, size, when in _read(journal):
            if size_of(digest) == size:
                self._sizes[user, digest] = (size, when)
        self._rewrite()

    def add(self, user: str, digest: Digest, size: int) -> None:
        """Remember, durably, that a user sent these bytes."""
        now = time.time()
        with self._lock:
            old = [key for key, (_, when) in self._sizes.items() if not now - KEPT < when < now + KEPT]
            for key in old:
                del self._sizes[key]
            self._sizes[user, digest] = (size, now)
            if len(old) > 1000:
                self._rewrite()
            else:
                self._write(os.O_APPEND, _line(user, digest, size, now))

    def size(self, user: str, digest: Digest) -> int | None:
        """How long what a user sent is, if it did."""
        with self._lock:
            found = self._sizes.get((user, digest))
        return None if found is None else found[0]

    def _rewrite(self) -> None:
        lines = [_line(user, digest, size, when) for (user, digest), (size, when) in self._sizes.items()]
        new = self._journal.with_suffix(".new")
        self._write(os.O_TRUNC, "".join(lines), new)
        new.replace(self._journal)

    def _write(self, flag: int, text: str, path: Path | None = None) -> None:
        fd = os.open(path or self._journal, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flag, 0o600)
        try:
            write_all(fd, text.encode())
            os.fdatasync(fd)
        finally:
            os.close(fd)


def _line(user: str, digest: Digest, size: int, when: float) -> str:
    return json.dumps([user, digest.hex, size, when]) + "\n"


def _read(journal: Path) -> list[tuple[str, Digest, int, float]]:
    """Return what is still waited for; a line that a crash tore is passed over."""
    found, now = [], time.time()
    lines = journal.read_bytes().splitlines() if journal.exists() else []
    for line in lines:
        with suppress(ValueError, TypeError, ReferenceSyntaxError):
            user, hexed, size, when = json.loads(line)
            if now - KEPT < when < now + KEPT:
                found.append((str(user), Digest("sha256", hexed), int(size), float(when)))
    return found
