"""Every command that changes a store, from several beginnings, with a fault at each of its calls; then I1 to I10."""

import concurrent.futures.thread  # noqa: F401 - as above
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loraforge_cli.commands import export, fsck, gc, import_, pull, push, rm, tag  # noqa: F401 - imported once, not in each fork
from loraforge_registry.bundle import read_bundle
from loraforge_registry.errors import FormatError
from loraforge_registry.files import Files
from loraforge_registry.ingest import open_adapter, open_source
from loraforge_registry.manifest import Artifact
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from tests.crash.store_faults import FAULTS, Ended, run
from tests.crash.store_world import (
    World,
    closure,
    derived,
    few_shards,
    leftovers,
    loraforge,
    put,
    quick_disk,
    refs_of,
    remove_outputs,
    restore,
    snapshot,
    violations,
)

Action = Callable[[], object]
GC = ("gc", "--yes", "--now")


@dataclass(frozen=True)
class Scenario:
    """A command, what is prepared before it, and the exit code it has without faults."""

    name: str
    action: Callable[[World], Action]
    prepare: Callable[[World], object] = lambda _world: None
    code: int = 0
    heals: bool = False  # it begins with damage, so only its end is checked
    again: int | None = None  # the code it has where it is done already, if that is another
    parts: bool = False  # it does several things, one behind the other
    remote: bool = False  # it reads the backup, as a remote


def command(*arguments: object, store: str = "store") -> Callable[[World], Action]:
    """A command line; a number stands for an adapter's directory, ``#number`` for its digest."""

    def word(world: World, argument: object) -> object:
        if isinstance(argument, int):
            return world.adapters[argument]
        text = str(argument).replace("{root}", str(world.root))
        return re.sub(r"#(\d)", lambda match: str(world.digests[int(match[1])]), text)

    return lambda world: loraforge("--store", world.root / store, *(word(world, argument) for argument in arguments))


def put_derived(world: World) -> Action:
    """What compose does: a derived adapter with artifacts as its parents."""

    def action() -> None:
        store = Store(world.store)
        with store.session(), open_adapter(world.adapters[5]) as incoming:
            parents = [Artifact(world.digests[n], store.manifest(world.digests[n]).content_id) for n in (0, 1)]
            store.put(incoming, name=RefName("made", "v1"), derivation=derived(parents))

    return action


def crashed(world: World) -> None:
    """Leave what crashes leave: pins and half a file of the dead, a torn record."""
    (world.store / "sessions" / ("0" * 24)).write_text(f"{world.digests[1]}\nsha256:12")
    (world.store / "tmp" / ("0" * 24 + ".1")).write_bytes(b"half")
    with (world.store / "reflog" / "a").open("ab") as log:
        log.write(b"0badc0de 17 - sha")


def bundled(world: World) -> None:
    """Another store's artifact with a name, in a file."""
    (world.root / "in.lf").unlink(missing_ok=True)
    backup = Store(world.root / "backup")
    backup.export_bundle([world.digests[5]], {RefName("new", "v1"): world.digests[5]}, world.root / "in.lf")


def no_store(world: World) -> None:
    shutil.rmtree(world.store)


def damaged(world: World) -> None:
    """Spoil a file, a manifest and a ref, lose a directory."""
    for area, number in (("manifests", 0), ("blobs", 2)):
        digest = world.digests[number]
        if area == "blobs":
            digest = Store(world.root / "backup").manifest(digest).file("adapter_model.safetensors").digest
        path = world.store / area / "sha256" / digest.hex[:2] / digest.hex
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1])
        path.chmod(0o444)
    (world.store / "refs" / "child@latest").write_text("nonsense")


def collected(world: World) -> None:
    """Collect, and bring back a name of what lies in the trash, as a copy made meanwhile could have it."""
    Store(world.store).gc(dry_run=False)
    (world.store / "refs" / "a@latest").write_text(f"{world.digests[1]}\n")


def in_trash(world: World) -> None:
    Store(world.store).gc(dry_run=False)
    Store(world.store).remove(RefName("child"))


