"""Is a store what it should be? Every problem by name; nothing is written (SPEC.md section 10)."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import takewhile

from loraforge_registry import config as adapter_config
from loraforge_registry import objects, refs
from loraforge_registry.digest import Digest
from loraforge_registry.errors import (
    FormatError,
    InputOutputError,
    LoraforgeError,
    NotFoundError,
    ReferenceSyntaxError,
    StoreError,
)
from loraforge_registry.files import Files
from loraforge_registry.header import read_header
from loraforge_registry.ingest import MAX_README, Incoming, examine
from loraforge_registry.locks import LOCKS
from loraforge_registry.manifest import CONFIG_FILE, README_FILE, WEIGHTS_FILE, Manifest
from loraforge_registry.names import RefName
from loraforge_registry.new_store import DIRECTORIES, SHARDS
from loraforge_registry.records import Record, Records, has, kind_of
from loraforge_registry.system import read_chunks
from loraforge_registry.trees import TreeRecord, untruths

_ROOT = {directory.partition("/")[0] for directory in DIRECTORIES} | {"FORMAT", "index.sqlite"}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be, and where.

    ``kind`` is the stable word for scripts. Damage: ``missing_directory``, ``unreadable``, ``missing_object``,
    ``damaged_object``, ``untrue_manifest``, ``damaged_ref``, ``foreign_ref``. No loss: ``stray``, ``damaged_record``,
    ``missing_record``, ``leftover``. An object is named by ``area`` and ``digest``, too.
    """

    kind: str
    place: str
    said: str
    area: str = ""
    digest: Digest | None = None
    ref: RefName | None = None

    @property
    def is_damage(self) -> bool:
        """Whether something that was stored cannot be had."""
        return self.kind not in ("stray", "damaged_record", "missing_record", "leftover")


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, and how much was looked at."""

    problems: tuple[Problem, ...]
    artifacts: int
    blobs: int
    refs: int

    @property
    def holds(self) -> bool:
        """Whether nothing is damaged."""
        return not any(problem.is_damage for problem in self.problems)


def check(files: Files, *, deep: bool = False) -> Report:
    """Check names, refs, manifests, and that all they need is there; ``deep`` reads and hashes every byte.

    Nothing is collected meanwhile but during the long part of a deep check, which passes over what is gone by then.
    """
    with _uncollected(files):
        found = list(_directories(files))
        gone = {problem.place for problem in found}
        listed = {area: _listed(files, area, gone) for area in (objects.MANIFESTS, objects.BLOBS)}
        found += [problem for area in listed for problem in listed[area][1]]
        manifests = _Checked(files)
        found += manifests.problems(listed[objects.MANIFESTS][0])
        found += [] if "refs" in gone else _refs(files, skip_history="reflog" in gone)
        found += _leftovers(files, gone)
    blobs = listed[objects.BLOBS][0]
    if deep:
        known = {problem.digest for problem in found}
        found += _hashed(files, [digest for digest in blobs if digest not in known])
        known = {problem.digest for problem in found}
        whole = {digest: record for digest, record in manifests.whole.items() if not record.blobs.keys() & known}
        found += _untrue(files, {digest: record for digest, record in whole.items() if isinstance(record, Manifest)})
    return Report(tuple(found), len(listed[objects.MANIFESTS][0]), len(blobs), 0 if "refs" in gone else _count(files))


@contextmanager
def _uncollected(files: Files) -> Iterator[None]:
    with ExitStack() as stack:
        with suppress(InputOutputError):  # the locks may be what is missing
            stack.enter_context(files.lock("gc", shared=True))
        yield


def _count(files: Files) -> int:
    return sum(1 for _ in refs.list_refs(files))


def _directories(files: Files) -> Iterator[Problem]:
    for path in (*DIRECTORIES, *(f"{area}/{part}" for area in (objects.BLOBS, objects.MANIFESTS) for part in SHARDS)):
        try:
            files.names(path)
        except InputOutputError as error:
            if path == "quarantine" and error.errno == errno.ENOENT:
                continue  # made when it is needed
            yield Problem("missing_directory", path, f"the directory cannot be opened: {error.strerror}")
    for name in sorted(set(files.names("")) - _ROOT):
        if not name.startswith("index.sqlite-"):
            yield Problem("stray", name, "nothing of the store's")
    for name in LOCKS:
        try:
            files.size("locks", name)
        except (StoreError, InputOutputError) as error:
            yield Problem("unreadable", f"locks/{name}", str(error.args[-1]))


def _listed(files: Files, area: str, gone: set[str]) -> tuple[list[Digest], list[Problem]]:
    """Return the objects of an area, and what lies between them."""
    digests, found = [], []
    for part in SHARDS:
        directory = f"{area}/{part}"
        for name in [] if gone & {directory, area, area.partition("/")[0]} else files.names(directory):
            try:
                digest = Digest("sha256", name)
            except ReferenceSyntaxError:
                found.append(Problem("stray", f"{directory}/{name}", "its name is no digest"))
                continue
            if digest.hex[:2] == part:
                digests.append(digest)
            else:
                found.append(Problem("stray", f"{directory}/{name}", f"belongs into {area}/{digest.hex[:2]}"))
    return digests, found


class _Checked:
    """Records, each looked at once, and the files and records that they need."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._read = Records(files)
        self._sizes: dict[Digest, int] = {}
        self._bad: set[Digest] = set()
        self.whole: dict[Digest, Record] = {}

    def problems(self, digests: list[Digest]) -> Iterator[Problem]:
        for digest in digests:
            try:
                record = self._read.read(digest)
            except (StoreError, FormatError, InputOutputError) as error:
                yield _object("damaged_object", objects.MANIFESTS, digest, str(error.args[-1]))
                continue
            missing = [problem for blob, size in record.blobs.items() for problem in self._file(digest, blob, size)]
            missing += self._needed(digest, record)
            yield from missing
            if not missing:
                self.whole[digest] = record

    def _needed(self, owner: Digest, record: Record) -> Iterator[Problem]:
        """Find what a record needs and that is gone, and what a tree says of its nodes that is not so."""
        gone = [digest for digest in record.needs if not has(self._files, digest)]
        for digest in gone:
            said = f"the {kind_of(record)} {owner.short} needs this artifact"
            yield _object("missing_object", objects.MANIFESTS, digest, said)
        if isinstance(record, TreeRecord) and not gone:
            with suppress(StoreError, FormatError, InputOutputError):  # a damaged node is said by itself
                for untrue in untruths(record, self._read.read):
                    yield _object("untrue_manifest", objects.MANIFESTS, owner, untrue)

    def _file(self, owner: Digest, digest: Digest, size: int) -> Iterator[Problem]:
        if digest in self._bad:
            return
        if digest not in self._sizes:
            problem = self._look(owner, digest)
            if problem is not None:
                self._bad.add(digest)
                yield problem
                return
        found = self._sizes[digest]
        if found == size:
            return
        said = f"{found} bytes, the artifact {owner.short} has {size}"
        if objects.is_whole(self._files, objects.BLOBS, digest):  # then it is the manifest that is wrong
            yield _object("untrue_manifest", objects.MANIFESTS, owner, f"{digest} has {said}")
        else:
            self._bad.add(digest)
            yield _object("damaged_object", objects.BLOBS, digest, said)

    def _look(self, owner: Digest, digest: Digest) -> Problem | None:
        try:
            found = self._files.size(objects.shard(objects.BLOBS, digest), digest.hex)
        except (StoreError, InputOutputError) as error:
            return _object("damaged_object", objects.BLOBS, digest, str(error.args[-1]))
        if found is None:
            return _object("missing_object", objects.BLOBS, digest, f"the artifact {owner.short} needs this file")
        self._sizes[digest] = found
        return None


