"""The two things a server stands on: bytes by digest, and names that move by compare-and-swap.

``local`` puts both on one store. docs/adr/0014 shows how blobs in an object store and names in a database would be one
more module each: nothing else of the server knows where either lies.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from loraforge_registry.digest import Digest
from loraforge_registry.facts import Facts
from loraforge_registry.records import Record
from loraforge_registry.repositories import Outline
from loraforge_registry.tree_facts import TreeFacts

Buffer = bytes | bytearray | memoryview


class Blobs(Protocol):
    """Immutable bytes under their SHA-256. What was put stays until nothing needs it any more."""

    def size(self, digest: Digest) -> int | None:
        """The length of a blob, or None where it is not there; from here on it stays for an hour at least."""

    def read(self, digest: Digest, begin: int, end: int) -> Iterator[Buffer]:
        """Yield a range of a blob in pieces, each valid until the next.

        Raises:
            NotFoundError: it is not there.
        """

    def put(self, chunks: Iterable[Buffer], expected: Digest | None = None) -> tuple[Digest, int]:
        """Store bytes; durable when this returns.

        Raises:
            StoreError: the bytes are not those of ``expected``.
        """


class Refs(Protocol):
    """Records under their SHA-256, and names for them."""

    def names(self) -> dict[str, list[str]]:
        """All names, sorted, and what each one's tags are called: one question, however many there are."""

    def tags(self, name: str, called: Sequence[str] | None = None) -> dict[str, Digest]:
        """What a name's tags mean; ``called`` is what ``names`` said of it, where that is known."""

    def read(self, name: str) -> Digest | None:
        """What ``name:latest`` means: for a repository, its record."""

    def swap(self, name: str, expected: Digest | None, new: Digest | None, *, who: str, what: str) -> bool:
        """Move ``name:latest``, durably, if it means ``expected`` now; False, and nothing done, where it does not."""

    def record(self, digest: Digest) -> Record:
        """Read a record.

        Raises:
            NotFoundError: it is not there.
        """

    def past(self, digest: Digest) -> Iterator[tuple[Digest, Outline]]:
        """Yield a commit and all before it, newest first, quickly; nothing for another record.

        Raises:
            NotFoundError: it is not there.
        """

    def blobs(self, digest: Digest) -> dict[Digest, int] | None:
        """The files of a commit with their sizes, quickly; None for another record (``repositories.blobs_in``).

        Raises:
            NotFoundError: it is not there.
        """

    def facts(self, digest: Digest) -> Facts | TreeFacts | None:
        """What lists say of an artifact or a tree, quickly; None for another record (``facts.facts_of``).

        Raises:
            NotFoundError: it is not there.
        """

    def put_record(self, data: bytes) -> Digest:
        """Store a record, durably; what it needs is there already."""