def lineage(world: World) -> None:
    """Give the backup a derived adapter, neither of whose parents has a name in the store."""
    backup = Store(world.root / "backup")
    parents = [Artifact(world.digests[n], backup.manifest(world.digests[n]).content_id) for n in (3, 4)]
    with quick_disk():
        put(backup, world.adapters[5], RefName("new", "v1"), derivation=derived(parents))


URL = "file://{root}/backup#new:v1"
SCENARIOS = (
    Scenario("push new", command("push", 5, "new:v1")),
    Scenario("push again", command("push", 0, "a:v1")),
    Scenario("push known files", command("push", 1, "other:v1")),
    Scenario("push latest", command("push", 5, "a")),
    Scenario("push --force", command("push", 3, "a:v1", "--force")),
    Scenario("push without a name", command("push", 5)),
    Scenario("push conflict", command("push", 5, "a:v1"), code=4),
    Scenario("push by reference", command("push", "a@#1", "back:v1")),
    Scenario("push after a crash", command("push", 5, "a"), crashed),
    Scenario("push after gc", command("push", 1, "a"), lambda world: Store(world.store).gc(dry_run=False)),
    Scenario("put derived", put_derived),
    Scenario("tag new", command("tag", "a:v1", "b:v1")),
    Scenario("tag latest", command("tag", "a:v1", "a")),
    Scenario("tag --force", command("tag", "a", "a:v1", "--force")),
    Scenario("tag undo a move", command("tag", "a@#1", "a:undone")),
    Scenario("tag undo a removal", command("tag", "gone@#3", "gone:v1")),
    Scenario("tag after a crash", command("tag", "a:v1", "a"), crashed),
    Scenario("rm", command("rm", "a:v1"), again=3),
    Scenario("rm two", command("rm", "a:v1", "child"), again=3, parts=True),
    Scenario("rm after a crash", command("rm", "a"), crashed, again=3),
    Scenario("gc", command("gc", "--yes")),
    Scenario("gc --now", command(*GC)),
    Scenario("gc after a crash", command(*GC), crashed),
    Scenario("gc the trash", command("gc", "--yes"), in_trash),
    Scenario("pull", command("pull", "a", "--to", "{root}/out")),
    Scenario("export", command("export", "child", "a:v1", "{root}/out.lf")),
    Scenario("import", command("import", "{root}/in.lf"), bundled),
    Scenario("import --force", command("import", "{root}/in.lf", "--as", "a:v1", "--force"), bundled),
    Scenario("fsck --repair --from", command("fsck", "--deep", "--repair", "--from", "file://{root}/backup"), damaged,
             heals=True),
    Scenario("fsck --repair from the trash", command("fsck", "--repair"), collected, heals=True),
    Scenario("fsck --repair of nothing", command("fsck", "--repair")),
    Scenario("pull a URL", command("pull", "file://{root}/backup##5", "--as", "new:v1"), remote=True),
    Scenario("pull a URL with lineage", command("pull", URL, "--with-lineage", "--to", "{root}/out"), lineage,
             remote=True),
    Scenario("push --to", command("push", "new:v1", "--to", "file://{root}/store", store="backup"), lineage,
             remote=True),
    Scenario("push --to --force", command("push", "#5", "--to", "file://{root}/store#a:v1", "--force", store="backup"),
             remote=True),
)  # fmt: skip
NEW_STORE = Scenario("push into a new store", command("push", 0, "a:v1"), no_store)


@dataclass
class Figures:
    """What an enumeration has seen."""

    injections: int = 0
    commands: int = 0
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(
            self.injections + other.injections,
            self.commands + other.commands,
            self.wrong + other.wrong,
            max(self.slowest, other.slowest),
        )


def enumerate_faults(
    world: World, scenario: Scenario, faults: Iterable[str] = FAULTS, *, choose: Callable[[int], bool] = lambda _: True
) -> Figures:
    """Let each fault happen at each call of a scenario's command that ``choose`` takes."""
    start, after, calls = _without_faults(world, scenario)
    found = Figures(commands=1)
    for fault in faults:
        for at in _points(calls, fault):
            if choose(at):
                _one(world, scenario, start, after, fault, at, found)
    world.reset()
    return found


