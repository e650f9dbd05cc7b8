"""The laws of a store: one value, one object; a name moves by compare-and-swap; the cache says nothing new."""

import itertools
import os
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraforge_registry import index, objects, refs
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, KeyMismatchError, NotFoundError, ReferenceSyntaxError, StoreError
from loraforge_registry.files import Files
from loraforge_registry.ingest import open_adapter
from loraforge_registry.manifest import WEIGHTS_FILE, Artifact
from loraforge_registry.names import RefName
from loraforge_registry.sessions import open_session
from loraforge_registry.store import Store, Usage
from tests.bad_files import tensors, write_adapter

V1 = RefName("a", "v1")
LATEST = RefName("a")


def put(store: Store, source: Path, name: RefName | None = None, **options: bool) -> Artifact:
    with open_adapter(source) as incoming:
        return store.put(incoming, name=name, **options)


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    return [write_adapter(tmp_path / f"source{i}", weights=tensors(value)) for i, value in enumerate((0.5, 0.25, 2.0))]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def files_in(store: Store, *areas: str) -> set[str]:
    areas = areas or ("blobs", "manifests", "refs", "reflog", "tmp", "sessions", "trash")
    return {str(p.relative_to(store.path)) for area in areas for p in (store.path / area).rglob("*") if not p.is_dir()}


def stored(store: Store, artifact: Artifact, path: str = WEIGHTS_FILE) -> Path:
    digest = store.manifest(artifact.digest).file(path).digest
    return store.path / "blobs" / "sha256" / digest.hex[:2] / digest.hex


