"""Power cuts: every disk that a weak POSIX allows behind each prefix of a command's calls, opened by the real reader.

What may be on a disk: of a file's bytes that were not yet synced, none, half, all, or zeros; of the names in a
directory that were not yet synced, any subset of the changes. A rename changes two directories at once. Nothing is
assumed about order, except that a sync comes after what it syncs. Names in ``tmp/`` and ``sessions/`` mean nothing to a
reader, and are left out.
"""

import errno
import itertools
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from loraforge_registry import records
from loraforge_registry.check import check
from loraforge_registry.digest import Digest
from loraforge_registry.errors import InputOutputError, LoraforgeError
from loraforge_registry.files import Files
from loraforge_registry.new_store import AREAS, DIRECTORIES, FORMAT, SHARDS
from tests.crash.store_faults import Shim
from tests.crash.store_world import World, refs_of, snapshot

Name = tuple[str, str]
Op = tuple[object, ...]
MOST_PENDING = 8  # more changes than this are sampled
SAMPLES = 64
_SHARDS = [f"{area}/{part}" for area in AREAS for part in SHARDS]
IGNORED = ("tmp", "sessions", "locks", "quarantine")


class Recorder(Shim):
    """Writes down what calls change, with files by number: a name can be another file later."""

    def __init__(self, root: Path, hook=None) -> None:
        super().__init__(hook)
        self.root = root
        self.ops: list[Op] = []
        self.owners: list[int] = []  # which thread made each
        self._numbers: dict[tuple[int, int], int] = {}
        self._next = itertools.count(1_000_000)
        self._mutex = threading.Lock()

    def _call(self, name, arguments, options):
        place = None if name == "unlink" else self._source(name, arguments, options)
        result = super()._call(name, arguments, options)
        with self._mutex:
            self._note(name, arguments, options, result, place)
        return result

    def say(self, op: Op) -> None:
        """Write one thing down."""
        self.ops.append(op)
        self.owners.append(threading.get_ident())

    def _source(self, name, arguments, options):
        if name not in ("link", "rename", "replace"):
            return None
        return self._name(arguments[0], options.get("src_dir_fd"))

    def _note(self, name, arguments, options, result, source) -> None:
        if name in ("write", "pwrite"):
            self.say(("write", self._number(arguments[0]), bytes(arguments[1])[:result]))
        elif name in ("fsync", "fdatasync"):
            if stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
                self.say(("syncdir", self._relative(os.readlink(f"/proc/self/fd/{arguments[0]}"))))  # noqa: PTH115
            else:
                self.say(("sync", self._number(arguments[0])))
        elif name == "open" and int(str(arguments[1])) & os.O_CREAT:
            self._opened(self._name(arguments[0], options.get("dir_fd")), result)
        elif name == "link":
            self.say(("set", self._name(arguments[1], options.get("dst_dir_fd")), self._numbers_at(source)))
        elif name in ("rename", "replace"):
            target = self._name(arguments[1], options.get("dst_dir_fd"))
            self.say(("move", source, target, self._numbers_at(target)))
        elif name == "unlink":
            self.say(("unset", self._name(arguments[0], options.get("dir_fd"))))
        elif name == "mkdir":
            self.say(("mkdir", self._name(arguments[0], options.get("dir_fd"))))

    def _opened(self, name: Name, fd: int) -> None:
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) not in self._numbers or found.st_size == 0:
            self._numbers[found.st_dev, found.st_ino] = next(self._next)
            self.say(("set", name, self._number(fd)))

    def _number(self, fd: int) -> int:
        found = os.fstat(fd)
        return self._numbers.get((found.st_dev, found.st_ino), found.st_ino)

    def _numbers_at(self, name: Name) -> int:
        found = (self.root / name[0] / name[1]).stat()
        return self._numbers.get((found.st_dev, found.st_ino), found.st_ino)

    def _name(self, path, dir_fd) -> Name:
        if dir_fd is not None:
            return self._relative(os.readlink(f"/proc/self/fd/{dir_fd}")), os.fspath(path)  # noqa: PTH115
        absolute = Path(path).absolute()
        return self._relative(str(absolute.parent)), absolute.name

    def _relative(self, path: str) -> str:
        return "" if path == str(self.root) else os.path.relpath(path, self.root)

    def adopt(self, fds: Mapping[Name, int]) -> None:
        """Know the files that are there already by number."""
        for name, number in fds.items():
            found = (self.root / name[0] / name[1]).stat()
            self._numbers[found.st_dev, found.st_ino] = number


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Record in this process."""
    import fcntl

    flock = fcntl.flock
    recorder.install()
    try:
        yield
    finally:
        fcntl.flock = flock
        for name, real in recorder.real.items():
            setattr(os, name, real)


@dataclass
class Disk:
    """What is durable, what is pending: names by directory, bytes by file."""

    names: dict[Name, int] = field(default_factory=dict)
    data: dict[int, bytes] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)
    changes: list[Op] = field(default_factory=list)
    unsynced: dict[int, bytes] = field(default_factory=dict)

    def apply(self, op: Op) -> None:
        """Let one call happen; what it changes is pending until a sync."""
        kind = op[0]
        if kind == "write":
            self.unsynced[op[1]] = self.unsynced.get(op[1], b"") + op[2]
        elif kind == "sync":
            self.data[op[1]] = self.data.get(op[1], b"") + self.unsynced.pop(op[1], b"")
        elif kind == "syncdir":
            mine = [change for change in self.changes if op[1] in _directories(change)]
            self.changes = [change for change in self.changes if op[1] not in _directories(change)]
            for change in mine:
                _change(self.names, self.directories, change)
        elif any(directory not in IGNORED for directory in _directories(op)):
            self.changes.append(op)

    def possible(self, generator: random.Random) -> Iterator[tuple[dict[Name, int], set[str], dict[int, bytes]]]:
        """Every disk that may be found after a cut now."""
        for chosen in _subsets(self.changes, generator):
            names, directories = dict(self.names), set(self.directories)
            for change in chosen:
                _change(names, directories, change)
            visible = set(names.values()) & self.unsynced.keys()
            for torn in itertools.product(*([(number, data) for data in self._torn(number)] for number in visible)):
                yield names, directories, self.data | dict(torn)

    def _torn(self, number: int) -> set[bytes]:
        durable, more = self.data.get(number, b""), self.unsynced[number]
        return {durable, durable + more[: len(more) // 2], durable + more, durable + bytes(len(more))}


def _directories(op: Op) -> tuple[str, ...]:
    return (op[1][0], op[2][0]) if op[0] == "move" else (op[1][0],)


def _change(names: dict[Name, int], directories: set[str], op: Op) -> None:
    if op[0] == "set":
        names[op[1]] = op[2]
    elif op[0] == "unset":
        names.pop(op[1], None)
    elif op[0] == "mkdir":
        directories.add("/".join(filter(None, op[1])))
    else:
        names.pop(op[1], None)
        names[op[2]] = op[3]


def _subsets(changes: list[Op], generator: random.Random) -> Iterator[list[Op]]:
    if len(changes) <= MOST_PENDING:
        for mask in range(1 << len(changes)):
            yield [change for bit, change in enumerate(changes) if mask >> bit & 1]
        return
    yield []
    yield changes
    for _ in range(SAMPLES):
        share = generator.random()
        yield [change for change in changes if generator.random() < share]


class MemoryFiles(Files):
    """A disk as ``Files`` shows it; only reading."""

    def __init__(self, names: Mapping[Name, int], directories: set[str], data: Mapping[int, bytes]) -> None:
        self.root = Path("/power-loss")
        self._directories = {}
        self._there = directories
        self._bytes = {name: data.get(number, b"") for name, number in names.items()}
        self._listed: dict[str, list[str]] = {}
        for directory, name in sorted(self._bytes):
            self._listed.setdefault(directory, []).append(name)

    def read(self, directory: str, name: str, limit: int) -> bytes | None:
        found = self._bytes.get((directory, name))
        return None if found is None else found[: limit + 1]

    def chunks(self, directory, name):
        yield self._bytes.get((directory, name), b"")

    def size(self, directory, name):
        found = self._bytes.get((directory, name))
        return None if found is None else len(found)

    def exists(self, directory, name):
        return (directory, name) in self._bytes

    def names(self, directory):
        if directory and directory not in self._there:
            raise InputOutputError(errno.ENOENT, directory)
        return self._listed.get(directory, [])

    @contextmanager
    def lock(self, _name, *, shared=False):  # noqa: ARG002 - as in Files
        yield True

    def pins_of_the_living(self, _session):
        return None


@dataclass
class Cut:
    """What power cuts have shown."""

    disks: int = 0
    wrong: list[str] = field(default_factory=list)


def start_disk(root: Path) -> tuple[Disk, dict[Name, int]]:
    """A store as it is now, all of it durable."""
    disk, numbers = Disk(directories={*DIRECTORIES, *_SHARDS} if root.exists() else set()), {}
    for number, (path, (data, _)) in enumerate(sorted(snapshot(root).items()) if root.exists() else ()):
        directory, _, name = path.rpartition("/")
        numbers[directory, name] = number
        if directory not in IGNORED:
            disk.names[directory, name] = number
        disk.data[number] = data
    return disk, numbers


def cut_everywhere(disk: Disk, ops: list[Op], generator: random.Random, seen: set[int], cut: Cut) -> None:
    """Cut the power behind every prefix; ``("allow", {ref: values})`` among ``ops`` says what must then be there."""
    allowed: dict[str, frozenset[str | None]] = {}
    for position, op in enumerate(ops):
        if op[0] == "allow":
            allowed |= op[1]
        else:
            disk.apply(op)
        for names, directories, data in disk.possible(generator):
            key = hash(
                (frozenset((name, data.get(number)) for name, number in names.items()), frozenset(allowed.items()))
            )
            if key not in seen:
                seen.add(key)
                cut.disks += 1
                wrong = _wrong(names, directories, data, allowed)
                cut.wrong += [f"behind call {position} {op[:2]}: {line}" for line in wrong]


def _wrong(names, directories, data, allowed) -> list[str]:
    found = []
    for (directory, name), number in names.items():
        if directory.startswith(("blobs/", "manifests/")) and _name_of(data.get(number, b"")) != name:
            found.append(f"I5: {directory}/{name} is torn")
    if ("", "FORMAT") not in names:
        return [f"I1: the store is gone, and {name} with it" for name in allowed if None not in allowed[name]]
    if data.get(names["", "FORMAT"], b"") != FORMAT:
        found.append("I5: FORMAT is torn")
    refs = {name: data.get(number, b"").decode(errors="replace") for (d, name), number in names.items() if d == "refs"}
    found += [f"I1: {name} is {refs.get(name)!r}" for name in allowed if refs.get(name) not in allowed[name]]
    found += [f"I2: {name} came from nowhere" for name in refs if name not in allowed]
    report = check(MemoryFiles(names, directories, data))
    return found + [
        f"I3: {problem.kind} {problem.place}"
        for problem in report.problems
        if problem.is_damage or problem.kind == "missing_record"
    ]


@lru_cache(maxsize=4096)
def _name_of(data: bytes) -> str:
    return Digest.of(data).hex


records.decode_record = lru_cache(maxsize=4096)(records.decode_record)  # the same bytes, thousands of times


def record(world: World, action: Callable[[], object]) -> tuple[Disk, list[Op]]:
    """Run a command in this process, acknowledged at its end."""
    disk, numbers = start_disk(world.store)
    recorder = Recorder(world.store)
    recorder.adopt(numbers)
    before = refs_of(world.store)
    with recording(recorder):
        quietly(action)
    after = refs_of(world.store)
    return disk, [_allow(before, after), *recorder.ops, _allow(after, after)]


def _allow(*states: Mapping[str, str]) -> Op:
    return "allow", {name: frozenset(state.get(name) for state in states) for state in states for name in state}


def record_pair(
    world: World, first: Callable[[], object], second: Callable[[], object], at: int
) -> tuple[Disk, list[Op]] | None:
    """Run ``first`` up to its call ``at``, all of ``second``, and the rest; each acknowledged at its end.

    Returns None when the first ends before that call.
    """
    disk, numbers = start_disk(world.store)
    paused, resumed, seen = threading.Event(), threading.Event(), itertools.count()

    def hook(_number: int, _name: str, _arguments: tuple[object, ...]) -> None:
        if threading.current_thread() is thread and next(seen) == at:
            paused.set()
            resumed.wait()

    recorder = Recorder(world.store, hook)
    recorder.on_blocked = resumed.set
    recorder.adopt(numbers)
    before = refs_of(world.store)
    reached = []

    def run_first() -> None:
        with suppress(LoraforgeError):  # what it wanted may be gone
            first()
        reached.append(paused.is_set())
        recorder.say(("ended",))
        paused.set()

    thread = threading.Thread(target=run_first)
    with recording(recorder):
        thread.start()
        paused.wait()
        with suppress(LoraforgeError):
            second()
        recorder.say(("ended",))
        resumed.set()
        thread.join()
    return (disk, _with_acks(recorder, before, refs_of(world.store))) if reached == [True] else None


def _with_acks(recorder: Recorder, before: Mapping[str, str], after: Mapping[str, str]) -> list[Op]:
    """While anybody runs a ref is old or new; what a command that ended has moved is new."""
    found: list[Op] = [_allow(before, after)]
    moved: dict[int, set[str]] = {owner: set() for owner in recorder.owners}
    for op, owner in zip(recorder.ops, recorder.owners, strict=True):
        if op[0] == "ended":
            found.append(("allow", {name: frozenset({after.get(name)}) for name in moved[owner]}))
            continue
        if op[0] in ("set", "move", "unset"):
            moved[owner] |= {name for directory, name in _names(op) if directory == "refs"}
        found.append(op)
    return [*found, _allow(after, after)]


def _names(op: Op) -> list[Name]:
    return [op[1], op[2]] if op[0] == "move" else [op[1]]


def quietly(action: Callable[[], object]) -> None:
    import io
    from contextlib import redirect_stderr, redirect_stdout

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            action()
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise AssertionError(f"ended with {stop.code}") from stop
