"""One file for artifacts and their lineage: the same bytes each time, and every other byte refused."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from loraforge_registry import bundle, canonical
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, FormatError, NotFoundError, StoreError
from loraforge_registry.manifest import Artifact, Derivation, Input, encode_manifest
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from tests.bad_files import config, tensors, write_adapter


@pytest.fixture
def store(tmp_path) -> Store:
    """``child:v1``, made from an adapter without a name, and ``other:v1``."""
    store = Store(tmp_path / "store")
    for name, value in (("parent", 0.5), ("child", 0.25), ("other", 2.0)):
        write_adapter(tmp_path / name, weights=tensors(value))
    (tmp_path / "child" / "README.md").write_text("# child\n")
    parent = put(store, tmp_path / "parent", None)
    derivation = Derivation("linear", 1, (Input(parent, 0.5),))
    put(store, tmp_path / "child", RefName("child", "v1"), derivation=derivation)
    put(store, tmp_path / "other", RefName("other", "v1"))
    return store


def put(store, source, name, **options) -> Artifact:
    from loraforge_registry.ingest import open_adapter

    with open_adapter(source) as incoming:
        return store.put(incoming, name=name, **options)


def export(store: Store, path: Path, *names: str) -> Path:
    refs = {RefName.parse(name): store.resolve(name) for name in names or ("child:v1",)}
    store.export_bundle(list(refs.values()), refs, path)
    return path


def parts(data: bytes):
    """A bundle's index as a value, and the bytes behind it."""
    start = len(bundle.MAGIC) + 8
    length = int.from_bytes(data[len(bundle.MAGIC) : start], "little")
    return canonical.decode(data[start : start + length]), data[start + length :]


def joined(index, rest: bytes) -> bytes:
    packed = canonical.encode(index)
    return bundle.MAGIC + len(packed).to_bytes(8, "little") + packed + rest


def objects_in(path: Path) -> set[str]:
    return {p.name for area in ("blobs", "manifests", "refs") for p in (path / area).rglob("*") if p.is_file()}