def damage(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


# --- objects ------------------------------------------------------------------------------------------------------


def test_an_absent_store_is_empty_and_is_not_made_by_reading(store):
    assert store.ls() == []
    assert store.usage() == Usage(0, 0, 0, 0)
    for read in (lambda: store.resolve("a"), lambda: store.remove(V1), lambda: store.reflog("a")):
        with pytest.raises(NotFoundError):
            read()
    assert not store.path.exists()


def test_the_same_adapter_twice_is_one_artifact(store, sources):
    first = put(store, sources[0], V1)
    before = files_in(store)
    assert put(store, sources[0], V1) == first
    assert files_in(store) == before
    assert len(files_in(store, "blobs")) == 2
    assert len(files_in(store, "manifests")) == 1


def test_equal_files_are_stored_once(store, sources):
    first, second = put(store, sources[0]), put(store, sources[1])
    assert first.digest != second.digest
    assert len(files_in(store, "blobs")) == 3  # one config, two weights
    usage = store.usage()
    assert usage.artifacts == 2
    assert usage.reclaimable == usage.physical  # nothing has a name


def test_a_readme_or_another_config_is_another_artifact_of_the_same_content(store, sources):
    first = put(store, sources[0])
    (sources[0] / "README.md").write_text("hello")
    second = put(store, sources[0])
    assert first.digest != second.digest
    assert first.content_id == second.content_id


def test_objects_are_read_only_named_by_their_hash_and_nothing_else_is_left(store, sources):
    put(store, sources[0], V1)
    for name in files_in(store, "blobs", "manifests"):
        path = store.path / name
        assert Digest.of(path.read_bytes()).hex == path.name
        assert path.parent.name == path.name[:2]
        assert path.stat().st_mode & 0o777 == 0o444
    assert files_in(store, "tmp", "sessions", "trash") == set()
    assert (store.path / "refs" / "a@v1").read_text() == f"{store.resolve('a:v1')}\n"


def test_a_refused_adapter_leaves_nothing(store, sources, tmp_path):
    put(store, sources[0], V1)
    before = files_in(store)
    bad = write_adapter(tmp_path / "bad", weights=tensors(rank=3))
    with pytest.raises(KeyMismatchError):
        put(store, bad, V1)
    assert files_in(store) == before


@pytest.mark.parametrize("data", [b"", b"x", None])
def test_putting_again_heals_a_damaged_blob(store, sources, tmp_path, data):
    artifact = put(store, sources[0], V1)
    path = stored(store, artifact)
    good = path.read_bytes()
    damage(path, good[:-1] + b"\xff" if data is None else data)
    with pytest.raises(StoreError, match="damaged"):
        store.export(artifact.digest, tmp_path / "out")
    put(store, sources[0], V1)
    assert path.read_bytes() == good
    store.export(artifact.digest, tmp_path / "out")


def test_putting_again_restores_a_lost_manifest_and_blob(store, sources):
    artifact = put(store, sources[0], V1)
    stored(store, artifact).unlink()
    (store.path / "manifests/sha256" / artifact.digest.hex[:2] / artifact.digest.hex).unlink()
    assert not store.has(artifact.digest)
    assert put(store, sources[0], V1) == artifact
    assert stored(store, artifact).read_bytes() == (sources[0] / WEIGHTS_FILE).read_bytes()


# --- export -------------------------------------------------------------------------------------------------------


def test_an_export_is_the_source_byte_for_byte(store, sources, tmp_path):
    (sources[0] / "README.md").write_text("hello")
    artifact = put(store, sources[0])
    store.export(artifact.digest, tmp_path / "deep" / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "deep" / "out").iterdir()} == {
        p.name: p.read_bytes() for p in sources[0].iterdir()
    }
    store.export(artifact.digest, tmp_path / "deep" / "out")  # it is there already
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_export_of_damage_refuses_leaves_nothing_and_heals_nothing(store, sources, tmp_path):
    artifact = put(store, sources[0])
    path = stored(store, artifact)
    wrong = path.read_bytes()[:-1] + b"\xff"
    damage(path, wrong)
    before = set(tmp_path.iterdir())
    with pytest.raises(StoreError, match="damaged"):
        store.export(artifact.digest, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before
    assert path.read_bytes() == wrong


@pytest.mark.parametrize("what", ["file", "full", "other", "link", "fifo"])
def test_an_export_replaces_nothing(store, sources, tmp_path, what):
    artifact = put(store, sources[0])
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "link":
        (tmp_path / "there").mkdir()
        out.symlink_to("there")
    elif what == "fifo":
        os.mkfifo(out)
    else:
        shutil.copytree(sources[0] if what == "full" else sources[1], out)
        if what == "full":
            (out / "mine").write_text("mine")
    before = sorted(p for p in tmp_path.rglob("*") if store.path not in p.parents)
    with pytest.raises(ConflictError):
        store.export(artifact.digest, out)
    assert sorted(p for p in tmp_path.rglob("*") if store.path not in p.parents) == before


# --- names --------------------------------------------------------------------------------------------------------


def test_latest_moves_and_other_tags_need_force(store, sources):
    first, second = put(store, sources[0], LATEST), put(store, sources[1], LATEST)
    assert store.resolve("a") == second.digest
    put(store, sources[0], V1)
    with pytest.raises(ConflictError, match="--force"):
        put(store, sources[1], V1)
    assert store.resolve("a:v1") == first.digest
    with pytest.raises(ConflictError):
        store.tag(second.digest, V1)
    put(store, sources[1], V1, force=True)
    assert store.resolve("a:v1") == second.digest


def test_a_conflicting_push_is_stored_and_reachable_by_its_digest(store, sources):
    put(store, sources[0], V1)
    with pytest.raises(ConflictError) as conflict:
        put(store, sources[1], V1)
    assert str(put(store, sources[1]).digest) in str(conflict.value)


def test_a_ref_moves_only_from_what_was_expected(store, sources):
    first, second = put(store, sources[0], V1).digest, put(store, sources[1]).digest
    files = Files(store.path)
    with open_session(files) as session:
        for expected in (None, second):
            with pytest.raises(ConflictError, match="moved meanwhile"):
                refs.move_ref(files, session, V1, expected=expected, new=second)
        assert refs.read_ref(files, V1) == first
        refs.move_ref(files, session, V1, expected=first, new=second)
        assert refs.read_ref(files, V1) == second
        with pytest.raises(NotFoundError):
            refs.move_ref(files, session, RefName("b"), expected=None, new=None)


def test_a_tag_of_nothing_is_refused(store, sources):
    put(store, sources[0])
    with pytest.raises(NotFoundError):
        store.tag(Digest.of(b"nothing"), V1)
    assert store.ls() == []


def test_references(store, sources):
    first, second = put(store, sources[0], V1).digest, put(store, sources[1], RefName("b")).digest
    assert store.resolve(f"sha256:{first.hex}") == first
    assert store.resolve(f"sha256:{first.hex[:8]}") == first
    assert store.resolve(f"a@sha256:{first.hex[:8]}") == first
    with pytest.raises(NotFoundError, match="never been"):
        store.resolve(f"a@{second}")
    (store.path / "manifests/sha256" / first.hex[:2] / (first.hex[:63] + "0")).touch()
    (store.path / "manifests/sha256" / first.hex[:2] / (first.hex[:63] + "1")).touch()
    with pytest.raises(ReferenceSyntaxError, match="beginning of"):
        store.resolve(f"sha256:{first.hex[:10]}")


def test_a_damaged_ref_is_listed_by_name_while_others_work(store, sources):
    put(store, sources[0], V1)
    second = put(store, sources[1], RefName("b", "v1"))
    (store.path / "refs" / "a@v1").write_text("nonsense\n")
    lines = {str(line.ref): line for line in store.ls()}
    assert lines["a:v1"].digest is None
    assert "a:v1 is damaged" in (lines["a:v1"].problem or "")
    assert lines["b:v1"].digest == second.digest
    assert lines["b:v1"].problem is None
    with pytest.raises(StoreError):
        store.resolve("a:v1")
    with pytest.raises(StoreError):
        store.usage()
    assert store.resolve("b:v1") == second.digest


# --- the reflog ---------------------------------------------------------------------------------------------------


def moves(store: Store, name: str = "a") -> list[tuple[str, Digest | None, Digest | None, str]]:
    return [(move.tag, move.old, move.new, move.what) for move in store.reflog(name)]


def test_the_reflog_keeps_every_move(store, sources):
    first, second = put(store, sources[0], V1).digest, put(store, sources[1], V1, force=True).digest
    store.tag(first, LATEST)
    store.remove(V1)
    assert moves(store) == [
        ("v1", None, first, "push"),
        ("v1", first, second, "push"),
        ("latest", None, first, "tag"),
        ("v1", second, None, "rm"),
    ]
    put(store, sources[0], LATEST)  # no move
    assert len(moves(store)) == 4


def test_a_torn_record_is_passed_over_and_the_next_is_whole(store, sources):
    put(store, sources[0], V1)
    whole = moves(store)
    log = store.path / "reflog" / "a"
    record = log.read_bytes()
    for torn in (record[:1], record[:40], record[:-1], b"\xff\x00", b"x" * 5000):
        log.write_bytes(record + torn)
        assert moves(store)[:1] == whole
        put(store, sources[1], LATEST)
        assert moves(store)[-1][0] == "latest"
        store.remove(LATEST)


def test_a_changed_record_is_passed_over(store, sources):
    put(store, sources[0], V1)
    log = store.path / "reflog" / "a"
    record = log.read_bytes()
    for position in range(len(record) - 1):
        changed = bytearray(record)
        changed[position] ^= 1
        log.write_bytes(changed)
        with pytest.raises(NotFoundError):
            store.reflog("a")


@pytest.mark.parametrize(
    "text", [b"x - - v1 a b", b"1 sha256:0 - v1 a b", b"1 - md5 v1 a b", b"1", b"", b"a b c d e f"]
)
def test_a_record_of_nonsense_with_a_right_checksum_is_passed_over(store, sources, text):
    import zlib

    put(store, sources[0], V1)
    whole = moves(store)
    with (store.path / "reflog" / "a").open("ab") as log:
        log.write(b"%08x %s\n" % (zlib.crc32(text), text))
    assert moves(store) == whole


# --- the cache ----------------------------------------------------------------------------------------------------


def forget(path: Path) -> None:
    path.unlink()


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all" * 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def read_only(path: Path) -> None:
    path.unlink()
    empty(path)
    path.chmod(0o444)


def zeros_inside(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000:-100] = bytes(len(data) - 1100)
    path.write_bytes(data)


def execute(*statements: str):
    def run(path: Path) -> None:
        database = sqlite3.connect(path)
        with database:
            for statement in statements:
                database.execute(statement)
        database.close()

    return run


DAMAGE = {
    "gone": forget,
    "garbage": garbage,
    "empty": empty,
    "cut in half": truncated,
    "a directory": directory,
    "read-only": read_only,
    "zeros inside": zeros_inside,
    "no table": execute("DROP TABLE summary"),
    "another table": execute("DROP TABLE summary", "CREATE TABLE summary (x)"),
    "a view": execute("DROP TABLE summary", "CREATE VIEW summary AS SELECT 1 AS digest, 2 AS check_sum, 3 AS row"),
    "wrong types": execute("UPDATE summary SET digest = rowid || 'x', row = 5"),
    "text that is no text": execute("UPDATE summary SET row = CAST(x'ff' AS TEXT)"),
    "other rows": execute("UPDATE summary SET row = x'980100'"),
    "digests exchanged": execute("UPDATE summary SET digest = randomblob(32)"),
    "checksums wrong": execute("UPDATE summary SET check_sum = x'00'"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_ls_says_the_same_whatever_the_cache_is(store, sources, what):
    put(store, sources[0], V1)
    put(store, sources[1], RefName("b"))
    expected = store.ls()
    assert all(line.summary is not None for line in expected)
    DAMAGE[what](store.path / "index.sqlite")
    assert store.ls() == expected
    assert store.ls() == expected
    assert put(store, sources[2], RefName("c")).digest == store.resolve("c")
    assert [line for line in store.ls() if line.ref.name != "c"] == expected


def test_ls_says_the_same_while_the_cache_is_locked(store, sources):
    put(store, sources[0], V1)
    expected = store.ls()
    database = sqlite3.connect(store.path / "index.sqlite")
    database.execute("BEGIN EXCLUSIVE")
    assert store.ls() == expected
    put(store, sources[1], RefName("b"))
    database.close()
    assert [str(line.ref) for line in store.ls()] == ["a:v1", "b:latest"]


def test_a_row_of_the_cache_is_used_and_made_again(store, sources):
    artifact = put(store, sources[0], V1)
    (summary,) = [line.summary for line in store.ls()]
    assert index.read_summaries(store.path) == {artifact.digest: summary}
    (store.path / "index.sqlite").unlink()
    assert index.read_summaries(store.path) == {}
    store.ls()
    assert index.read_summaries(store.path) == {artifact.digest: summary}


# --- the marker ---------------------------------------------------------------------------------------------------


def test_a_directory_with_other_things_is_never_made_a_store(tmp_path, sources):
    place = tmp_path / "place"
    place.mkdir()
    (place / "mine").write_text("mine")
    with pytest.raises(StoreError, match="not a loraforge store"):
        put(Store(place), sources[0])
    assert [p.name for p in place.iterdir()] == ["mine"]


def test_a_newer_format_is_refused(store, sources):
    put(store, sources[0], V1)
    (store.path / "FORMAT").chmod(0o644)
    (store.path / "FORMAT").write_bytes(b"loraforge-store 2\n")
    with pytest.raises(StoreError, match="upgrade"):
        Store(store.path)


def test_a_lost_marker_is_not_written_again_over_a_store(store, sources):
    put(store, sources[0], V1)
    (store.path / "FORMAT").unlink()
    with pytest.raises(StoreError, match="FORMAT"):
        Store(store.path)


def test_a_half_made_store_is_finished(tmp_path, sources):
    half = tmp_path / "half"
    (half / "blobs" / "sha256" / "00").mkdir(parents=True)
    (half / "tmp").mkdir()
    (half / "tmp" / "0123").write_bytes(b"loraforge")
    put(Store(half), sources[0], V1)
    assert Store(half).ls()[0].problem is None


# --- a source that changes ----------------------------------------------------------------------------------------


def changing(source: Path, change) -> list[Digest]:
    """Put a source that changes once its header has been read."""
    store = Store(source.parent / "store")
    with open_adapter(source) as incoming:
        change(source / WEIGHTS_FILE)
        try:
            store.put(incoming, name=V1)
        finally:
            bad = [name for name in files_in(store, "blobs", "manifests")
                   if Digest.of((store.path / name).read_bytes()).hex != Path(name).name]  # fmt: skip
            assert bad == []
            assert files_in(store, "tmp", "sessions") == set()
    return list(objects.list_digests(Files(store.path), objects.MANIFESTS))


def rewrite(data: bytes):
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.write(data)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, 20),
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, path.stat().st_size + 1),
        lambda path: os.truncate(path, path.stat().st_size + 20_000_000),
        rewrite(b"\xff" * 8),
        rewrite(b"\0" * 100),
    ],
    ids=["shorter", "within its header", "empty", "longer", "much longer", "another length", "another header"],
)
def test_a_source_that_changes_meanwhile_is_refused(sources, change):
    with pytest.raises(ConflictError, match="while it was read"):
        changing(sources[0], change)
    store = Store(sources[0].parent / "store")
    assert store.ls() == []
    assert files_in(store) == set()


