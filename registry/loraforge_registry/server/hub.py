"""What every handler is given: the store's two faces, who may do what, the limits, and what waits for a commit."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loraforge_registry.digest import Digest
from loraforge_registry.server.accounts import Accounts
from loraforge_registry.server.interfaces import Blobs, Refs
from loraforge_registry.server.tickets import Signer

MEBI = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """The limits of a server, in bytes, and whom it answers."""

    anonymous: bool = True  # whether who has no token may read what is not private
    hosts: frozenset[str] = frozenset()  # names a request may call this server by, beside addresses and localhost
    public_url: str | None = None
    max_file: int = 64 * 1024 * MEBI
    max_inline: int = 10 * MEBI  # of one file that lies in a commit itself
    max_commit: int = 256 * MEBI  # of a commit's body
    quota: int | None = None  # of all files in a namespace
    inline_below: int = MEBI  # a client is asked to send larger files apart
    multipart_above: int = 4096 * MEBI
    part_size: int = 256 * MEBI


class Staged:
    """What each user has uploaded, and may name in a commit: nobody gets at bytes by knowing their digest alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes: dict[tuple[str, Digest], tuple[int, float]] = {}

    def add(self, user: str, digest: Digest, size: int) -> None:
        """Remember that a user sent these bytes."""
        now = time.monotonic()
        with self._lock:
            for key in [key for key, (_, when) in self._sizes.items() if when < now - 24 * 3600]:
                del self._sizes[key]
            self._sizes[user, digest] = (size, now)

    def size(self, user: str, digest: Digest) -> int | None:
        """How long what a user sent is, if it did."""
        with self._lock:
            found = self._sizes.get((user, digest))
        return None if found is None else found[0]

    def waiting(self, user: str) -> Iterator[tuple[Digest, int]]:
        """What a user sent, with its size."""
        with self._lock:
            found = [(digest, size) for (who, digest), (size, _) in self._sizes.items() if who == user]
        return iter(found)


@dataclass(frozen=True)
class Hub:
    """The parts of one server."""

    blobs: Blobs
    refs: Refs
    accounts: Accounts
    signer: Signer
    scratch: Path  # parts and xorbs of uploads that are under way
    settings: Settings = field(default_factory=Settings)
    staged: Staged = field(default_factory=Staged)