def test_what_comes_out_goes_in_with_its_lineage_and_name(store, tmp_path):
    other = Store(tmp_path / "other-store")
    roots, names = other.import_bundle(export(store, tmp_path / "a.lf"))
    child = store.resolve("child:v1")
    assert (roots, dict(names)) == ((child,), {RefName("child", "v1"): child})
    assert other.manifest(child) == store.manifest(child)
    (parent,) = other.manifest(child).derivation.artifacts()
    assert other.manifest(parent) == store.manifest(parent)
    other.export(child, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "# child\n"
    assert other.fsck(deep=True).holds
    assert other.gc(dry_run=True).garbage == ()
    assert len(other.ls()) == 1


def test_the_same_artifacts_give_the_same_bytes(store, tmp_path):
    first = export(store, tmp_path / "a.lf", "child:v1", "other:v1").read_bytes()
    other = Store(tmp_path / "other-store")
    other.import_bundle(tmp_path / "a.lf")
    assert export(other, tmp_path / "b.lf", "other:v1", "child:v1").read_bytes() == first
    export(other, tmp_path / "b.lf", "other:v1", "child:v1")  # it is there already


def test_a_lineage_that_is_not_there_is_left_out(store, tmp_path):
    child = store.resolve("child:v1")
    (parent,) = store.manifest(child).derivation.artifacts()
    (store.path / "manifests/sha256" / parent.hex[:2] / parent.hex).unlink()
    other = Store(tmp_path / "other-store")
    other.import_bundle(export(store, tmp_path / "a.lf"))
    assert other.resolve("child:v1") == child
    assert not other.has(parent)


def test_importing_twice_changes_nothing_and_a_tag_is_not_taken(store, tmp_path):
    path = export(store, tmp_path / "a.lf")
    other = Store(tmp_path / "other-store")
    other.import_bundle(path)
    before = objects_in(other.path)
    other.import_bundle(path)
    assert objects_in(other.path) == before
    put(other, tmp_path / "other", RefName("child", "v1"), force=True)
    with pytest.raises(ConflictError, match="--force"):
        other.import_bundle(path)
    other.import_bundle(path, name=RefName("mine"))
    other.import_bundle(path, force=True)
    assert other.resolve("mine") == other.resolve("child:v1") == store.resolve("child:v1")


def test_an_export_replaces_nothing_and_leaves_nothing(store, tmp_path):
    taken = tmp_path / "taken.lf"
    taken.write_text("mine")
    with pytest.raises(ConflictError):
        export(store, taken)
    assert taken.read_text() == "mine"
    with pytest.raises(ConflictError, match="inside the store"):
        export(store, store.path / "tmp" / "a.lf")
    blob = store.manifest(store.resolve("child:v1")).file("adapter_model.safetensors").digest
    path = store.path / "blobs/sha256" / blob.hex[:2] / blob.hex
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(StoreError, match="damaged"):
        export(store, tmp_path / "a.lf")
    assert not [p for p in tmp_path.iterdir() if (p.name.endswith(".lf") and p != taken) or p.name.startswith(".")]


def refused(path: Path, tmp_path: Path) -> None:
    """It is refused with the documented error, and nothing is stored."""
    other = Store(tmp_path / "empty-store")
    with pytest.raises(FormatError) as error:
        other.import_bundle(path)
    assert str(path) in str(error.value)
    assert not other.path.exists()


def test_every_cut_and_every_added_byte_is_refused(store, tmp_path):
    data = export(store, tmp_path / "a.lf").read_bytes()
    bad = tmp_path / "bad.lf"
    for end in sorted({0, 1, 18, 19, 26, 27, 28, len(data) - 1, *random.Random(0).sample(range(len(data)), 100)}):
        bad.write_bytes(data[:end])
        refused(bad, tmp_path)
    for more in (b"\0", b"PK\x03\x04" + bytes(100)):
        bad.write_bytes(data + more)
        refused(bad, tmp_path)


def test_every_flipped_bit_is_refused(store, tmp_path):
    """A sample. The version's digit aside, no bit of a bundle is free; only a name may become another name."""
    data = export(store, tmp_path / "a.lf").read_bytes()
    bad = tmp_path / "bad.lf"
    name = data.index(b"child")
    free = range(name - 1, name + len("child") + 4)
    for position in random.Random(1).sample([n for n in range(len(data)) if n not in free], 400):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        bad.write_bytes(changed)
        refused(bad, tmp_path)


def lie(index, rest):
    """A manifest that says something else about its files than they are."""
    size = index["manifests"][0][1]
    from loraforge_registry.manifest import decode_manifest

    lying = encode_manifest(replace(decode_manifest(rest[:size]), base_name="another/base"))
    index = {**index, "manifests": [[Digest.of(lying).raw, len(lying)]], "roots": [Digest.of(lying).raw], "names": []}
    return index, lying + rest[size:]


def swapped(index, rest):
    first, second = index["blobs"][:2]
    begin = sum(size for _, size in index["manifests"])
    data = rest[begin : begin + first[1] + second[1]]
    index = {**index, "blobs": [second, first, *index["blobs"][2:]]}
    return index, rest[:begin] + data[first[1] :] + data[: first[1]] + rest[begin + len(data) :]


STRUCTURES = {
    "a lying manifest": lie,
    "no roots": lambda index, rest: ({**index, "roots": [], "names": []}, rest),
    "a root that is not there": lambda index, rest: ({**index, "roots": [bytes(32)], "names": []}, rest),
    "a name that is no name": lambda index, rest: (
        {**index, "names": [["../x", "v1", index["roots"][0]]]}, rest),
    "a name of another": lambda index, rest: ({**index, "names": [["a", "v1", bytes(32)]]}, rest),
    "a name twice": lambda index, rest: ({**index, "names": index["names"] * 2}, rest),
    "a blob that nobody needs": lambda index, rest: (
        {**index, "blobs": [*index["blobs"], [b"\xff" * 32, 1]]}, rest + b"x"),
    "a blob that is missing": lambda index, rest: (
        {**index, "blobs": index["blobs"][:-1]}, rest[: -index["blobs"][-1][1]]),
    "objects out of order": swapped,
    "a blob twice": lambda index, rest: (
        {**index, "blobs": [index["blobs"][0], *index["blobs"]]}, rest),
    "a size that is true": lambda index, rest: (
        {**index, "blobs": [[digest, True] for digest, _ in index["blobs"]]}, rest),
    "a size below zero": lambda index, rest: (
        {**index, "blobs": [[digest, -1] for digest, _ in index["blobs"]]}, rest),
    "a size beyond": lambda index, rest: (
        {**index, "blobs": [[digest, 2**53] for digest, _ in index["blobs"]]}, rest),
    "a short digest": lambda index, rest: (
        {**index, "roots": [index["roots"][0][:31]], "names": []}, rest),
    "an unknown field": lambda index, rest: ({**index, "more": 1}, rest),
    "a newer schema": lambda index, rest: ({**index, "schema": "loraforge.bundle/2"}, rest),
    "a list": lambda index, rest: ([index], rest),
    "no list": lambda index, rest: ({**index, "blobs": {"a": 1}}, rest),
}  # fmt: skip


@pytest.mark.parametrize("what", STRUCTURES)
def test_a_structure_that_is_not_the_one_is_refused(store, tmp_path, what):
    index, rest = parts(export(store, tmp_path / "a.lf", "other:v1").read_bytes())
    bad = tmp_path / "bad.lf"
    bad.write_bytes(joined(*STRUCTURES[what](index, rest)))
    refused(bad, tmp_path)


def test_an_index_that_would_take_the_memory_is_refused(tmp_path):
    bad = tmp_path / "bad.lf"
    with bad.open("wb") as file:
        file.write(bundle.MAGIC + (2**40).to_bytes(8, "little"))
        file.truncate(2**41)
    refused(bad, tmp_path)
    bad.write_bytes(bundle.MAGIC + (2**64 - 1).to_bytes(8, "little") + b"x" * 100)
    refused(bad, tmp_path)


def test_an_adapter_that_a_push_refuses_is_refused(store, tmp_path):
    """Its manifest and digests are all right, but the gates would never have let its files in."""
    index, rest = parts(export(store, tmp_path / "a.lf", "other:v1").read_bytes())
    from loraforge_registry.manifest import File, decode_manifest

    manifest = decode_manifest(rest[: index["manifests"][0][1]])
    import json

    wrong = json.dumps(config(use_qalora=True)).encode()
    files = [File(f.path, Digest.of(wrong), len(wrong)) if f.path.endswith(".json") else f for f in manifest.files]
    encoded = encode_manifest(replace(manifest, files=tuple(files)))
    weights = manifest.file("adapter_model.safetensors")
    data = (tmp_path / "other" / "adapter_model.safetensors").read_bytes()
    blobs = sorted([(Digest.of(wrong).raw, wrong), (weights.digest.raw, data)])
    made = {**index, "manifests": [[Digest.of(encoded).raw, len(encoded)]], "roots": [Digest.of(encoded).raw],
            "names": [], "blobs": [[digest, len(found)] for digest, found in blobs]}  # fmt: skip
    bad = tmp_path / "bad.lf"
    bad.write_bytes(joined(made, encoded + b"".join(found for _, found in blobs)))
    refused(bad, tmp_path)


@pytest.mark.parametrize("what", ["missing", "directory", "fifo"])
def test_what_is_no_file_is_refused(store, tmp_path, what):
    path = tmp_path / "bad.lf"
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    with pytest.raises((FormatError, NotFoundError)):
        store.import_bundle(path)


def test_the_commands(store, tmp_path, run):
    target = tmp_path / "all.lf"
    shown = run("--store", store.path, "export", "child:v1", "other:v1", target, "--json").json
    assert shown["size"] == target.stat().st_size
    assert len(shown["digests"]) == 2
    other = ("--store", tmp_path / "there")
    assert [line.split()[0] for line in run(*other, "import", target).out.splitlines()] == ["child:v1", "other:v1"]
    assert run(*other, "log", "child:v1").code == 0
    assert run(*other, "import", target, "--as", "one").code == 4  # two cannot both be it
    digest = run(*other, "show", "other:v1", "--json").json["digest"]
    assert run(*other, "export", digest, tmp_path / "one.lf").code == 0
    unnamed = run("--store", tmp_path / "third", "import", tmp_path / "one.lf")
    assert unnamed.out.startswith("sha256:")
    assert "NAME:TAG" in unnamed.err
    assert run("--store", tmp_path / "third", "import", tmp_path / "one.lf", "--as", "mine").code == 0
    assert run("--store", tmp_path / "third", "show", "mine").code == 0
    assert run(*other, "export", "missing:v1", tmp_path / "x.lf").code == 3
    assert run(*other, "export", "child:v1", "http://x/y").code == 2
    assert run(*other, "import", tmp_path / "nothing.lf").code == 3
