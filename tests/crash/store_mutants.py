"""The protocol with one step taken out, or put in a wrong place: the harnesses must see each of them.

A mutant is a change to the code under test and a look that must find something wrong. Each runs in a fork of its own;
without the mutant the same look must find nothing.
"""

import errno
import os
import random
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from loraforge_registry import check as check_module
from loraforge_registry import collect, files, ingest, new_store, objects, refs, repair, sessions
from loraforge_registry import store as store_module
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.files import Files
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from tests.crash import store_power
from tests.crash.store_faults import interleave
from tests.crash.store_scenarios import GC, NEW_STORE, SCENARIOS, Figures, Scenario, enumerate_faults
from tests.crash.store_world import (
    World,
    broken_chain,
    closure,
    has_object,
    in_memory,
    loraforge,
    put,
    refs_of,
    restore,
    violations,
)

Look = Callable[[World], list[str]]
Patch = Callable[[], None]


# --- looks --------------------------------------------------------------------------------------------------------


def by_name(name: str) -> Scenario:
    return next(scenario for scenario in (*SCENARIOS, NEW_STORE) if scenario.name == name)


def power(*names: str) -> Look:
    """Cut the power behind every call of these commands."""

    def look(world: World) -> list[str]:
        cut = store_power.Cut()
        for name in names:
            scenario = by_name(name)
            world.reset()
            scenario.prepare(world)
            disk, ops = store_power.record(world, scenario.action(world))
            store_power.cut_everywhere(disk, ops, random.Random(0), set(), cut)
        return cut.wrong

    return look


def power_of_two(first: Callable[[World], object], second: Callable[[World], object]) -> Look:
    """Cut the power behind every call of a command that is interrupted, at each of its calls, by another."""

    def look(world: World) -> list[str]:
        cut, seen = store_power.Cut(), set()
        for at in range(200):
            world.reset()
            pair = store_power.record_pair(world, lambda: first(world), lambda: second(world), at)
            if pair is None:
                break
            store_power.cut_everywhere(*pair, random.Random(0), seen, cut)
        return cut.wrong

    return look


def faults(name: str, *kinds: str) -> Look:
    """Let faults happen at every call of a command."""

    def look(world: World) -> list[str]:
        return enumerate_faults(world, by_name(name), kinds).wrong

    return look


def race(
    first: tuple[object, ...], second: tuple[object, ...], *, codes: tuple[int, ...] = (0,), since: int = 0
) -> Look:
    """Interrupt a command by another at each of its calls; one that is behind call ``since`` must end well."""

    def look(world: World) -> list[str]:
        wrong = []
        commands = [
            loraforge(
                "--store", world.store, *(world.adapters[w] if isinstance(w, int) else w for w in words(world, c))
            )
            for c in (first, second)
        ]
        for at in range(200):
            world.reset()
            ended = interleave(*commands, at)
            if ended is None:
                break
            allowed = codes if at < since else (0,)
            wrong += [f"{at}: ended with {one.code}: {one.err}" for one in ended if one.code not in allowed]
            now = refs_of(world.store)
            wrong += violations(world.store, now, now, acked=True)
            wrong += broken_chain(world.store, "child", killed=False)
        return wrong

    return look


def words(world: World, command: tuple[object, ...]):
    return [str(world.digests[int(w[1])]) if isinstance(w, str) and w.startswith("#") else
            str(w).replace("{root}", str(world.root)) if isinstance(w, str) else w for w in command]  # fmt: skip


def race_for_a_tag(world: World) -> list[str]:
    """Two make one tag where flock is granted to everybody: exactly one must win."""
    files.fcntl.flock = lambda _fd, _how: None
    commands = [loraforge("--store", world.store, "tag", source, "new:v1") for source in ("a:v1", "a:latest")]
    wrong = []
    for at in range(100):
        world.reset()
        ended = interleave(*commands, at)
        if ended is None:
            break
        wrong += [] if sorted(one.code for one in ended) == [0, 4] else [f"{at}: {[one.code for one in ended]}"]
    return wrong


def lying_locks(world: World) -> list[str]:
    """A collection where flock is granted to everybody, or missing."""
    wrong = []
    for lie in (lambda _fd, _how: None, _no_flock):
        files.fcntl.flock = lie
        world.reset()
        with suppress(LoraforgeError):
            Store(world.store).gc(dry_run=False)
            wrong.append("it collected")
    return wrong


