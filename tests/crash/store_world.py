"""A small store with some history, the commands that change it, and what must hold whatever happens to them."""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loraforge_cli.main import main
from loraforge_registry import check, new_store, objects, refs
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.files import Files
from loraforge_registry.ingest import open_adapter
from loraforge_registry.manifest import Artifact, Derivation, File, Input
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from tests.bad_files import tensors, write_adapter

Snapshot = Mapping[str, tuple[bytes, int]]
OBJECTS = ("blobs/", "manifests/")
PASSING = ("tmp/", "sessions/", "trash/")  # where leftovers may lie


def loraforge(*arguments: object) -> Callable[[], None]:
    """A command line, as the console script runs it."""

    def action() -> None:
        sys.argv = ["loraforge", *map(str, arguments)]
        main()

    return action


def snapshot(root: Path) -> Snapshot:
    """Every file below ``root`` with its bytes and mode; not the cache."""
    found = {}
    todo = [str(root)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                elif entry.name != "index.sqlite":
                    mode = entry.stat(follow_symlinks=False).st_mode
                    data = Path(entry.path).read_bytes() if stat.S_ISREG(mode) else b"special"
                    found[entry.path[len(str(root)) + 1 :]] = (data, mode)
    return found


def restore(root: Path, wanted: Snapshot) -> None:
    """Make the files below ``root`` those of a snapshot again."""
    now = snapshot(root) if root.exists() else {}
    for name in now.keys() - wanted.keys():
        (root / name).unlink()
    for name, (data, mode) in wanted.items():
        if now.get(name) != (data, mode):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(data)
            path.chmod(mode & 0o777)


@contextmanager
def in_memory() -> Iterator[Path]:
    """A directory in memory, where there is such a place: forks by the thousand need no disk."""
    memory = Path("/dev/shm")  # noqa: S108 - as it says
    root = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    try:
        yield root
    finally:
        shutil.rmtree(root)


@contextmanager
def quick_disk() -> Iterator[None]:
    """Make nothing durable for a while: what a test prepares is not what it asks about."""
    real = os.fsync
    os.fsync = lambda _fd: None
    try:
        yield
    finally:
        os.fsync = real


@contextmanager
def few_shards(root: Path, *snapshots: Snapshot) -> Iterator[None]:
    """Let a store have no shards but those of the objects in snapshots: most of a check's time is listing the others.

    An object that belongs elsewhere has no directory, and its writer fails.
    """
    used = tuple(sorted({path.split("/")[2] for found in snapshots for path in found if path.startswith(OBJECTS)}))
    before = new_store.SHARDS
    for area in new_store.AREAS:
        for shard in set(before) - set(used):
            (root / area / shard).rmdir()
    _set_shards(used)
    try:
        yield
    finally:
        _set_shards(before)
        for area in new_store.AREAS:
            for shard in set(before) - set(used):
                (root / area / shard).mkdir(mode=0o700)


def _set_shards(shards: tuple[str, ...]) -> None:
    new_store.SHARDS = objects.SHARDS = check.SHARDS = shards


def remove_outputs(root: Path) -> None:
    """Remove what commands wrote outside the store, half or whole."""
    for path in (*root.glob("*out*"), *root.glob("*.lock")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass
class World:
    """Three adapters, a store with names that moved and went, and another store that has everything."""

    root: Path
    adapters: list[Path] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    output: Snapshot = field(default_factory=dict)  # what a command without faults writes beside the store

    def __post_init__(self) -> None:
        with quick_disk():
            self._build()

    def _build(self) -> None:
        self.adapters = [
            write_adapter(self.root / "adapters" / str(number), weights=tensors(0.5 + number)) for number in range(6)
        ]
        (self.adapters[5] / "README.md").write_text("# hello\n")
        backup = Store(self.root / "backup")
        self.digests = [put(backup, source).digest for source in self.adapters]
        store = Store(self.store)
        put(store, self.adapters[0], RefName("a", "v1"))
        put(store, self.adapters[1], RefName("a"))
        put(store, self.adapters[2], RefName("a"))  # adapter 1 now has no name
        put(store, self.adapters[3], RefName("gone", "v1"))
        store.remove(RefName("gone", "v1"))
        parents = [Artifact(self.digests[3], store.manifest(self.digests[3]).content_id)]
        put(store, self.adapters[4], RefName("child"), derivation=derived(parents))
        self.sources = snapshot(self.root / "adapters")
        self.start = snapshot(self.store)

    def changed_sources(self, *, remote: bool) -> list[str]:
        """I9: what a command only reads is as it was; of a remote store what is read there is pinned."""
        wrong = [] if snapshot(self.root / "adapters") == self.sources else ["I9: a source changed"]
        return wrong + (closure(self.root / "backup") if remote else [])

    @property
    def store(self) -> Path:
        """The store that commands change."""
        return self.root / "store"

    def reset(self) -> None:
        """Begin anew: the store and the outputs as they were."""
        restore(self.store, self.start)
        remove_outputs(self.root)


def derived(parents: list[Artifact]) -> Derivation:
    """A derivation from artifacts."""
    return Derivation("linear", 1, tuple(Input(parent, 0.5) for parent in parents))


def put(store: Store, source: Path, name: RefName | None = None, **options) -> Artifact:
    """Store a directory; latest and any other tag moves."""
    with open_adapter(source) as incoming:
        return store.put(incoming, name=name, force=True, **options)


def refs_of(root: Path) -> dict[str, str]:
    """Every ref's file, as bytes say it."""
    if not (root / "refs").is_dir():
        return {}
    return {path.name: path.read_text() for path in (root / "refs").iterdir()}


def violations(root: Path, before: Mapping[str, str], after: Mapping[str, str], *, acked: bool) -> list[str]:
    """What of I1 to I5, I7 and I10 does not hold in a store; ``before`` and ``after`` are the refs a command moves."""
    found: list[str] = []
    now = refs_of(root)
    for name in {*now, *before, *after}:
        allowed = {after.get(name)} if acked else {before.get(name), after.get(name)}
        if now.get(name) not in allowed:
            found.append(f"I1/I2: {name} is {now.get(name)!r}, expected one of {allowed}")
    for name, (data, mode) in snapshot(root).items():
        if name.startswith(OBJECTS) and Digest.of(data).hex != Path(name).name:
            found.append(f"I5: {name} holds other bytes than its name says")
        if name.startswith(OBJECTS) and mode & 0o777 != 0o444:
            found.append(f"I5: {name} has mode {mode & 0o777:o}")
    return found + closure(root) + [line for name in reflogs(root) for line in broken_chain(root, name)]


def closure(root: Path) -> list[str]:
    """I3, with the real reader: every ref means a manifest all of whose files are there and right."""
    found = []
    try:
        store = Store(root)
    except LoraforgeError as error:
        return [f"I3: {error}"]
    for line in store.ls():
        try:
            assert line.digest is not None, line.problem
            _read_all(store, line.digest)
        except (LoraforgeError, AssertionError) as error:
            found.append(f"I3: {line.ref}: {error}")
    report = store.fsck()
    return found + [f"I3: {p.kind} {p.place}: {p.said}" for p in report.problems if p.is_damage]


def _read_all(store: Store, digest: Digest, *, lineage: bool = True) -> None:
    """Read every byte of a record, and of the nodes of a tree; what nodes were made from need not come along."""
    record = store.record(digest)
    for node in record.needs:
        _read_all(store, node, lineage=False)
    for blob, size in record.blobs.items():
        assert len(store.read_file(File("", blob, size), 1 << 20)) == size
    for parent in record.lineage if lineage else ():
        store.manifest(parent)


def reflogs(root: Path) -> list[str]:
    """The names that have a history."""
    return sorted(path.name for path in (root / "reflog").iterdir()) if (root / "reflog").is_dir() else []


def broken_chain(root: Path, name: str, *, killed: bool = True) -> list[str]:
    """I10: each move of a tag begins where the one before ended, or began, if that one was ``killed`` half-way."""
    opened = Files(root)
    ends: dict[str, set[Digest | None]] = {}
    found = []
    for move in refs.read_reflog(opened, name):
        if move.old not in ends.get(move.tag, {None}):
            found.append(f"I10: {name}:{move.tag} went from {move.old}, which it was not")
        ends[move.tag] = {move.old, move.new} if killed else {move.new}
    for tag, last in ends.items():
        try:
            now = refs.read_ref(opened, RefName(name, tag))
        except LoraforgeError as error:
            found.append(f"I2: {error}")
        else:
            if now not in last:
                found.append(f"I10: {name}:{tag} is {now}, its history ends with {last}")
    return found


def leftovers(root: Path) -> list[str]:
    """I7: what lies where only running processes have anything."""
    return [name for name in snapshot(root) if name.startswith(PASSING)]


def has_object(root: Path, digest: Digest) -> bool:
    """Whether an artifact's manifest is in a store."""
    return (root / objects.shard(objects.MANIFESTS, digest) / digest.hex).exists()