def test_a_source_that_is_replaced_meanwhile_is_stored_as_it_was(sources):
    before = (sources[0] / WEIGHTS_FILE).read_bytes()
    (digest,) = changing(sources[0], (sources[1] / WEIGHTS_FILE).replace)
    store = Store(sources[0].parent / "store")
    assert store.manifest(digest).file(WEIGHTS_FILE).digest == Digest.of(before)


def test_a_source_with_other_numbers_meanwhile_is_stored_as_it_is_read(sources):
    def change(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")

    (digest,) = changing(sources[0], change)
    store = Store(sources[0].parent / "store")
    (sources[0].parent / "again").mkdir()
    store.export(digest, sources[0].parent / "again")
    assert put(store, sources[0]).digest == digest


def test_everybody_who_moves_latest_at_once_succeeds(store, sources):
    """Eight writers and one name: each move is recorded once, on top of the one before."""
    digests = [put(store, source).digest for source in sources]

    def move(seed: int) -> None:
        own = Store(store.path)
        for turn in range(10):
            own.tag(digests[(seed + turn) % len(digests)], LATEST)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(move, range(8)))
    moves = store.reflog("a")
    assert all(after.old == before.new for before, after in itertools.pairwise(moves))
    assert moves[-1].new == store.resolve("a")


def test_threads_that_share_a_store_have_sessions_of_their_own(store, sources):
    def publish(number: int) -> Digest:
        return put(store, sources[number % 3], RefName(f"n{number}")).digest

    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(publish, range(48)))
    assert [store.resolve(f"n{number}") for number in range(48)] == digests
    assert files_in(store, "sessions", "tmp") == set()


def test_a_store_that_somebody_else_makes_meanwhile(tmp_path):
    source = write_adapter(tmp_path / "adapter")
    first, second = Store(tmp_path / "store"), Store(tmp_path / "store")
    digest = put(first, source, RefName("one", "v1")).digest
    assert put(second, source, RefName("two", "v1")).digest == digest
    assert sorted(str(named.ref) for named in Store(tmp_path / "store").ls()) == ["one:v1", "two:v1"]
