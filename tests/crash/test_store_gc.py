"""A collection beside every step of every other command: what is needed stays, nobody waits."""

import errno
import fcntl
import os
import signal

import pytest

from loraforge_registry import files as files_module
from loraforge_registry import sessions
from loraforge_registry.errors import StoreError
from loraforge_registry.files import Files
from loraforge_registry.names import RefName
from loraforge_registry.sessions import open_session
from loraforge_registry.store import Store
from tests.crash import store_mutants
from tests.crash.store_faults import Fork, interleave
from tests.crash.store_world import (
    World,
    closure,
    has_object,
    in_memory,
    leftovers,
    loraforge,
    put,
    refs_of,
    snapshot,
    violations,
)

GC = ("gc", "--yes", "--now")


@pytest.fixture
def world():
    with in_memory() as root:
        yield World(root)


def commands(world):
    """Commands that a collection must not disturb, and that it may not be disturbed by."""
    one, gone, out = world.digests[1], world.digests[3], world.root / "out"
    return {
        "push new": (("push", world.adapters[5], "new:v1"), {0}),
        "push what only the trash-bound has": (("push", world.adapters[1], "back:v1"), {0}),
        "tag what has no name": (("tag", f"a@{one}", "back:v1"), {0, 3}),
        "tag a removed one": (("tag", f"gone@{gone}", "gone:v1"), {0}),
        "pull what has no name": (("pull", str(one), "--to", out), {0, 3}),
        "rm": (("rm", "a:v1"), {0}),
        "gc": (GC, {0}),
    }


@pytest.mark.parametrize("case", ["push new", "push what only the trash-bound has", "tag what has no name",
                                  "tag a removed one", "pull what has no name", "rm", "gc"])  # fmt: skip
def test_a_collection_at_any_step_of_a_command(world, case):
    arguments, codes = commands(world)[case]
    before = refs_of(world.store)
    action, gc = loraforge("--store", world.store, *arguments), loraforge("--store", world.store, *GC)
    for at in range(0, 1000, 2):  # the mutants' races take every step
        world.reset()
        ended = interleave(action, gc, at)
        if ended is None:
            break
        one, two = ended
        assert one.code in codes, one.err
        assert two.code == 0, two.err
        assert closure(world.store) == []
        after = refs_of(world.store)
        assert after == before or one.code == 0
        assert violations(world.store, after, after, acked=True) == []
        loraforge_now(world, *GC)
        assert leftovers(world.store) == []
    assert at >= 10


def loraforge_now(world, *arguments):
    one = Fork(loraforge("--store", world.store, *arguments))
    one.go_on()
    ended = one.wait()
    assert ended.code == 0, ended.err
    return ended


def test_what_goes_and_why(world, run):
    shown = run("--store", world.store, "gc", "--dry-run", "--json").json
    artifacts = [row for row in shown["garbage"] if row["kind"] == "artifact"]
    assert [row["digest"] for row in artifacts] == [str(world.digests[1])]
    assert artifacts[0]["why"] == "was a:latest, moved on"
    blobs = [row for row in shown["garbage"] if row["kind"] == "file"]
    assert len(blobs) == 1  # its config is everybody's
    assert snapshot(world.store) == world.start
    text = run("--store", world.store, "gc", "--dry-run").out
    assert "was a:latest" in text
    assert "would go" in text


def test_it_goes_in_two_steps(world, run):
    reclaimable = run("--store", world.store, "du", "--json").json["reclaimable"]
    gone = run("--store", world.store, "gc", "--yes", "--json").json
    assert gone["size"] == reclaimable
    assert not has_object(world.store, world.digests[1])
    assert len(leftovers(world.store)) == 2
    assert run("--store", world.store, "du", "--json").json["reclaimable"] == reclaimable
    assert run("--store", world.store, "gc", "--yes", "--json").json["emptied"] == reclaimable
    assert leftovers(world.store) == []
    assert run("--store", world.store, "du", "--json").json["reclaimable"] == 0


def test_a_lineage_is_needed_and_a_removed_name_comes_back_until_gc(world, run):
    store = ("--store", world.store)
    assert run(*store, "gc", "--yes").code == 0
    assert has_object(world.store, world.digests[3])  # child was made from it
    assert run(*store, "rm", "child").code == 0
    moves = run(*store, "log", "child", "--reflog", "--json").json
    assert run(*store, "tag", f"child@{moves[0]['old']}", "child:back").code == 0
    assert run(*store, "rm", "child:back").code == 0
    assert run(*store, "gc", "--yes").code == 0
    refused = run(*store, "tag", f"child@{moves[0]['old']}", "child:back")
    assert refused.code == 3


@pytest.mark.parametrize("how", ["--dry-run --yes", "", "--now", "--dry-run --now"])
def test_it_wants_to_be_told(world, run, how):
    assert run("--store", world.store, "gc", *how.split()).code == 2


def test_an_absent_store_has_nothing_to_collect(world, run):
    assert run("--store", world.root / "none", "gc", "--yes").code == 0
    assert not (world.root / "none").exists()


def spoil_ref(world):
    (world.store / "refs" / "a@v1").write_text("sha256:nonsense\n")


def spoil_manifest(world):
    path = world.store / "manifests/sha256" / world.digests[0].hex[:2] / world.digests[0].hex
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


def lose_manifest(world):
    (world.store / "manifests/sha256" / world.digests[3].hex[:2] / world.digests[3].hex).unlink()
    (world.store / "refs" / "gone@v1").write_text(f"{world.digests[3]}\n")


