"""Put right what a check found: from the trash, from another store by digest, from the history of a name.

What is replaced is kept in ``quarantine/``; what cannot be replaced stays where it is. Nothing is ever deleted.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from loraforge_registry import objects, refs
from loraforge_registry.canonical import MAX_BYTES
from loraforge_registry.check import Problem
from loraforge_registry.digest import Digest
from loraforge_registry.errors import NotFoundError, StoreError
from loraforge_registry.files import Files
from loraforge_registry.names import RefName
from loraforge_registry.records import decode_record, has
from loraforge_registry.sessions import Session, open_session

if TYPE_CHECKING:
    from loraforge_registry.system import Buffer


def repair(files: Files, problems: Iterable[Problem], source: Files | None = None) -> list[str]:
    """Repair what can be, and return the places that were; run the check again to see what is left.

    Raises:
        StoreError: flock keeps nobody out here, so that a repair could undo what another process does.
    """
    problems = list(problems)
    for problem in sorted((p for p in problems if p.kind == "missing_directory"), key=lambda p: p.place):
        files.make_directory(problem.place)
    with files.lock("refs") as alone:
        if not alone:
            raise StoreError(f"{files.root}: flock keeps nobody out on this file system; nothing was repaired")
    if problems and not files.exists("", "quarantine"):
        files.make_directory("quarantine")
    with open_session(files) as session:
        found = _Repair(files, session, source)
        return [problem.place for problem in problems if found.put_right(problem)]


class _Repair:
    def __init__(self, files: Files, session: Session, source: Files | None) -> None:
        self._files = files
        self._session = session
        self._source = source

    def put_right(self, problem: Problem) -> bool:
        """Whether the problem is gone now."""
        if problem.kind == "missing_directory":
            return True  # they come first, all else lies in them
        if problem.kind in ("missing_object", "damaged_object") and problem.digest is not None:
            return self._object(problem.area, problem.digest)
        if problem.kind == "damaged_ref" and problem.ref is not None:
            return self._ref(problem.ref)
        return False

    def _object(self, area: str, digest: Digest) -> bool:
        self._session.pin(digest)
        return any(self._replace(area, digest, origin, name) for origin, name in self._candidates(area, digest))

    def _candidates(self, area: str, digest: Digest) -> Iterator[tuple[Files, tuple[str, str]]]:
        """Where the bytes of an object may be: (store, (directory, name))."""
        ending = f"-{area.partition('/')[0]}-{digest.hex}"
        for name in self._files.names("trash"):
            if name.endswith(ending):
                yield self._files, ("trash", name)
        if self._source is not None:
            yield self._source, (objects.shard(area, digest), digest.hex)

    def _replace(self, area: str, digest: Digest, origin: Files, place: tuple[str, str]) -> bool:
        """Publish the bytes at a place, if they are the right ones; a record behind what it needs."""
        if not origin.exists(*place):
            return False
        chunks: Iterable[Buffer] = origin.chunks(*place)
        try:
            if area == objects.MANIFESTS:
                data = origin.read(*place, MAX_BYTES) or b""
                if Digest.of(data) != digest:
                    return False
                self._needed_by(data)
                chunks = [data]
            objects.put(
                self._files,
                self._session,
                area,
                chunks,
                expected=digest,
                check=lambda: self._keep_damaged(objects.shard(area, digest), digest.hex),
            )
        except (StoreError, NotFoundError, ValueError):
            return False  # not there, or damaged there as well
        return True

    def _needed_by(self, data: bytes) -> None:
        record = decode_record(data)
        whole = objects.is_whole
        for digest, size in record.blobs.items():
            if not whole(self._files, objects.BLOBS, digest, size) and not self._object(objects.BLOBS, digest):
                raise NotFoundError(f"{digest} is nowhere to be found")
        for digest in record.needs:
            if not whole(self._files, objects.MANIFESTS, digest) and not self._object(objects.MANIFESTS, digest):
                raise NotFoundError(f"{digest} is nowhere to be found")

    def _keep_damaged(self, directory: str, name: str) -> None:
        self._files.keep_copy(directory, name, "quarantine", f"{name}.{self._session.name}")

    def _ref(self, ref: RefName) -> bool:
        """A ref's history says what it was: where the last move led, else where that began."""
        moves = [move for move in refs.read_reflog(self._files, ref.name) if move.tag == ref.tag]
        for digest in (moves[-1].new, moves[-1].old) if moves else ():
            if digest is None:
                continue
            self._session.pin(digest)
            if has(self._files, digest) or self._object(objects.MANIFESTS, digest):
                refs.restore_ref(self._files, self._session, ref, digest)
                return True
        return False
