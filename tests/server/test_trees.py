"""A tree goes to a hub as one commit and comes back the same, whole or one path; what is false there is refused."""

import json
import urllib.request
from dataclasses import replace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

import loraforge as lf
from loraforge_registry.digest import Digest
from loraforge_registry.hub_record import decode_record, encode_record
from loraforge_registry.hub_tree_record import TreeOnHub, decode_tree_record, encode_tree_record
from loraforge_registry.manifest import Artifact, Derivation, Input, encode_manifest
from loraforge_registry.names import RefName
from loraforge_registry.remotes import open_remote
from loraforge_registry.store import Store
from loraforge_registry.trees import TreeRecord, encode_tree
from tests.bad_files import tensors, write_adapter
from tests.hub import Server
from tests.unit.registry.test_trees import atop, put

BASE = Digest.of(b"a base")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("trees") / "served") as server:
        yield server, server.add_user("me")


@pytest.fixture
def hub(served, monkeypatch):
    server, token = served
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which peers' tests set
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", token)
    return HfApi(endpoint=server.url, token=token)


@pytest.fixture
def repo(hub, request):
    """A name that no other test has."""
    return f"me/r{request.session.items.index(request.node)}"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with the tree t: french, french/law, german."""
    store = Store(tmp_path / "here")
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "here"))
    with store.session():
        french = put(store, tmp_path, 0.5)
        nodes = {
            "french": french.digest,
            "french/law": put(store, tmp_path, 0.25, french).digest,
            "german": put(store, tmp_path, 0.125).digest,
        }
        store.put_tree(TreeRecord(BASE, "/models/base", nodes), RefName("t"), expected=None, what="tree grow")
    return store


def other(tmp_path):
    return ("--store", tmp_path / "other", "--json")


def test_there_and_back_in_one_commit_and_nothing_twice(hub, repo, store, run, tmp_path):
    sent = run("--json", "push", "t", "--to", f"hf://{repo}").json
    assert sent["sent"] > 0
    assert any("/models/base" in text for text in sent["notes"])
    assert len(hub.list_repo_commits(repo)) == 2, "the first is that of a new repository"
    assert run("--json", "push", "t", "--to", f"hf://{repo}").json["sent"] == 0
    assert len(hub.list_repo_commits(repo)) == 2
    pulled = run(*other(tmp_path), "pull", f"hf://{repo}", "--as", "mine").json
    assert (pulled["digest"], pulled["name"]) == (str(store.resolve("t")), "mine")
    assert {path: node["digest"] for path, node in pulled["nodes"].items()} == {
        path: str(digest) for path, digest in store.tree(store.resolve("t")).nodes.items()
    }
    again = run(*other(tmp_path), "pull", f"hf://{repo}", "--as", "mine").json
    assert (again["received"], again["skipped"] > 0) == (0, True)
    assert run("--store", tmp_path / "other", "fsck", "--deep").code == 0


def test_what_is_pushed_is_a_tree_of_the_servers_store(served, repo, hub, store, run):
    on_that_machine, name = ("--store", served[0].store, "--json"), repo.replace("/", "--")
    for nodes in (3, 2):
        assert run("push", "t", "--to", f"hf://{repo}").code == 0
        for _ in range(2):
            listed = {line["tag"]: line["digest"] for line in run(*on_that_machine, "ls", name).json}
            assert listed == dict.fromkeys(("latest", "main"), str(store.resolve("t")))
            hub.upload_file(path_or_fileobj=b"more", path_in_repo=f"notes-{nodes}.txt", repo_id=repo)
        assert len(run(*on_that_machine, "tree", "show", name).json["nodes"]) == nodes
        run("tree", "prune", "t", "german")
    assert run("--store", served[0].store, "gc", "--yes").code == 0
    assert run("--store", served[0].store, "fsck", "--deep").code == 0


def test_a_tag_means_one_tree(hub, repo, store, run, tmp_path):
    assert run("push", "t", "t:v1").code == 0
    assert run("push", "t:v1", "--to", f"hf://{repo}").code == 0
    assert run("--json", "push", "t:v1", "--to", f"hf://{repo}").json["sent"] == 0
    tree = store.tree(store.resolve("t"))
    less = replace(tree, nodes={"german": tree.nodes["german"]})
    store.put_tree(less, RefName("u", "v1"), expected=None, what="test")
    taken = run("push", "u:v1", "--to", f"hf://{repo}")
    assert (taken.code, "the tag v1 in" in taken.err) == (4, True)
    pulled = run(*other(tmp_path), "pull", f"hf://{repo}@v1", "--as", "x").json
    assert pulled["digest"] == str(store.resolve("t:v1"))
    assert run("push", "u:v1", "--to", f"hf://{repo}", "--force").code == 0
    assert run(*other(tmp_path), "pull", f"hf://{repo}@v1", "--as", "y").json["digest"] == str(store.resolve("u:v1"))


def test_one_path_and_then_another_join(hub, repo, store, run, tmp_path):
    run("push", "t", "--to", f"hf://{repo}")
    here = ("--store", tmp_path / "other", "--json")
    for url in (f"hf://{repo}", f"{(tmp_path / 'here').as_uri()}#t"):
        name = "hub" if url.startswith("hf") else "disk"
        one = run(*here, "pull", url, "--as", name, "--node", "french/law", "--to", tmp_path / name).json
        assert set(one["nodes"]) == {"french", "french/law"}
        found = {str(path.parent.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*.safetensors")}
        assert found == {"french", "french/law"}
        both = run(*here, "pull", url, "--as", name, "--node", "german").json
        assert both["digest"] == str(store.resolve("t"))
    refused = run("pull", f"hf://{repo}", "--as", "x", "--node", "frensh")
    assert (refused.code, "did you mean 'french'" in refused.err) == (3, True)


def test_the_same_from_python(hub, repo, store, tmp_path):
    there = lf.Registry(store.path)
    with open_remote(f"hf://{repo}") as remote:
        remote.publish(store, store.resolve("t"), None, force=False)
    here = lf.Registry(tmp_path / "other")
    assert set(store_nodes(here, here.pull(f"hf://{repo}", name="t", node="german"))) == {"german"}
    assert here.pull(f"hf://{repo}", tmp_path / "out", name="t") == there.store.resolve("t")
    assert (tmp_path / "out" / "french" / "law" / "adapter_config.json").exists()


def store_nodes(registry, digest):
    return registry.store.tree(digest).nodes


def test_a_node_that_went_goes_and_what_others_wrote_stays(hub, repo, store, run, tmp_path):
    run("push", "t", "--to", f"hf://{repo}")
    hub.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=repo)
    assert run("tree", "prune", "t", "french", "--recursive").code == 0
    done = run("push", "t", "--to", f"hf://{repo}")
    assert (done.code, "notes.txt" in done.err) == (0, True)
    files = set(hub.list_repo_files(repo))
    assert not [name for name in files if name.startswith("french")]
    assert {"notes.txt", "README.md", "loraforge.json", "german/adapter_model.safetensors"} <= files
    pulled = run(*other(tmp_path), "pull", f"hf://{repo}", "--as", "t").json
    assert set(pulled["nodes"]) == {"german"}


def test_what_was_grown_here_is_not_lost_to_a_pull(hub, repo, store, run, tmp_path):
    run("push", "t", "--to", f"hf://{repo}")
    here = ("--store", tmp_path / "other")
    run(*here, "pull", f"hf://{repo}", "--as", "t")
    run("tree", "move", "t", "german", "deutsch")
    run("push", "t", "--to", f"hf://{repo}")
    assert run(*here, "pull", f"hf://{repo}", "--as", "t").code == 0, "nothing was done here since the last pull"
    run(*here, "tree", "move", "t", "deutsch", "allemand")
    lost = run(*here, "pull", f"hf://{repo}", "--as", "t")
    assert (lost.code, "it was changed here" in lost.err) == (4, True)
    assert run(*here, "pull", f"hf://{repo}", "--as", "t", "--force").code == 0


def test_lineage_comes_from_earlier_trees_of_the_repository(hub, repo, store, run, tmp_path):
    """``move --keep-delta`` makes a node from the old one, which the tag before still has."""
    run("push", "t", "t:v1")
    run("push", "t:v1", "--to", f"hf://{repo}")
    assert run("tree", "move", "t", "german", "french/german", "--keep-delta").code == 0
    assert run("push", "t", "--to", f"hf://{repo}").code == 0
    without = run(*other(tmp_path), "pull", f"hf://{repo}", "--as", "t").json
    assert len(without["missing"]) == 1
    whole = run(*other(tmp_path), "pull", f"hf://{repo}", "--as", "t", "--with-lineage").json
    assert whole["missing"] == []


def test_other_things_are_in_the_way(hub, repo, store, run, tmp_path):
    write_adapter(tmp_path / "a")
    run("push", tmp_path / "a", "a:v1")
    run("push", "a:v1", "--to", f"hf://{repo}")
    refused = run("push", "t", "--to", f"hf://{repo}")
    assert (refused.code, "no tree; name another repository" in refused.err) == (4, True)
    node = run("pull", f"hf://{repo}", "--node", "x", "--as", "x")
    assert (node.code, "is an adapter" in node.err) == (2, True)
    assert run("push", "t", "--to", f"hf://{repo}", "--force").code == 0
    assert "adapter_config.json" not in hub.list_repo_files(repo)
    assert run(*other(tmp_path), "pull", f"hf://{repo}", "--as", "t").json["digest"] == str(store.resolve("t"))
    taken = run("push", "a:v1", "--to", f"hf://{repo}@main")
    assert (taken.code, taken.err.count("\n")) == (4, 1)
    assert run("tree", "move", "t", "german", "loraforge.json").code == 0
    named = run("push", "t", "--to", f"hf://{repo}")
    assert (named.code, "rename the node first" in named.err) == (4, True)


# --- what a stranger may have put there ---------------------------------------------------------------------------


def there(hub, repo, name):
    with urllib.request.urlopen(f"{hub.endpoint}/{repo}/resolve/main/{name}") as answer:  # noqa: S310 - our own
        return answer.read()


def lied(change):
    """A change of the root's record, with a digest that fits."""

    def act(hub, repo, _store):
        found = decode_tree_record(there(hub, repo, "loraforge.json"))
        tree = replace(found.tree, nodes=change(dict(found.tree.nodes)))
        return {"loraforge.json": encode_tree_record(TreeOnHub(Digest.of(encode_tree(tree)), tree, found.git))}

    return act


