"""Blobs and names on one store, which ``loraforge`` on the same machine uses, too."""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress

from loraforge_registry import canonical, index, objects, refs
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, ManifestError, NotFoundError, ReferenceSyntaxError, StoreError
from loraforge_registry.facts import Facts, facts_of
from loraforge_registry.files import Files
from loraforge_registry.names import DEFAULT_TAG, RefName
from loraforge_registry.records import Record, decode_record
from loraforge_registry.repositories import Outline, blobs_in, outline
from loraforge_registry.server.recent import Recent
from loraforge_registry.sessions import Session, open_session
from loraforge_registry.system import Buffer
from loraforge_registry.tree_facts import TreeFacts, facts_of_tree
from loraforge_registry.trees import TreeRecord

_PIECE = 1024 * 1024
_KEPT = 4 * 1024 * 1024  # bytes of records, as they are stored; in memory they are about ten times as large
_LOOKS = [8 << number for number in range(20)]  # commits that are read before each look into the index
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
        self._records = Recent[Digest, Record](_KEPT)

    def names(self) -> dict[str, list[str]]:
        """All names, and what their tags are called: the names in the directory, not what each means."""
        found: dict[str, list[str]] = {}
        for text in self._files.names("refs"):
            with suppress(ReferenceSyntaxError):  # not a ref's file name: not ours
                ref = RefName(*text.partition("@")[::2])
                found.setdefault(ref.name, []).append(ref.tag)
        return dict(sorted(found.items()))

    def tags(self, name: str, called: Sequence[str] | None = None) -> dict[str, Digest]:
        """A name's tags; one that is damaged is for ``fsck`` to say."""
        mine = self.names().get(name, []) if called is None else called
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
        """Read a record; it never changes, so the last few megabytes of them are kept."""
        record = self._records.get(digest)
        if record is None:
            data = self._read(digest)
            record = decode_record(data)
            self._records.put(digest, record, len(data))
        return record

    def past(self, digest: Digest) -> Iterator[tuple[Digest, Outline]]:
        """Read a short way back record by record, and from there on by what the index remembers."""
        read, known, seen = dict[Digest, Outline](), dict[Digest, Outline](), set[Digest]()
        following: Digest | None = digest
        try:
            while following is not None and following not in seen:
                seen.add(following)
                if len(read) in _LOOKS and following not in known:
                    known = index.read_outlines(self._files.root, following)
                found = known.pop(following, None)
                if found is None:
                    found = outline(self._read(following))
                    if found is None:
                        return
                    read[following] = found
                yield following, found
                following = found.parent
        finally:
            if len(read) >= _LOOKS[0]:
                index.write_outlines(self._files.root, read)

    def blobs(self, digest: Digest) -> dict[Digest, int] | None:
        """Read the files of a commit."""
        return blobs_in(self._read(digest))

    def facts(self, digest: Digest) -> Facts | TreeFacts | None:
        """Read what lists say of an artifact or a tree."""
        data = self._read(digest)
        found = facts_of(data)
        if found is None:
            with suppress(ManifestError):
                record = decode_record(data)
                return facts_of_tree(digest, record) if isinstance(record, TreeRecord) else None
        return found

    def put_record(self, data: bytes) -> Digest:
        """Store a record behind what it needs."""
        return objects.put(self._files, self._pins.session(), objects.MANIFESTS, [data])[0]

    def _read(self, digest: Digest) -> bytes:
        return objects.read_all(self._files, objects.MANIFESTS, digest, canonical.MAX_BYTES)