def _no_flock(_fd, _how):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def in_doubt(world: World) -> list[str]:
    """A collection where a ref is damaged, then one where a manifest is."""
    wrong = []
    digest = world.digests[0]
    for path in (world.store / "refs" / "a@v1", world.store / "manifests/sha256" / digest.hex[:2] / digest.hex):
        world.reset()
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1])
        with suppress(LoraforgeError):
            Store(world.store).gc(dry_run=False, now=True)
            wrong.append(f"it collected though {path} is damaged")
    return wrong


def flipped_bits(world: World) -> list[str]:
    """What reads answer, and a deep check, when bits flip."""
    wrong = []
    for path, (data, _) in world.start.items():
        if not path.startswith(("blobs/", "manifests/", "refs/a@")):
            continue
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        (world.store / path).chmod(0o644)
        (world.store / path).write_bytes(flipped)
        if Store(world.store).fsck(deep=True).holds:
            wrong.append(f"{path} passed for whole")
        for source, name in ((0, "a:v1"), (2, "a:latest")):
            with suppress(LoraforgeError):
                store = Store(world.store)
                manifest = store.manifest(store.resolve(name))
                read = {file.path: store.read_file(file, 1 << 20) for file in manifest.files}
                good = {file: (world.adapters[source] / file).read_bytes() for file in read}
                wrong += [] if read == good else [f"{path}: {name} was read wrong"]
        restore(world.store, world.start)
    return wrong


def healing_push(world: World) -> list[str]:
    """A push of what is there, but damaged with the same length."""
    world.reset()
    blob = Store(world.store).manifest(world.digests[0]).file("adapter_model.safetensors").digest
    path = world.store / "blobs/sha256" / blob.hex[:2] / blob.hex
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    put(Store(world.store), world.adapters[0], RefName("a", "v1"))
    return [] if Store(world.store).fsck(deep=True).holds else ["the push left what was damaged"]


def pinned_meanwhile(world: World) -> list[str]:
    """Somebody pins an artifact without a name while a collection waits for its lock."""
    world.reset()
    with ExitStack() as stack:
        begun = []

        def pin(*_: object) -> None:
            begun.append(stack.enter_context(sessions.open_session(Files(world.store))))
            begun[0].pin(world.digests[1])

        collect._read_ahead = pin
        Store(world.store).gc(dry_run=False)
    return [] if has_object(world.store, world.digests[1]) else ["what was pinned is gone"]


def named_meanwhile(world: World) -> list[str]:
    """Somebody moves a ref to what it pinned, and ends, just before a collection looks at the pins."""
    world.reset()
    with ExitStack() as stack:
        store = Files(world.store)
        session = stack.enter_context(sessions.open_session(store))
        session.pin(world.digests[1])
        look = collect.pins_of_the_living

        def end(files_too: Files):
            refs.move_ref(store, session, RefName("late"), expected=None, new=world.digests[1])
            stack.close()
            return look(files_too)

        collect.pins_of_the_living = end
        Store(world.store).gc(dry_run=False)
    return closure(world.store)


def published_meanwhile(world: World) -> list[str]:
    """Somebody publishes what it pinned while a collection has counted what is needed, and not yet listed what is."""
    world.reset()
    source = Files(world.root / "backup")
    digest = world.digests[5]
    place = objects.shard(objects.MANIFESTS, digest)
    with sessions.open_session(Files(world.store)) as session:
        session.pin(digest)
        listed = collect._garbage

        def publish(*arguments):
            (world.store / place / digest.hex).write_bytes(source.read(place, digest.hex, 1 << 20))
            return listed(*arguments)

        collect._garbage = publish
        Store(world.store).gc(dry_run=False)
    return [] if has_object(world.store, digest) else ["what was pinned is gone"]


def repair_from_damage(world: World) -> list[str]:
    """A repair from a store that is damaged, too."""
    world.reset()
    blob = Store(world.store).manifest(world.digests[0]).file("adapter_model.safetensors").digest
    name = f"blobs/sha256/{blob.hex[:2]}/{blob.hex}"
    spoiled = world.root / "spoiled"
    restore(spoiled, world.start)
    for path in new_store.DIRECTORIES:
        (spoiled / path).mkdir(parents=True, exist_ok=True)
    (spoiled / name).chmod(0o644)
    (spoiled / name).write_bytes(b"\0" * (spoiled / name).stat().st_size)
    (world.store / name).unlink()
    store = Store(world.store)
    store.repair(store.fsck(), spoiled)
    return [line for line in violations(world.store, {}, {}, acked=False) if line.startswith("I5")]