def _refs(files: Files, *, skip_history: bool) -> Iterator[Problem]:
    known: set[str] = set()
    for ref, digest in refs.list_refs(files):
        place = f"refs/{refs.file_name(ref)}"
        known.add(refs.file_name(ref))
        if isinstance(digest, StoreError):
            yield Problem("damaged_ref", place, str(digest), ref=ref)
            continue
        if not has(files, digest):
            yield replace(_object("missing_object", objects.MANIFESTS, digest, f"{ref} means this artifact"), ref=ref)
        ends = set() if skip_history else _ends(files, ref)
        if ends and digest not in ends and _is_foreign(files, ref):
            said = f"{ref} is {digest}, which its history does not end with: point it where it belongs (tag --force)"
            yield Problem("foreign_ref", place, said, ref=ref)
        elif not ends:
            yield Problem("missing_record", f"reflog/{ref.name}", f"the history of {ref} is gone", ref=ref)
    for name in sorted(set(files.names("refs")) - known):
        yield Problem("stray", f"refs/{name}", "its name is no name:tag")


def _is_foreign(files: Files, ref: RefName) -> bool:
    """Look again while nobody moves it: between two reads it may have moved twice."""
    with files.lock("refs", shared=True):
        digest = refs.read_ref(files, ref)
        return digest is not None and digest not in _ends(files, ref)


