"""Another store as a remote: lineage travels, only what is missing does, and what is damaged there is not taken."""

import pytest

from loraforge_registry.manifest import encode_manifest
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from tests.bad_files import tensors, write_adapter
from tests.crash.store_world import put

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def stores(run, tmp_path):
    """A store with mix:v1, made of a:v1 and b:v1, and an empty directory for another."""
    for name, value in (("a", 0.5), ("b", 0.75)):
        run("push", write_adapter(tmp_path / name, weights=tensors(value)), f"{name}:v1")
    run("compose", "a:v1=0.5", "b:v1=0.5", "--as", "mix:v1")
    (tmp_path / "there").mkdir()
    return Store(), tmp_path / "there"


def digests(run, *arguments):
    return {row["name"]: row["digest"] for row in run("--json", *arguments, "ls").json}


def blob(store: Store, reference: str):
    digest = store.manifest(store.resolve(reference)).file(WEIGHTS).digest
    return store.path / "blobs" / "sha256" / digest.hex[:2] / digest.hex


def test_a_push_takes_its_lineage_along(stores, run):
    here, there = stores
    ran = run("--json", "push", "mix:v1", "--to", f"file://{there}").json
    assert ran["remote"] == f"file://{there}#mix:v1"
    manifests = [here.manifest(here.resolve(name)) for name in ("a:v1", "b:v1", "mix:v1")]
    assert ran["sent"] == sum({file.digest: file.size for m in manifests for file in m.files}.values())
    other = Store(there)
    assert other.resolve("mix:v1") == here.resolve("mix:v1")
    assert all(other.has(here.resolve(name)) for name in ("a:v1", "b:v1"))
    assert run("--store", there, "fsck", "--deep").code == 0
    assert run("--store", there, "gc", "--yes", "--now").code == 0
    assert other.has(here.resolve("a:v1"))


def test_a_second_push_or_pull_moves_nothing(stores, run):
    _, there = stores
    run("push", "mix:v1", "--to", f"file://{there}")
    assert run("--json", "push", "mix:v1", "--to", f"file://{there}").json["sent"] == 0
    assert run("--json", "push", "mix:v1", "--to", f"file://{there}#other:v1").json["sent"] == 0
    again = run("--json", "pull", f"file://{there}#mix:v1", "--with-lineage").json
    assert (again["received"], again["missing"]) == (0, [])


def test_a_pull_with_and_without_lineage(stores, run, tmp_path, monkeypatch):
    here, _ = stores
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "third"))
    alone = run("--json", "pull", f"file://{here.path}#mix:v1")
    assert len(alone.json["missing"]) == 2
    assert "--with-lineage asks the remote" in alone.err
    assert not Store().has(here.resolve("a:v1"))
    full = run("--json", "pull", f"file://{here.path}#mix:v1", "--with-lineage").json
    assert full["missing"] == []
    assert Store().has(here.resolve("a:v1"))
    assert run("--json", "ls").json[0]["digest"] == str(here.resolve("mix:v1"))


def test_by_digest_it_needs_a_name(stores, run, tmp_path, monkeypatch):
    here, _ = stores
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "third"))
    url = f"file://{here.path}#{here.resolve('a:v1')}"
    assert run("pull", url).code == 2
    assert run("pull", url, "--as", "mine:v1").code == 0
    assert Store().resolve("mine:v1") == here.resolve("a:v1")


def test_a_tag_that_is_taken(stores, run):
    here, there = stores
    run("push", "a:v1", "--to", f"file://{there}#x:v1")
    taken = run("--json", "push", "b:v1", "--to", f"file://{there}#x:v1")
    assert (taken.code, taken.json["error"]["kind"]) == (4, "conflict")
    assert not Store(there).has(here.resolve("b:v1"))
    assert run("push", "b:v1", "--to", f"file://{there}#x:v1", "--force").code == 0


def test_a_parent_that_is_nowhere(stores, run):
    here, there = stores
    digest = here.resolve("a:v1")
    (here.path / "manifests" / "sha256" / digest.hex[:2] / digest.hex).unlink()
    ran = run("push", "mix:v1", "--to", f"file://{there}")
    assert (ran.code, f"its parent {digest} is in neither store" in ran.err) == (0, True)