def edited(name, change):
    def act(hub, repo, _store):
        return {name: change(there(hub, repo, name))}

    return act


def false_node(hub, repo, store):
    """A node's record that is whole in itself, of files that are there, and says another content."""
    record = decode_record(there(hub, repo, "german/loraforge.json"))
    manifest = replace(record.manifest, content_id=Digest.of(b"else"))
    digest = Digest.of(encode_manifest(manifest))
    files = {"german/loraforge.json": encode_record(replace(record, digest=digest, manifest=manifest))}
    return files | lied(lambda nodes: {**nodes, "german": digest})(hub, repo, store)


FALSE = {
    "a record that is no JSON": (edited("loraforge.json", lambda d: d[:-2]), "not JSON"),
    "a record with another digest": (
        edited("loraforge.json", lambda d: d.replace(b'"/models/base"', b'"/models/bass"')),
        "it names the tree",
    ),
    "a record of a newer kind": (edited("loraforge.json", lambda d: d.replace(b"tree/1", b"tree/2")), "upgrade"),
    "a key too many": (edited("loraforge.json", lambda d: d.replace(b'"git"', b'"x": 1,\n "git"')), "an object of"),
    "a node without its parent": (
        edited("loraforge.json", lambda d: d.replace(b'"french":', b'"frensh":')),
        "has no parent 'french'",
    ),
    "a path that climbs": (
        edited("loraforge.json", lambda d: d.replace(b'"german":', b'"../german":')),
        "is no path of a node",
    ),
    "a node in another place": (
        lied(lambda n: {**n, "german": n["french/law"]}),
        "holds the adapter",
    ),
    "a node that is not there": (lied(lambda n: {**n, "spanish": Digest.of(b"x")}), "no loraforge.json"),
    "a config that was edited": (
        edited("german/adapter_config.json", lambda d: d.replace(b'"lora_alpha": 4', b'"lora_alpha": 8')),
        "changed, or went",
    ),
    "weights that were replaced": (
        lambda *_: {"german/adapter_model.safetensors": b"\0" * 100},
        "header",
    ),
    "a false node": (false_node, "its files make the artifact"),
    "a node's record of another": (
        lambda hub, repo, _: {"german/loraforge.json": there(hub, repo, "french/loraforge.json")},
        "changed, or went",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FALSE)
def test_what_is_false_is_refused_and_has_no_name(name, served, hub, repo, store, run, tmp_path):
    run("push", "t", "--to", f"hf://{repo}")
    change, said = FALSE[name]
    for path, data in change(hub, repo, store).items():
        try:
            hub.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=repo)
        except HfHubHTTPError as error:  # our own server refuses some of it itself
            assert "header" in said
            assert said in str(error)  # noqa: PT017
            return
    ran = run(*other(tmp_path), "pull", f"hf://{repo}", "--as", "t")
    assert ran.code == 2, ran.out
    message = json.loads(ran.out)["error"]["message"]
    assert said in message
    assert Store(tmp_path / "other").lookup(RefName("t")) is None
    assert run("--store", served[0].store, "ls", repo.replace("/", "--")).code == 3, "the server's store has no tree"