# --- ways to be wrong ---------------------------------------------------------------------------------------------


def swap(owner: object, name: str, make: Callable[[Callable[..., object]], Callable[..., object]]) -> Patch:
    def patch() -> None:
        setattr(owner, name, make(getattr(owner, name)))

    return patch


def nothing(_real):
    return lambda *_a, **_o: None


def no_sync_of(start: str) -> Patch:
    return swap(Files, "sync", lambda real: lambda self, d: None if d.startswith(start) else real(self, d))


def seal_without_fsync(modes: tuple[int, ...]) -> Patch:
    def make(real):
        def seal(self, temporary, mode=0o444):
            return os.fchmod(temporary.fd, mode) if mode in modes else real(self, temporary, mode)

        return seal

    return swap(Files, "seal", make)


def append_without(what: str) -> Patch:
    def append(self, directory, name, line):
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(name, flags, 0o644, dir_fd=self._directory(directory))
        size = os.fstat(fd).st_size
        if what != "newline" and size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(fd, line)
        if what != "fsync":
            os.fsync(fd)
        os.close(fd)
        if what != "sync":
            self.sync(directory)

    return swap(Files, "append", lambda _real: append)


def record_behind_the_move() -> None:
    append, sync, held = Files.append, Files.sync, []
    Files.append = lambda _self, *a: held.append(a)

    def late(self, directory):
        sync(self, directory)
        if directory == "refs":
            append(self, *held.pop())

    Files.sync = late


def manifest_before_blobs() -> None:
    real, held = objects.put, []

    def late(store, session, area, chunks, **options):
        if area == objects.BLOBS:
            data = b"".join(bytes(chunk) for chunk in chunks)
            if options.get("observe"):
                options["observe"](data)
            held.append(data)
            return Digest.of(data), len(data)
        found = real(store, session, area, chunks)
        while held:
            real(store, session, objects.BLOBS, [held.pop()])
        return found

    ingest.objects.put = late


def ref_in_place(store, _session, ref, new, *, replace):
    fd = os.open(refs.file_name(ref), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644, dir_fd=store._directory("refs"))
    for part in (str(new), "\n"):
        os.write(fd, part.encode())
    os.fsync(fd)
    os.close(fd)


def ref_always_renamed(real):
    return lambda *a, replace: real(*a, replace=True)  # noqa: ARG005 - as in refs


def format_first() -> None:
    real = new_store.make_store

    def early(root):
        root.mkdir(parents=True, exist_ok=True)
        for name in ("tmp", "locks"):
            (root / name).mkdir(exist_ok=True)
        (root / "locks" / "gc").touch()
        if not (root / "FORMAT").exists():
            new_store._write_format(root)
        real.__globals__["os"].listdir = lambda path: [n for n in os.scandir(path) if n.name == "?"]
        real(root)

    store_module.make_store = early


def sync_path_except(skip: Callable[[Path], bool]) -> Patch:
    return swap(new_store, "sync_path", lambda real: lambda path: None if skip(path) else real(path))


def format_without_fsync() -> None:
    real = new_store._write_format

    def write(root):
        os_fsync = os.fsync
        os.fsync = lambda fd: None if "tmp/" in os.readlink(f"/proc/self/fd/{fd}") else os_fsync(fd)  # noqa: PTH115
        try:
            real(root)
        finally:
            os.fsync = os_fsync

    new_store._write_format = write


def compare_nothing() -> None:
    real = refs.move_ref

    def move(store, session, ref, *, expected, new, who="", what="tag"):
        read = refs.read_ref
        refs.read_ref = lambda *_: expected
        try:
            return real(store, session, ref, expected=expected, new=new, who=who, what=what)
        finally:
            refs.read_ref = read

    refs.move_ref = move


def without_lock(*names: str, shared_too: bool = True) -> Patch:
    def make(real):
        from contextlib import contextmanager

        @contextmanager
        def lock(self, name, *, shared=False):
            if name in names and (shared_too or not shared):
                yield True
            else:
                with real(self, name, shared=shared) as alone:
                    yield alone

        return lock

    return swap(Files, "lock", make)