def test_where_a_store_may_be_made(stores, run, tmp_path):
    _, there = stores
    absent = run("--json", "push", "a:v1", "--to", f"file://{tmp_path}/not-mounted")
    assert (absent.code, absent.json["error"]["kind"]) == (3, "not_found")
    assert not (tmp_path / "not-mounted").exists()
    (there / "thesis.tex").write_text("important")
    assert run("push", "a:v1", "--to", f"file://{there}").code == 4
    assert sorted(path.name for path in there.iterdir()) == ["thesis.tex"]
    assert run("pull", f"file://{tmp_path}/not-mounted#a:v1").code == 3
    assert run("pull", f"file://{tmp_path}/b").code == 3


def test_which_adapter_must_be_said(stores, run):
    here, there = stores
    ran = run("pull", f"file://{here.path}")
    assert (ran.code, "#NAME:TAG" in ran.err) == (2, True)
    assert run("push", f"a@{here.resolve('a:v1')}", "--to", f"file://{there}").code == 2


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_damage_there_is_not_taken(damage, stores, run, tmp_path, monkeypatch):
    here, _ = stores
    path = blob(here, "a:v1")
    data = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(data[:-1] + b"!" if damage is None else damage)
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "third"))
    ran = run("--json", "pull", f"file://{here.path}#a:v1")
    assert (ran.code, ran.json["error"]["kind"]) == (5, "bad_store")
    assert "damaged" in ran.json["error"]["message"]
    assert [p for p in (tmp_path / "third").rglob("*") if p.is_file() and len(p.name) >= 24] == []


def test_an_untrue_manifest_there_is_not_taken(stores, run, tmp_path, monkeypatch):
    """A store that lies about what an adapter computes, by a manifest that is whole in itself."""
    from dataclasses import replace

    from loraforge_registry.digest import Digest

    here, _ = stores
    lied = encode_manifest(replace(here.manifest(here.resolve("a:v1")), content_id=Digest.of(b"else")))
    digest = Digest.of(lied)
    (here.path / "manifests" / "sha256" / digest.hex[:2] / digest.hex).write_bytes(lied)
    (here.path / "refs" / "lie@v1").write_text(f"{digest}\n")
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "third"))
    ran = run("--json", "pull", f"file://{here.path}#lie:v1")
    assert (ran.code, "its files make the artifact" in ran.json["error"]["message"]) == (2, True)
    assert not Store().has(digest)


def test_files_that_are_here_are_not_read_there(stores, run, tmp_path, monkeypatch):
    here, _ = stores
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "third"))
    source = tmp_path / "a"
    run("push", source, "mine:v1")
    (source / "README.md").write_text("# new\n")
    run("--store", here.path, "push", source, "a:v2")
    ran = run("--json", "pull", f"file://{here.path}#a:v2").json
    assert ran["received"] == len("# new\n")
    assert Store().lookup(RefName("a", "v2")) is not None


def test_a_full_disk_is_said_first(stores, run, tmp_path, monkeypatch):
    here, _ = stores
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "third"))
    monkeypatch.setattr("loraforge_registry.remotes.transfer._free", lambda _path: 10)
    ran = run("--json", "pull", f"file://{here.path}#a:v1")
    assert (ran.code, "has room for 10" in ran.json["error"]["message"]) == (5, True)


def test_an_adapter_that_says_what_it_is_from(stores, run):
    here, there = stores
    run("push", "mix:v1", "--to", f"file://{there}")
    assert digests(run, "--store", there) == {"mix": str(here.resolve("mix:v1"))}
    drawn = run("--store", there, "log", "mix:v1").out
    assert str(here.resolve("a:v1"))[:15] in drawn


def test_a_name_that_comes_from_elsewhere_now_says_so(tmp_path, run):
    """A40: names are not protected; what moved is said, and a digest can be asked for instead."""
    for place, value in (("real", 0.5), ("squatted", 1.5)):
        store = Store(tmp_path / place)
        put(store, write_adapter(tmp_path / f"{place}-adapter", weights=tensors(value)), RefName("french"))
    real, squatted = (f"file://{tmp_path / place}" for place in ("real", "squatted"))
    mine, digest = tmp_path / "mine", Store(tmp_path / "real").resolve("french")
    assert run("--store", mine, "pull", f"{real}#french").code == 0
    assert "came from" not in run("--store", mine, "pull", f"{real}#french").err
    moved = run("--store", mine, "pull", f"{squatted}#french")
    assert f"french:latest came from {real}; this one comes from {squatted}" in moved.err
    assert f"french:latest moved from sha256:{digest.short}" in moved.err
    asked = run("--store", mine, "pull", f"{squatted}#{digest}", "--as", "french")
    assert (asked.code, str(digest) in asked.err) == (3, True)