def _ends(files: Files, ref: RefName) -> set[Digest | None]:
    """What a ref may be by its history: where its last move led, or began.

    Moves that began at the same place stand behind each other where all but one were cut short, or where locks lie.
    """
    try:
        moves = [move for move in refs.read_reflog(files, ref.name) if move.tag == ref.tag]
    except LoraforgeError:
        return set()
    last = takewhile(lambda move: move.old == moves[-1].old, reversed(moves))
    return {digest for move in last for digest in (move.old, move.new)}


def _leftovers(files: Files, gone: set[str]) -> Iterator[Problem]:
    for name in [] if "reflog" in gone else files.names("reflog"):
        try:
            damaged = refs.damaged_records(files, name)
        except LoraforgeError as error:
            yield Problem("unreadable", f"reflog/{name}", str(error.args[-1]))
            continue
        if damaged:
            yield Problem(
                "damaged_record", f"reflog/{name}", f"{damaged} lines are no records: torn by a crash, or changed"
            )
    for name in [] if "sessions" in gone else files.names("sessions"):
        if files.pins_of_the_living(name) is None:
            yield Problem("leftover", f"sessions/{name}", "its process is gone; the next gc removes it")
    for directory in {"trash", "quarantine"} - gone:
        for name in files.names(directory) if files.exists("", directory) else []:
            yield Problem("leftover", f"{directory}/{name}", "taken out of use")


def _hashed(files: Files, digests: list[Digest]) -> Iterator[Problem]:
    for digest in digests:
        try:
            if objects.is_whole(files, objects.BLOBS, digest) or not has(files, digest, objects.BLOBS):
                continue
            said = "its bytes are not the ones its name promises"
        except (StoreError, InputOutputError) as error:
            said = str(error.args[-1])
        yield _object("damaged_object", objects.BLOBS, digest, said)


def _untrue(files: Files, manifests: dict[Digest, Manifest]) -> Iterator[Problem]:
    """Find manifests that say something else about their files than the gates do."""
    for digest, manifest in manifests.items():
        try:
            true = _manifest_of(files, manifest)
        except NotFoundError:
            continue  # collected meanwhile
        except (LoraforgeError, OSError) as error:
            yield _object("untrue_manifest", objects.MANIFESTS, digest, f"its files are no adapter: {error.args[-1]}")
            continue
        if replace(true, derivation=manifest.derivation, report=manifest.report) != manifest:
            yield _object("untrue_manifest", objects.MANIFESTS, digest, "it describes its files as they are not")


def _manifest_of(files: Files, manifest: Manifest) -> Manifest:
    by_path = {file.path: file for file in manifest.files}
    weights = by_path[WEIGHTS_FILE]

    def small(path: str, limit: int) -> bytes:
        return objects.read_all(files, objects.BLOBS, by_path[path].digest, limit)

    with objects.opened(files, objects.BLOBS, weights.digest, weights.size) as fd:
        incoming = Incoming(
            config=small(CONFIG_FILE, adapter_config.MAX_BYTES),
            header=read_header(fd),
            chunks=read_chunks(fd),
            readme=small(README_FILE, MAX_README) if README_FILE in by_path else None,
        )
        return examine(incoming)[0]


def _object(kind: str, area: str, digest: Digest, said: str) -> Problem:
    return Problem(kind, f"{objects.shard(area, digest)}/{digest.hex}", said, area, digest)
