"""What no name, lineage or running process needs, and its removal in two steps (SPEC.md section 9).

A collection needs no clock and stops nobody for longer than it takes to look and to rename: what is being read or
written is pinned by a session, and the kernel knows which sessions live.
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from loraforge_registry import objects, refs
from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError, LoraforgeError, NotFoundError, StoreError
from loraforge_registry.files import Files
from loraforge_registry.records import Record, Records, by_need, has
from loraforge_registry.sessions import pins_of_the_living

AREAS = (objects.MANIFESTS, objects.BLOBS)  # in this order they go: a manifest that is there has all its blobs


@dataclass(frozen=True, slots=True)
class Garbage:
    """An object that goes, its bytes, and why."""

    area: str
    digest: Digest
    size: int
    why: str


@dataclass(frozen=True, slots=True)
class Collection:
    """What a collection moved, or would move, to the trash; what crashes left; what lay in the trash before."""

    garbage: tuple[Garbage, ...]
    leftovers: tuple[str, ...]
    pinned: int
    emptied: int

    @property
    def size(self) -> int:
        """The bytes that go."""
        return sum(item.size for item in self.garbage)


def named(files: Files) -> list[Digest]:
    """Return what refs mean.

    Raises:
        StoreError: one is damaged.
    """
    found = []
    for _, digest in refs.list_refs(files):
        if isinstance(digest, StoreError):
            raise digest
        found.append(digest)
    return found


def collect(files: Files, *, dry_run: bool, now: bool = False) -> Collection:
    """Move what nothing needs to the trash, and delete what an earlier collection moved there.

    ``now`` deletes at once what this one moves. Writers and readers wait only while it looks and renames.

    Raises:
        StoreError: flock keeps nobody out here, or a ref or manifest is damaged; nothing was touched.
    """
    records = Records(files)
    needs = _read_ahead(files, records)
    before = files.names("trash")
    with files.lock("gc") as alone:
        if not alone:
            raise StoreError(
                f"{files.root}: flock keeps nobody out on this file system, so a collection could take what another "
                "process is writing; nothing was touched"
            )
        pins, living, dead = pins_of_the_living(files)
        # behind the sessions: one that ended in between has moved its ref by now
        needed = _needed(files, records, pins)
        garbage = tuple(_garbage(files, needed))
        leftovers = (*(f"sessions/{name}" for name in sorted(dead)), *_ownerless(files, living))
        if not dry_run:
            _settle_names(files, garbage)
            moved = _move_to_trash(files, garbage, needs)
            _remove(files, leftovers)
    if dry_run:
        return Collection(garbage, leftovers, len(pins), _trash_size(files, before))
    emptied = _trash_size(files, before)
    _remove(files, (f"trash/{name}" for name in (*before, *(moved if now else ()))))
    return Collection(garbage, leftovers, len(pins), emptied)


def _settle_names(files: Files, garbage: Sequence[Garbage]) -> None:
    """Make the refs that were read durable: who moved one, may not have got so far, and a cut would bring it back."""
    if garbage:
        files.sync("refs")


def _read_ahead(files: Files, records: Records) -> dict[Digest, tuple[Digest, ...]]:
    """Read what is there before anybody has to wait, and return what each record needs.

    What is wrong is said by the walk that counts.
    """
    reached: Mapping[Digest, Record] = {}
    with suppress(StoreError, NotFoundError, FormatError):
        reached = records.reachable(named(files))
    others = (digest for digest in objects.list_digests(files, objects.MANIFESTS) if digest not in reached)
    return {digest: record.needs for digest, record in reached.items()} | {d: _needs(files, d) for d in others}


def _needs(files: Files, digest: Digest) -> tuple[Digest, ...]:
    """What one record needs; one that is damaged needs nothing any more."""
    try:
        return Records(files).read(digest).needs  # and let go of it: of garbage there may be much
    except (LoraforgeError, OSError):
        return ()


def _needed(files: Files, records: Records, pins: Iterable[Digest]) -> set[tuple[str, Digest]]:
    pinned = [digest for digest in pins if has(files, digest)]
    try:
        reachable = records.reachable([*named(files), *pinned])
    except NotFoundError as error:
        raise StoreError(
            f"a name means what is not there, so nothing is collected (loraforge fsck): {error}"
        ) from error
    needed = {(objects.MANIFESTS, digest) for digest in reachable}
    needed |= {(objects.BLOBS, digest) for record in reachable.values() for digest in record.blobs}
    # also what is not there yet: it may be by the time that we list
    return needed | {(area, digest) for digest in pins for area in AREAS}


def _garbage(files: Files, needed: set[tuple[str, Digest]]) -> Iterator[Garbage]:
    going = {
        area: [digest for digest in objects.list_digests(files, area) if (area, digest) not in needed] for area in AREAS
    }
    if not any(going.values()):
        return
    once = _histories(files)
    for area, digests in going.items():
        for digest in digests:
            why = once.get(digest, "never had a name") if area == objects.MANIFESTS else "in no artifact that stays"
            yield Garbage(area, digest, files.size(objects.shard(area, digest), digest.hex) or 0, why)


def _histories(files: Files) -> Mapping[Digest, str]:
    """Say which name each artifact lost last."""
    found: dict[Digest, str] = {}
    for name in files.names("reflog"):
        for move in refs.read_reflog(files, name):
            if move.old is not None:
                what = "removed" if move.new is None else "moved on"
                found[move.old] = f"was {name}:{move.tag}, {what}"
    return found


def _ownerless(files: Files, living: set[str]) -> list[str]:
    """Files in ``tmp/`` whose writer is gone: their names begin with its session's."""
    return [f"tmp/{name}" for name in files.names("tmp") if name.partition(".")[0] not in living]


def _move_to_trash(files: Files, garbage: Iterable[Garbage], needs: Mapping[Digest, tuple[Digest, ...]]) -> list[str]:
    """Move records before what they need, and durably so: what a crash leaves is no record without that."""
    collection = secrets.token_hex(12)
    moved = []
    for area, digests in _in_order(files, garbage, needs):
        for digest in digests:
            moved.append(f"{collection}-{area.partition('/')[0]}-{digest.hex}")
            files.move(objects.shard(area, digest), digest.hex, "trash", moved[-1])
        for directory in sorted({objects.shard(area, digest) for digest in digests}):
            files.sync(directory)
    return moved


def _in_order(
    files: Files, garbage: Iterable[Garbage], needs: Mapping[Digest, tuple[Digest, ...]]
) -> Iterator[tuple[str, list[Digest]]]:
    """Yield what can go together: trees, adapters, files."""
    going = list(garbage)
    records = {item.digest for item in going if item.area == objects.MANIFESTS}
    needed = {digest: needs[digest] if digest in needs else _needs(files, digest) for digest in records}
    for wave in reversed(by_need(needed)):
        yield objects.MANIFESTS, wave
    yield objects.BLOBS, [item.digest for item in going if item.area == objects.BLOBS]


def _remove(files: Files, paths: Iterable[str]) -> None:
    for path in paths:
        directory, _, name = path.partition("/")
        files.remove(directory, name)


def _trash_size(files: Files, names: Iterable[str]) -> int:
    return sum(files.size("trash", name) or 0 for name in names)
