"""Blobs and names on one store, which ``loraforge`` on the same machine uses, too."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache

from loraforge_registry import canonical, objects, refs
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, NotFoundError, StoreError
from loraforge_registry.files import Files
from loraforge_registry.names import DEFAULT_TAG, RefName
from loraforge_registry.records import Record, Records
from loraforge_registry.repositories import outline
from loraforge_registry.sessions import Session, open_session
from loraforge_registry.system import Buffer

_PIECE = 1024 * 1024
_GENERATION = 3600.0  # seconds that what was uploaded waits for its commit, at least


class Pins:
    """Keeps what was uploaded, and is in no commit yet, from a collection: the session of this hour, and the last."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._stacks: list[ExitStack] = []
        self._session: Session | None = None
        self._until = 0.0

    def session(self) -> Session:
        """Return the session to pin in; it lives for an hour at least."""
        with self._lock:
            if self._session is None or time.monotonic() > self._until:
                stack = ExitStack()
                self._session = stack.enter_context(open_session(self._files))
                self._until = time.monotonic() + _GENERATION
                self._stacks.append(stack)
                for old in self._stacks[:-2]:
                    old.close()
                del self._stacks[:-2]
            return self._session

    def close(self) -> None:
        """End them."""
        with self._lock:
            for stack in self._stacks:
                stack.close()
            self._stacks.clear()
            self._session = None


class LocalBlobs:
    """Blobs of a store."""

    def __init__(self, files: Files, pins: Pins) -> None:
        self._files = files
        self._pins = pins

    def size(self, digest: Digest) -> int | None:
        """The length of a blob; it is pinned before it is looked for."""
        self._pins.session().pin(digest)
        return self._files.size(objects.shard(objects.BLOBS, digest), digest.hex)

    def read(self, digest: Digest, begin: int, end: int) -> Iterator[Buffer]:
        """Yield a range, by pread into one buffer; an open file outlives its name."""
        with self._files.opened(objects.shard(objects.BLOBS, digest), digest.hex) as fd:
            if fd is None:
                raise NotFoundError(f"{digest} is not in the store")
            buffer = memoryview(bytearray(min(_PIECE, max(end - begin, 1))))
            while begin < end:
                count = os.preadv(fd, [buffer[: min(len(buffer), end - begin)]], begin)
                if count == 0:
                    raise StoreError(f"{digest} is shorter than it was: it is damaged")
                yield buffer[:count]
                begin += count

    def put(self, chunks: Iterable[Buffer], expected: Digest | None = None) -> tuple[Digest, int]:
        """Store bytes in the order of SPEC.md section 7."""
        return objects.put(self._files, self._pins.session(), objects.BLOBS, chunks, expected=expected)


class LocalRefs:
    """Records and names of a store."""

    def __init__(self, files: Files, pins: Pins) -> None:
        self._files = files
        self._pins = pins
        self._records: Callable[[Digest], Record] = lru_cache(4096)(self._read_record)

    def names(self) -> list[str]:
        """All names."""
        return sorted({ref.name for ref, _ in refs.list_refs(self._files)})

    def tags(self, name: str) -> dict[str, Digest]:
        """A name's tags; one that is damaged is for ``fsck`` to say."""
        # the names in the directory, not what each means: a store may have many
        mine = [text.partition("@")[2] for text in self._files.names("refs") if text.partition("@")[0] == name]
        found = {tag: refs.read_ref(self._files, RefName(name, tag)) for tag in mine}
        return {tag: digest for tag, digest in found.items() if digest is not None}

    def read(self, name: str) -> Digest | None:
        """What ``name:latest`` means."""
        return refs.read_ref(self._files, RefName(name, DEFAULT_TAG))

    def swap(self, name: str, expected: Digest | None, new: Digest | None, *, who: str, what: str) -> bool:
        """Move ``name:latest`` by compare-and-swap (SPEC.md section 5)."""
        ref = RefName(name, DEFAULT_TAG)
        try:
            refs.move_ref(self._files, self._pins.session(), ref, expected=expected, new=new, who=who, what=what)
        except ConflictError:
            return False
        return True

    def record(self, digest: Digest) -> Record:
        """Read a record; it never changes, so the last few thousand are kept."""
        return self._records(digest)

    def outline(self, digest: Digest) -> tuple[str, Digest | None] | None:
        """Read the id and the parent of a commit."""
        return outline(objects.read_all(self._files, objects.MANIFESTS, digest, canonical.MAX_BYTES))

    def put_record(self, data: bytes) -> Digest:
        """Store a record behind what it needs."""
        return objects.put(self._files, self._pins.session(), objects.MANIFESTS, [data])[0]

    def _read_record(self, digest: Digest) -> Record:
        return Records(self._files).read(digest)
