"""The record of a tree, and the walks that follow it: collection, check, repair, bundles."""

from dataclasses import replace

import pytest

from loraforge_registry import collect, objects
from loraforge_registry.canonical import decode, encode
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, FormatError, ManifestError, NotFoundError, StoreError
from loraforge_registry.ingest import open_adapter
from loraforge_registry.manifest import Artifact, Derivation, Input
from loraforge_registry.names import RefName
from loraforge_registry.records import by_need, decode_record
from loraforge_registry.store import Store
from loraforge_registry.trees import TreeRecord, encode_tree
from tests.bad_files import tensors, write_adapter

BASE = Digest.of(b"a base")
TREE = RefName("law-tree")


def atop(parent: Artifact | None) -> Derivation:
    inputs = () if parent is None else (Input(parent),)
    return Derivation("train", 1, inputs, {} if parent is None else {"parent": str(parent.content_id)})


def put(store: Store, folder, value: float, parent: Artifact | None = None) -> Artifact:
    with open_adapter(write_adapter(folder / str(value), weights=tensors(value))) as incoming:
        return store.put(incoming, derivation=atop(parent))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def tree(store, tmp_path) -> TreeRecord:
    """``french`` and ``french/law``, in the store and under no name but that of the tree."""
    with store.session():
        french = put(store, tmp_path, 0.5)
        law = put(store, tmp_path, 0.25, french)
        record = TreeRecord(BASE, "./base", {"french": french.digest, "french/law": law.digest})
        store.put_tree(record, TREE, expected=None, what="tree grow")
    return record


def test_a_tree_has_one_spelling_and_comes_back(store, tree):
    digest = store.resolve("law-tree")
    assert store.tree(digest) == tree
    assert decode_record(encode_tree(tree)) == tree
    assert store.put_tree(tree, TREE, expected=digest, what="again") == digest
    assert [move.what for move in store.reflog("law-tree")] == ["tree grow"]


def test_a_tree_keeps_its_nodes_and_without_a_name_all_go(store, tree):
    assert store.gc(dry_run=True).garbage == ()
    assert store.usage().reclaimable == 0
    store.remove(TREE)
    assert {item.digest for item in store.gc(dry_run=False).garbage} >= {*tree.nodes.values()}


def test_pruned_nodes_come_back_until_a_collection(store, tree):
    old = store.resolve("law-tree")
    pruned = replace(tree, nodes={"french": tree.nodes["french"]})
    store.put_tree(pruned, TREE, expected=old, what="tree prune")
    store.tag(old, RefName("law-tree", "before"))
    assert store.tree(store.resolve("law-tree:before")) == tree
    store.remove(RefName("law-tree", "before"))
    store.gc(dry_run=False)
    assert not store.has(old)
    assert not store.has(tree.nodes["french/law"])
    assert store.has(tree.nodes["french"])


def test_a_tree_goes_before_its_nodes(store, tree, monkeypatch):
    digest = store.resolve("law-tree")
    store.remove(TREE)
    moved = []
    monkeypatch.setattr(type(store._readable()), "move", lambda _self, _directory, name, *_: moved.append(name))
    monkeypatch.setattr(collect, "_remove", lambda *_: None)
    store.gc(dry_run=False)
    assert moved[0] == digest.hex
    assert {moved[1], moved[2]} == {node.hex for node in tree.nodes.values()}


def test_a_ref_moves_only_from_what_was_expected(store, tree):
    other = replace(tree, nodes={})
    with pytest.raises(ConflictError, match="moved meanwhile"):
        store.put_tree(other, TREE, expected=None, what="tree create")
    assert store.tree(store.resolve("law-tree")) == tree


def test_a_node_stands_where_it_was_grown(store, tree):
    for nodes in (
        {"law": tree.nodes["french/law"]},
        {**tree.nodes, "french/french": tree.nodes["french"]},
        {"french": store.resolve("law-tree")},
    ):
        with pytest.raises(ManifestError, match=r"node '.*' (was made atop|is no adapter)"):
            store.put_tree(replace(tree, nodes=nodes), RefName("other"), expected=None, what="graft")
    with pytest.raises(NotFoundError):
        store.put_tree(replace(tree, nodes={"x": BASE}), RefName("other"), expected=None, what="graft")
    assert store.lookup(RefName("other")) is None