def session_without_flock() -> None:
    real = Files.new_session

    def begin(self):
        flock = files.flock
        files.flock = lambda _fd, _how: True
        try:
            return real(self)
        finally:
            files.flock = flock

    Files.new_session = begin


def short_writes_accepted(self, temporary, data) -> None:
    os.write(temporary.fd, data)


def fsync_errors_swallowed(real):
    def seal(self, temporary, mode=0o444):
        with suppress(OSError):
            real(self, temporary, mode)

    return seal


def every_digest_is_whole(_files, area, digest, size=None):
    return _files.size(objects.shard(area, digest), digest.hex) is not None


def blobs_first() -> None:
    real = collect._in_order
    collect._in_order = lambda *given: reversed(list(real(*given)))


def no_lineage() -> None:
    real = collect.Records.reachable
    collect.Records.reachable = lambda self, roots: (
        {digest: self.read(digest) for digest in list(roots)} or real(self, ())
    )


def doubt_ignored() -> None:
    real = collect.named

    def named(store):
        try:
            return real(store)
        except LoraforgeError:
            return []

    collect.named = named
    read = collect.Records.reachable

    def reachable(self, roots):
        found = {}
        for root in roots:
            with suppress(LoraforgeError):
                found |= read(self, [root])
        return found

    collect.Records.reachable = reachable


def published_unverified() -> None:
    real = objects.put

    def lie(store, session, area, chunks, *, expected=None, check=None, **options):
        if expected is None:
            return real(store, session, area, chunks, check=check, **options)
        temporary = store.new_temporary(session.name)
        for chunk in chunks:
            store.write(temporary, chunk)
        store.seal(temporary)
        store.rename(temporary, objects.shard(area, expected), expected.hex)
        store.discard(temporary)
        return expected, 0

    repair.objects.put = lie


def unread_hash(store, area, digest, limit):
    return store.read(objects.shard(area, digest), digest.hex, limit)


def shallow() -> None:
    check_module._hashed = check_module._untrue = lambda *_: []


def pins_read_early(real):
    def gc(store, *, dry_run, now=False):
        early, late = collect.pins_of_the_living(store), collect.pins_of_the_living
        collect.pins_of_the_living = lambda _store: early
        try:
            return real(store, dry_run=dry_run, now=now)
        finally:
            collect.pins_of_the_living = late

    return gc


def only_what_is_there(real):
    def needed(store, manifests, pins):
        absent = {digest for digest in pins if not collect.has(store, digest)}
        return {
            key for key in real(store, manifests, pins) if key != (objects.MANIFESTS, key[1]) or key[1] not in absent
        }

    return needed


def refs_read_early(real):
    def gc(store, *, dry_run, now=False):
        early = collect.named(store)
        collect.named = lambda _store: early
        return real(store, dry_run=dry_run, now=now)

    return gc


def push_then(world: World, number: int, name: str) -> object:
    return put(Store(world.store), world.adapters[number], RefName(name))