@pytest.mark.parametrize("damage", [spoil_ref, spoil_manifest, lose_manifest])
def test_where_anything_is_in_doubt_nothing_goes(world, run, damage):
    damage(world)
    before = snapshot(world.store)
    for how in (["--dry-run"], ["--yes"], ["--yes", "--now"]):
        ran = run("--store", world.store, "gc", *how)
        assert ran.code == 5
        assert len(ran.err.splitlines()) == 1
        assert snapshot(world.store) == before


def test_what_crashes_left_goes_and_what_the_living_have_stays(world, run):
    files = Files(world.store)
    with open_session(files) as session:
        mine = files.new_temporary(session.name)
        session.pin(world.digests[1])
        dead = "0" * 24
        (world.store / "sessions" / dead).write_text(f"{world.digests[1]}\n")
        (world.store / "tmp" / f"{dead}.1").write_bytes(b"half")
        (world.store / "tmp" / "stray").write_bytes(b"half")
        gone = run("--store", world.store, "gc", "--yes", "--json").json
        assert gone["leftovers"] == [f"sessions/{dead}", f"tmp/{dead}.1", "tmp/stray"]
        assert gone["garbage"] == []
        files.discard(mine)
    assert len(run("--store", world.store, "gc", "--dry-run", "--json").json["garbage"]) == 2


def test_a_pin_that_was_cut_short_hides_no_other(world):
    files = Files(world.store)
    with open_session(files) as session:
        files.pin(session._fd, b"sha256:" + b"a" * 40)
        session.pin(world.digests[1])
        pins, living, dead = sessions.pins_of_the_living(files)
        assert (pins, living, dead) == ({world.digests[1]}, {session.name}, set())


def test_a_stopped_writer_keeps_what_it_pinned(world):
    """Stopped for however long, and then going on: no clock decides whether it lives."""
    child = Fork(loraforge("--store", world.store, "tag", f"a@{world.digests[1]}", "back:v1"), pause=12)
    assert child.event() == "P"
    os.kill(child.pid, signal.SIGSTOP)
    for name in (world.store / "sessions").iterdir():
        os.utime(name, (0, 0))
    loraforge_now(world, *GC)
    loraforge_now(world, *GC)
    os.kill(child.pid, signal.SIGCONT)
    child.go_on()
    assert child.wait().code == 0
    assert closure(world.store) == []
    assert has_object(world.store, world.digests[1])


def test_writers_do_not_overtake_a_collection_that_waits(world):
    def hold():
        with Files(world.store).lock("gc", shared=True):
            (world.root / "inside").mkdir()

    holder = Fork(hold, pause=4)  # inside
    assert holder.event() == "P"
    collector = Fork(loraforge("--store", world.store, *GC))
    assert collector.event() == "B"  # it waits for the holder
    writer = Fork(loraforge("--store", world.store, "tag", "a:v1", "new:v1"))
    assert writer.event() == "B"  # and this one for the collector
    for fork in (holder, collector, writer):
        fork.go_on()
        assert fork.wait().code == 0


# --- file systems whose locks lie ---------------------------------------------------------------------------------


def missing(_fd, _how):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def granted_to_all(_fd, _how):
    return None


@pytest.mark.parametrize("flock", [missing, granted_to_all])
def test_where_locks_keep_nobody_out(world, monkeypatch, flock):
    monkeypatch.setattr(files_module.fcntl, "flock", flock)
    store = Store(world.store)
    for how in ({"dry_run": True}, {"dry_run": False}, {"dry_run": False, "now": True}):
        with pytest.raises(StoreError, match="flock keeps nobody out"):
            store.gc(**how)
    assert snapshot(world.store) == world.start
    for move in (lambda: store.remove(RefName("a")), lambda: put(store, world.adapters[0], RefName("a"))):
        with pytest.raises(StoreError, match="new tag"):
            move()
    assert {f"refs/{name}" for name in refs_of(world.store)} == {n for n in world.start if n.startswith("refs/")}
    assert put(store, world.adapters[5], RefName("new")).digest == store.resolve("new")
    assert closure(world.store) == []


def test_a_new_tag_needs_no_lock(world, monkeypatch):
    """Two make the same one at once where locks lie: one wins, the other is told."""
    monkeypatch.setattr(files_module.fcntl, "flock", granted_to_all)
    winners = []
    for at in range(200):
        world.reset()
        ended = interleave(
            loraforge("--store", world.store, "tag", "a:v1", "new:v1"),
            loraforge("--store", world.store, "tag", "a:latest", "new:v1"),
            at,
        )
        if ended is None:
            break
        codes = sorted(one.code for one in ended)
        assert codes == [0, 4]
        winners.append([one.code for one in ended].index(0))
        assert closure(world.store) == []
    assert set(winners) == {0, 1}


def test_a_real_lock_keeps_out(world):
    files = Files(world.store)
    with files.lock("gc") as alone:
        assert alone
        with pytest.raises(BlockingIOError), (world.store / "locks" / "gc").open("r+b") as second:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with files.lock("gc", shared=True) as first, files.lock("gc", shared=True) as second:
        assert first
        assert second


def test_a_power_cut_brings_back_no_name_whose_artifact_was_collected():
    """A name that is removed but not yet durably so, and a collection that sees it gone already."""
    look = store_mutants.MUTANTS["a collection trusts names that are not durable"][1]
    assert store_mutants.judge(None, look) == []