@pytest.mark.parametrize(
    "nodes", [{"a/b": BASE}, {"": BASE}, {"A": BASE}, {"a//b": BASE}, {"../a": BASE}, {"adapter_config.json": BASE},
              {"/".join("abcdefghijklmnopq"): BASE}]
)  # fmt: skip
def test_paths_that_are_none_are_refused(nodes):
    with pytest.raises(ManifestError):
        encode_tree(TreeRecord(BASE, "base", nodes))


@pytest.mark.parametrize(
    "change", [{"schema": "loraforge.tree/2"}, {"schema": "loraforge.forest/1"}, {"nodes": []}, {"base": None},
               {"extra": 1}, {"nodes": {"a": b"short"}}]
)  # fmt: skip
def test_records_that_are_no_trees_are_refused(tree, change):
    fields = decode(encode_tree(tree))
    with pytest.raises(ManifestError):
        decode_record(encode({**fields, **change}))


def test_a_check_finds_what_a_tree_needs_and_a_repair_brings_it_back(store, tree, tmp_path):
    bundle = tmp_path / "whole.lf"
    store.export_bundle([store.resolve("law-tree")], {}, bundle)
    other = Store(tmp_path / "other")
    other.import_bundle(bundle)
    node = tree.nodes["french/law"]
    (store.path / objects.shard(objects.MANIFESTS, node) / node.hex).unlink()
    report = store.fsck()
    assert [(p.kind, p.digest) for p in report.problems if p.is_damage] == [("missing_object", node)]
    with pytest.raises(StoreError):
        store.gc(dry_run=False)
    store.repair(report, other.path)
    assert store.fsck(deep=True).holds


def test_a_bundle_has_the_whole_tree_and_names_it(store, tree, tmp_path):
    digest = store.resolve("law-tree")
    store.export_bundle([digest], {TREE: digest}, tmp_path / "tree.lf")
    other = Store(tmp_path / "other")
    assert other.import_bundle(tmp_path / "tree.lf")[1] == {TREE: digest}
    assert other.tree(digest) == tree
    assert other.fsck(deep=True).holds
    other.export_bundle([digest], {TREE: digest}, tmp_path / "again.lf")
    assert (tmp_path / "again.lf").read_bytes() == (tmp_path / "tree.lf").read_bytes()


def test_a_bundle_with_half_a_tree_is_refused(store, tree, tmp_path, monkeypatch):
    digest = store.resolve("law-tree")
    monkeypatch.setattr(TreeRecord, "needs", property(lambda _self: (tree.nodes["french"],)))
    store.export_bundle([digest], {}, tmp_path / "half.lf")
    monkeypatch.undo()
    with pytest.raises(FormatError):
        Store(tmp_path / "other").import_bundle(tmp_path / "half.lf")


def test_a_tree_is_written_out_as_a_directory_for_every_path(store, tree, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):  # the same again is no conflict
        store.export(store.resolve("law-tree"), out)
    with open_adapter(out / "french" / "law") as incoming:
        assert store.put(incoming).content_id == store.manifest(tree.nodes["french/law"]).content_id
    (out / "french" / "law" / "more").write_text("x")
    with pytest.raises(ConflictError):
        store.export(store.resolve("law-tree"), out)


def test_ls_says_what_a_tree_has(store, tree):
    (line,) = store.ls()
    assert line.summary is not None
    assert (line.summary.operation, line.summary.rank, line.summary.base) == ("tree of 2", 2, "./base")


def test_records_are_ordered_by_what_they_need():
    a, b, c = (Digest.of(text) for text in (b"a", b"b", b"c"))
    assert by_need({a: (b,), b: (c,), c: ()}) == [[c], [b], [a]]
    assert by_need({a: (b,)}) == [[a]]
