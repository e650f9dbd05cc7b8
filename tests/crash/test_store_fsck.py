"""What is wrong with a store is said by name; what can be put right is; nothing is lost on the way."""

import os
import random
import shutil
from pathlib import Path

import pytest

from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.manifest import encode_manifest
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from tests.crash.store_world import World, closure, in_memory, put, restore, snapshot


@pytest.fixture
def world():
    with in_memory() as root:
        yield World(root)


def manifest_of(world, number) -> Path:
    digest = world.digests[number]
    return world.store / "manifests/sha256" / digest.hex[:2] / digest.hex


def blob_of(world, number, path="adapter_model.safetensors") -> Path:
    digest = Store(world.root / "backup").manifest(world.digests[number]).file(path).digest
    return world.store / "blobs/sha256" / digest.hex[:2] / digest.hex


def overwrite(path: Path, data: bytes) -> None:
    if path.exists():
        path.chmod(0o644)
    path.write_bytes(data)


def into(make):
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


CHANGES = {
    "emptied": lambda path: overwrite(path, b""),
    "cut short": lambda path: overwrite(path, path.read_bytes()[:-1]),
    "made longer": lambda path: overwrite(path, path.read_bytes() + b"\0"),
    "its end zero": lambda path: overwrite(path, path.read_bytes()[:-9] + b"\0" * 9),
    "one bit": lambda path: overwrite(path, bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "gone": Path.unlink,
    "a directory": into(Path.mkdir),
    "a FIFO": into(os.mkfifo),
    "a link": into(lambda path: path.symlink_to("/etc/hostname")),
}
PLACES = {
    "manifest": lambda world: manifest_of(world, 0),
    "weights": lambda world: blob_of(world, 0),
    "config": lambda world: blob_of(world, 0, "adapter_config.json"),
    "ref": lambda world: world.store / "refs" / "a@v1",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", PLACES)
def test_damage_is_named_and_repaired_from_another_store(world, run, place, change):
    path = PLACES[place](world)
    CHANGES[change](path)
    if (place, change) == ("ref", "gone"):
        return  # a name that was never made, or was taken away: nothing says that it should be there
    lines = run("--store", world.store, "fsck", "--deep", "--json")
    assert lines.code == 1
    damage = [row for row in lines.json["problems"] if row["damage"]]
    assert str(path.relative_to(world.store)) in {row["place"] for row in damage}
    read = run("--store", world.store, "pull", "a:v1", "--to", world.root / "out")
    assert read.code in (2, 3, 5)
    assert len(read.err.splitlines()) == 1
    assert not (world.root / "out").exists()
    before = snapshot(world.store) if change not in ("a FIFO", "a link") else None
    repaired = run("--store", world.store, "fsck", "--deep", "--repair", "--from", f"file://{world.root}/backup")
    assert repaired.code == 0, repaired.out
    assert "repaired" in repaired.out
    assert run("--store", world.store, "pull", "a:v1", "--to", world.root / "out").code == 0
    assert closure(world.store) == []
    after = snapshot(world.store)
    assert {name: row[0] for name, row in world.start.items()}.items() <= {n: r[0] for n, r in after.items()}.items()
    if before is not None and change not in ("gone", "a directory"):  # what was damaged is kept
        kept = {data for name, (data, _) in after.items() if name.startswith("quarantine/")}
        assert before[str(path.relative_to(world.store))][0] in kept


@pytest.mark.parametrize("place", ["manifest", "weights", "config"])
def test_what_cannot_be_repaired_stays_where_it_is(world, run, place):
    path = PLACES[place](world)
    overwrite(path, path.read_bytes()[:-1])
    before = snapshot(world.store)
    assert run("--store", world.store, "fsck", "--deep", "--repair").code == 1
    assert snapshot(world.store) == before
    spoiled = world.root / "backup" / path.relative_to(world.store)
    overwrite(spoiled, spoiled.read_bytes()[:-2])  # the other store is no better
    assert run("--store", world.store, "fsck", "--deep", "--repair", "--from", f"file://{world.root}/backup").code == 1
    assert snapshot(world.store) == before


def test_what_a_collection_took_comes_back_from_the_trash(world, run):
    assert run("--store", world.store, "gc", "--yes").code == 0
    (world.store / "refs" / "a@latest").write_text(f"{world.digests[1]}\n")  # as a copy made meanwhile might have it
    assert run("--store", world.store, "fsck").code == 1
    assert run("--store", world.store, "fsck", "--repair", "--json").json["repaired"]
    assert closure(world.store) == []


def test_a_whole_store_is_whole_and_leftovers_are_no_damage(world, run):
    shown = run("--store", world.store, "fsck", "--deep", "--json").json
    assert (shown["holds"], shown["problems"]) == (True, [])
    assert (shown["artifacts"], shown["names"]) == (5, 3)
    (world.store / "sessions" / ("0" * 24)).touch()
    (world.store / "blobs" / "sha256" / "00" / "notes.txt").touch()
    (world.store / "notes.txt").touch()
    (world.store / "refs" / "UPPER@v1").touch()
    with (world.store / "reflog" / "a").open("ab") as log:
        log.write(b"0000 torn")
    shown = run("--store", world.store, "fsck", "--deep", "--json")
    assert shown.code == 0
    assert sorted(row["kind"] for row in shown.json["problems"]) == ["damaged_record", "leftover"] + ["stray"] * 3
    assert run("--store", world.store, "fsck").out == "5 artifacts, 6 files, 3 names: whole\n"


@pytest.mark.parametrize("directory", ["tmp", "locks", "sessions", "trash", "blobs/sha256/00", "reflog"])
def test_a_lost_directory_is_made_again(world, run, directory):
    shutil.rmtree(world.store / directory)
    assert run("--store", world.store, "fsck").code == 1
    assert run("--store", world.store, "fsck", "--repair").code == 0
    assert run("--store", world.store, "push", world.adapters[5], "new:v1").code == 0
    assert closure(world.store) == []


def test_a_quarantine_is_made_when_it_is_needed(world, run):
    (world.store / "quarantine").rmdir()
    assert run("--store", world.store, "fsck").code == 0
    overwrite(blob_of(world, 0), b"")
    repair = ("fsck", "--deep", "--repair", "--from", f"file://{world.root}/backup")
    assert run("--store", world.store, *repair).code == 0
    assert len(list((world.store / "quarantine").iterdir())) == 1


def test_a_store_that_lost_its_marker_is_refused_not_begun_again(world, run):
    (world.store / "FORMAT").unlink()
    before = snapshot(world.store)
    for command in (["fsck", "--repair"], ["push", world.adapters[5]], ["gc", "--yes"]):
        assert run("--store", world.store, *command).code == 5
    assert snapshot(world.store) == before


def test_a_ref_that_means_another_artifact_than_its_history(world, run):
    (world.store / "refs" / "a@v1").write_text(f"{world.digests[1]}\n")
    shown = run("--store", world.store, "fsck", "--json")
    assert shown.code == 1
    assert [row["kind"] for row in shown.json["problems"]] == ["foreign_ref"]
    assert run("--store", world.store, "tag", str(world.digests[0]), "a:v1", "--force").code == 0
    assert run("--store", world.store, "fsck").code == 0


def test_two_objects_exchanged(world, run):
    one, two = manifest_of(world, 0), manifest_of(world, 2)
    data = one.read_bytes(), two.read_bytes()
    overwrite(one, data[1])
    overwrite(two, data[0])
    damage = run("--store", world.store, "fsck", "--json").json["problems"]
    assert {row["digest"] for row in damage} == {str(world.digests[0]), str(world.digests[2])}


def test_a_manifest_that_says_what_its_files_are_not(world, run):
    store = Store(world.store)
    good = store.manifest(world.digests[0])
    from dataclasses import replace

    lying = encode_manifest(replace(good, base_name="another/base"))
    digest = Digest.of(lying)
    path = world.store / "manifests/sha256" / digest.hex[:2] / digest.hex
    path.write_bytes(lying)
    store.tag(digest, RefName("lie"))
    assert run("--store", world.store, "fsck").code == 0
    found = run("--store", world.store, "fsck", "--deep", "--json").json["problems"]
    assert [(row["kind"], row["digest"]) for row in found] == [("untrue_manifest", str(digest))]


@pytest.mark.parametrize(
    "url", ["hf://org/repo", "http://host/dir", "file://host/dir", "/plain/path", "file://", "ftp://x/y"]
)
def test_only_a_store_on_this_machine_helps(world, run, url):
    assert run("--store", world.store, "fsck", "--repair", "--from", url).code == 2


def test_a_source_that_is_no_store(world, run):
    assert run("--store", world.store, "fsck", "--repair", "--from", f"file://{world.root}/nowhere").code == 3
    assert run("--store", world.store, "fsck", "--repair", "--from", f"file://{world.root}/adapters").code in (3, 5)
    assert run("--store", world.store, "fsck", "--from", f"file://{world.root}/backup").code == 2


def test_every_bit_counts(world):
    """A sample of single flipped bits in every kind of file; ``make torture`` flips all of them."""
    generator = random.Random(0)
    store = Store(world.store)
    names = [name for name in world.start if name.startswith(("blobs/", "manifests/", "refs/"))]
    for _ in range(300):
        name = generator.choice(names)
        data = world.start[name][0]
        position = generator.randrange(len(data) * 8)
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        overwrite(world.store / name, bytes(flipped))
        report = store.fsck(deep=True)
        assert not report.holds, (name, position)
        assert right_or_refused(world, store), (name, position)
        restore(world.store, world.start)


def right_or_refused(world, store) -> bool:
    """Whether every name still means what it did, or says that it cannot."""
    expected = {"a:v1": 0, "a:latest": 2, "child:latest": 4}
    for name, number in expected.items():
        try:
            digest = store.resolve(name)
            manifest = store.manifest(digest)
            found = [store.read_file(file, 1 << 20) for file in manifest.files]
        except LoraforgeError:
            continue
        source = world.adapters[number]
        if digest != world.digests[number] and number != 4:
            return False
        if found != [(source / file.path).read_bytes() for file in manifest.files]:
            return False
    return True


def test_a_push_heals_what_is_damaged(world, run):
    overwrite(blob_of(world, 0), b"")
    assert run("--store", world.store, "push", world.adapters[0], "again:v1").code == 0
    assert run("--store", world.store, "fsck", "--deep").code == 0
    put(Store(world.store), world.adapters[0])


def test_an_empty_file_that_is_missing_is_missing(world, run):
    (world.adapters[5] / "README.md").write_bytes(b"")
    for place in (world.store, world.root / "backup"):
        put(Store(place), world.adapters[5], RefName("empty"))
    empty = Digest.of(b"")
    (world.store / "blobs/sha256" / empty.hex[:2] / empty.hex).unlink()
    assert run("--store", world.store, "fsck").code == 1
    assert run("--store", world.store, "fsck", "--repair", "--from", f"file://{world.root}/backup").code == 0
    assert run("--store", world.store, "pull", "empty", "--to", world.root / "out").code == 0