def test_a_node_atop_another_than_its_path_says_is_refused_before_any_weights(served, hub, repo, store, run, tmp_path):
    """Pushed by hand: a record that no store of ours would make."""
    german, law = (store.tree(store.resolve("t")).nodes[path] for path in ("german", "french/law"))
    run("push", "t", "--to", f"hf://{repo}")
    tree = TreeRecord(BASE, "/models/base", {"german": german, "german/law": law})
    files = {"loraforge.json": encode_tree_record(TreeOnHub(Digest.of(encode_tree(tree)), tree))}
    for file in ("adapter_config.json", "adapter_model.safetensors", "loraforge.json"):
        files[f"german/law/{file}"] = there(hub, repo, f"french/law/{file}")
    for path, data in files.items():
        hub.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=repo)
    ran = run(*other(tmp_path), "pull", f"hf://{repo}", "--as", "t")
    assert (ran.code, "its place is atop" in ran.json["error"]["message"]) == (2, True)
    assert not list((tmp_path / "other" / "blobs").rglob("?" * 64))
    assert run("--store", served[0].store, "ls", repo.replace("/", "--")).code == 3


def test_a_grafted_adapter_keeps_its_own_card(hub, repo, store, run, tmp_path):
    source = write_adapter(tmp_path / "theirs", weights=tensors(3.0))
    (source / "README.md").write_text("# Theirs\n")
    run("push", source, "theirs:v1")
    digest = store.resolve("theirs:v1")
    theirs = Artifact(digest, store.manifest(digest).content_id)
    again = store.put_again(digest, Derivation("graft", 1, (Input(theirs),), dict(atop(None).parameters)))
    old = store.resolve("t")
    tree = store.tree(old)
    store.put_tree(
        replace(tree, nodes={**tree.nodes, "theirs": again.digest}), RefName("t"), expected=old, what="tree graft"
    )
    run("push", "t", "--to", f"hf://{repo}")
    assert "theirs/README.md" in hub.list_repo_files(repo)
    pulled = run(*other(tmp_path), "pull", f"hf://{repo}", "--as", "t").json
    assert pulled["digest"] == str(store.resolve("t"))