PUSH_KNOWN = ("push", 1, "back:v1")
MUTANTS: dict[str, tuple[Patch, Look]] = {
    # durability
    "an object is not synced": (seal_without_fsync((0o444,)), power("push new")),
    "a ref is not synced": (seal_without_fsync((0o644,)), power("push new", "push latest")),
    "a blob's name is not synced": (no_sync_of("blobs"), power("push new")),
    "a manifest's name is not synced": (no_sync_of("manifests"), power("push new")),
    "a ref's name is not synced": (no_sync_of("refs"), power("push new")),
    "a record is not synced": (append_without("fsync"), power("push latest", "push new")),
    "a reflog's name is not synced": (append_without("sync"), power("push new")),
    "another's object is not synced": (
        swap(objects, "make_durable", nothing),
        power_of_two(lambda w: push_then(w, 5, "one"), lambda w: push_then(w, 5, "two")),
    ),
    "another's artifact is named unsynced": (
        swap(objects, "make_durable", nothing),
        power_of_two(
            lambda w: put(Store(w.store), w.adapters[5]), lambda w: Store(w.store).tag(w.digests[5], RefName("t"))),
    ),
    "a collection trusts names that are not durable": (
        swap(collect, "_settle_names", nothing),
        power_of_two(lambda w: Store(w.store).remove(RefName("a", "v1")), lambda w: Store(w.store).gc(dry_run=False))),
    "a collection syncs nothing between manifests and blobs": (no_sync_of("manifests"), power("gc")),
    "FORMAT is not synced": (format_without_fsync, power("push into a new store")),
    "the store's name is not synced": (
        sync_path_except(lambda path: path.name == "store"), power("push into a new store")),
    "shards are not synced": (
        sync_path_except(lambda path: path.name == "sha256"), power("push into a new store")),
    # order
    "FORMAT before the directories": (format_first, faults("push into a new store", "kill")),
    "a manifest before its blobs": (manifest_before_blobs, power("push new")),
    "a record behind its move": (record_behind_the_move, faults("push latest", "kill")),
    "a ref written in place": (swap(refs, "_publish", lambda _real: ref_in_place), faults("push latest", "kill")),
    "blobs go before manifests": (blobs_first, faults("gc", "kill")),
    # comparing and locking
    "no comparison with what was expected": (
        compare_nothing, race(("tag", "a:v1", "child"), ("tag", "#1", "child"))),
    "refs without a lock": (without_lock("refs"), race(("tag", "a:v1", "child"), ("tag", "#1", "child"))),
    "a new ref may replace": (swap(refs, "_publish", ref_always_renamed), race_for_a_tag),
    "locks are believed": (swap(Files, "_keeps_out", lambda _real: lambda *_: True), lying_locks),
    # pins
    "nothing is pinned": (swap(sessions.Session, "pin", nothing), race(PUSH_KNOWN, GC)),
    "pins are not read": (
        swap(collect, "pins_of_the_living", lambda real: lambda f: (set(), *real(f)[1:])), race(PUSH_KNOWN, GC)),
    "pins are read before the lock is held": (swap(store_module, "collect", pins_read_early), pinned_meanwhile),
    "a pin counts only for what is there": (swap(collect, "_needed", only_what_is_there), published_meanwhile),
    "refs are read before pins": (swap(store_module, "collect", refs_read_early), named_meanwhile),
    "pins wait for nobody": (without_lock("gc"), race(GC, PUSH_KNOWN)),
    "a session without its flock": (session_without_flock, race(PUSH_KNOWN, GC)),
    "readers pin nothing": (
        swap(sessions.Session, "pin", nothing), race(("pull", "#1", "--to", "{root}/out"), GC, codes=(0, 3), since=12)),
    # collecting
    "a lineage is not followed": (no_lineage, faults("gc --now", "kill")),
    "doubt stops nobody": (doubt_ignored, in_doubt),
    "the living's temporary files go": (
        swap(collect, "_ownerless", lambda _real: lambda f, _l: [f"tmp/{n}" for n in f.names("tmp")]),
        race(("push", 5, "new:v1"), GC)),
    "what crashes left stays": (swap(collect, "_ownerless", lambda _real: lambda *_: []), faults("push new", "kill")),
    # bytes
    "short writes pass": (swap(Files, "write", lambda _real: short_writes_accepted), faults("push new", "short write")),
    "errors of a sync are swallowed": (swap(Files, "seal", fsync_errors_swallowed), faults("push new", "EIO once")),
    "a torn record takes the next one along": (append_without("newline"), faults("push after a crash", "kill")),
    "any bytes pass for a known object": (swap(objects, "is_whole", lambda _real: every_digest_is_whole), healing_push),
    "a repair believes its source": (published_unverified, repair_from_damage),
    "reads hash nothing": (swap(objects, "read_all", lambda _real: unread_hash), flipped_bits),
    "a deep check looks at names only": (shallow, flipped_bits),
}  # fmt: skip


def judge(name: str | None, look: Look | None = None) -> list[str]:
    """Return what the look sees on the mutant; or on the code as it is, with ``name`` None."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        found = ["(the fork broke)"]
        try:
            patch, look = (None, look) if name is None else MUTANTS[name]
            with in_memory() as root:
                world = World(root)
                if patch is not None:
                    patch()
                found = look(world)
        except BaseException:  # noqa: BLE001 - whatever a mutant breaks, it has been seen
            found = [traceback.format_exc(limit=-3)] if name is not None else [traceback.format_exc()]
        finally:
            os.write(write, "\0".join(line[:500] for line in found[:20]).encode())
            os._exit(0)
    os.close(write)
    with open(read, "rb") as said:  # noqa: PTH123 - a pipe
        lines = said.read().decode()
    os.waitpid(child, 0)
    return [line for line in lines.split("\0") if line]


__all__ = ["MUTANTS", "Figures", "broken_chain", "closure", "judge"]