def enumerate_pairs(world: World, scenario: Scenario, recovery: Scenario, *, step: int = 1) -> Figures:
    """Kill a scenario's command at each call, and then its recovery at each call; the one after that must do it all."""
    start, after, calls = _without_faults(world, scenario)
    done = snapshot(world.store)
    restore(world.store, start)
    found = Figures(commands=1)
    with few_shards(world.store, start, done, snapshot(world.root / "backup")):
        for at in _points(calls, "kill"):
            _begin(world, start)
            run(scenario.action(world), "kill", at)
            half = snapshot(world.store)
            refs_now = refs_of(world.store)
            ended = run(recovery.action(world))
            recovered = refs_of(world.store)
            for then in list(_points(ended.calls, "kill"))[::step]:
                restore(world.store, half)
                run(recovery.action(world), "kill", then)
                found.injections += 1
                wrong = [] if scenario.heals else violations(world.store, refs_now, recovered, acked=False)
                wrong += _converged(world, scenario, refs_now, after, run(scenario.action(world)))
                found.wrong += [f"{scenario.name} killed at {at}, {recovery.name} at {then}: {line}" for line in wrong]
        restore(world.store, start)
    world.reset()
    return found


def _without_faults(world: World, scenario: Scenario):
    world.reset()
    scenario.prepare(world)
    start = snapshot(world.store) if world.store.exists() else {}
    ended = run(scenario.action(world))
    assert ended.code == scenario.code, (scenario.name, ended.err)
    world.output = snapshot(world.root / "out") if (world.root / "out").exists() else {}
    return start, refs_of(world.store), ended.calls


def _points(calls, fault: str) -> Iterator[int]:
    """The calls that a fault can happen at."""
    for number, (name, _) in enumerate(calls):
        if name == "flock" or (fault.startswith("short") and name != "write"):
            continue
        yield number


def _begin(world: World, start) -> dict[str, str]:
    remove_outputs(world.root)
    if start:
        restore(world.store, start)
    else:
        shutil.rmtree(world.store, ignore_errors=True)
    return refs_of(world.store)


def _one(world: World, scenario: Scenario, start, after, fault: str, at: int, found: Figures) -> None:
    before = _begin(world, start)
    ended = run(scenario.action(world), fault, at)
    found.injections += 1
    wrong = _judge(world, scenario, before, after, ended, (fault, at))
    began = time.monotonic()
    again = run(scenario.action(world))
    found.slowest = max(found.slowest, time.monotonic() - began)
    wrong += _converged(world, scenario, before, after, again)
    collected_again = run(loraforge("--store", world.store, *GC))
    if collected_again.code != 0 or leftovers(world.store):
        wrong.append(f"I7: gc left {leftovers(world.store)} {collected_again.err}")
    wrong += closure(world.store)
    wrong += world.changed_sources(remote=scenario.remote)
    found.wrong += [f"{scenario.name}, {fault} at {at}: {line}" for line in wrong]


def _converged(world: World, scenario: Scenario, before, after, again: Ended) -> list[str]:
    """I6: the same command again does what the first one did not; what is done already may say so."""
    half = scenario.parts and again.code == scenario.again
    wrong = violations(world.store, before if half else after, after, acked=not half)
    if again.code not in (scenario.code, scenario.again):
        wrong.append(f"I6: the next command ended with {again.code}: {again.err}")
    return wrong


def _judge(world: World, scenario: Scenario, before, after, ended: Ended, what: tuple[str, int]) -> list[str]:
    """What does not hold right behind the fault."""
    wrong: list[str] = []
    fault, at = what
    acked = ended.code == scenario.code
    if not ended.reached:
        wrong.append("the fault did not happen: the command is not deterministic")
    if not scenario.heals and (world.store / "FORMAT").exists():
        wrong += violations(world.store, before, after, acked=acked)
        if fault == "term" and ended.code is not None:
            wrong += _not_cleaned(world, ended, at)
    if (world.root / "out").exists() and snapshot(world.root / "out") != world.output:
        wrong.append("I9: an output is there and not complete")
    if (world.root / "out.lf").exists():
        wrong += _broken_bundle(world.root / "out.lf")
    if acked and fault not in ("kill", "term") and ended.calls[at][0] in ("fsync", "fdatasync"):
        wrong.append("F11: a sync failed, and the command says that it is done")
    return wrong + _loud(world, ended, acked=acked, fault=fault)


def _broken_bundle(path: Path) -> list[str]:
    with open_source(path) as fd:
        try:
            read_bundle(path, fd)
        except FormatError as error:
            return [f"I9: {error}"]
    return []


def _not_cleaned(world: World, ended: Ended, at: int) -> list[str]:
    """F2: a signal leaves nothing in tmp/, unless it came while just that was being removed."""
    left = [name for name in leftovers(world.store) if name.startswith("tmp/") and "0" * 24 not in name]
    return [f"F2: it left {left}"] if left and ended.calls[at][0] != "unlink" else []


def _loud(world: World, ended: Ended, *, acked: bool, fault: str) -> list[str]:
    """I8: one line that names a place, and an exit code."""
    if ended.code is None or acked:
        return []
    if fault == "term":
        return [] if ended.code == 143 else [f"I8: ended with {ended.code} after SIGTERM: {ended.err}"]
    if ended.code == 99:  # a library call
        named = ended.err.startswith("InputOutputError") and str(world.root) in ended.err
        return [] if named else [f"I8: {ended.err}"]
    lines = [line for line in ended.err.splitlines() if line.startswith("loraforge: ")]
    if ended.code == 1 and not ended.err:
        return []  # fsck found what it could not repair
    places = (str(world.root), tempfile.gettempdir())
    if ended.code != 5 or len(lines) != 1 or not any(place in lines[0] for place in places):
        return [f"I8: ended with {ended.code}: {ended.err!r}"]
    return []


_TRACED = (
    "write,pwrite64,fsync,fdatasync,fchmod,fchmodat,chmod,link,linkat,rename,renameat,renameat2,unlink,unlinkat,mkdir,"
    "mkdirat,rmdir,openat,open,ftruncate,fallocate,truncate,creat,flock"
)


def count_by_strace(world: World, scenario: Scenario) -> tuple[int, int] | None:
    """Return how many calls on the store's files the kernel saw, and how many the shim did; None without strace."""
    import subprocess
    import sys

    tracer = shutil.which("strace")
    if tracer is None:
        return None
    _, _, calls = _without_faults(world, scenario)
    world.reset()
    scenario.prepare(world)
    log = world.root / "strace.log"
    script = "from tests.crash.store_scenarios import *; from pathlib import Path; replay(Path({!r}), {!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    subprocess.run(
        [tracer, "-f", "-y", "-qq", "-o", str(log), "-e",
         f"trace={_TRACED}",
         sys.executable, "-c", script.format(str(world.root), scenario.name)],
        check=True, env=environment, capture_output=True,
    )  # fmt: skip
    ours = [call for call in calls if str(world.root) in call[1]]
    return sum(_mutates_store(line, world) for line in log.read_text(errors="replace").splitlines()), len(ours)


def replay(root: Path, name: str) -> None:
    """Run one scenario's command on a world that is there."""
    world = World.__new__(World)
    world.root = root
    world.adapters = [root / "adapters" / str(number) for number in range(6)]
    scenario = next(found for found in (*SCENARIOS, NEW_STORE) if found.name == name)
    from loraforge_registry.objects import MANIFESTS, list_digests

    backup = {}
    for digest in list_digests(Files(root / "backup"), MANIFESTS):
        manifest = Store(root / "backup").manifest(digest)
        backup[manifest.content_id] = digest
    world.digests = [_digest_of(source, backup) for source in world.adapters]
    try:
        scenario.action(world)()
    except SystemExit as stop:
        if stop.code not in (None, 0, scenario.code):
            raise


def _digest_of(source: Path, backup):
    from loraforge_registry.ingest import examine

    with open_adapter(source) as incoming:
        return backup[examine(incoming)[0].content_id]


def _mutates_store(line: str, world: World) -> bool:
    """Whether a line of strace is a call that could change a file of the world, as the shim counts them."""
    call = line.partition(" ")[2].lstrip().partition("(")[0]
    if str(world.root) not in line or "index.sqlite" in line or "resumed>" in line or "(1<" in line:
        return False
    return call not in ("openat", "open") or "O_CREAT" in line
