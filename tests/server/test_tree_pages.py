"""Trees on the pages: recognised wherever they live, drawn, listed, linked; what is false or private there."""

import ast
import json
import re
import time
import urllib.error
import urllib.request
from base64 import b64encode
from dataclasses import replace
from html import unescape
from urllib.parse import quote

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from loraforge_registry.digest import Digest
from loraforge_registry.hub_tree_record import TreeOnHub, encode_tree_record
from loraforge_registry.ingest import open_adapter
from loraforge_registry.manifest import Artifact, Derivation, Input
from loraforge_registry.names import RefName
from loraforge_registry.server import around, forest, nodes, repos, tree_page
from loraforge_registry.server.around import Around
from loraforge_registry.server.hub import Settings
from loraforge_registry.server.local import LocalBlobs, LocalRefs
from loraforge_registry.server.recent import Recent
from loraforge_registry.server.run import open_hub
from loraforge_registry.store import Store
from loraforge_registry.tree_facts import members_of
from loraforge_registry.tree_figure import Card, figure, fitting, more, shown_first
from loraforge_registry.trees import TreeRecord, encode_tree
from tests.bad_files import config, pair, tensors, write_adapter
from tests.hub import Server
from tests.server import raw
from tests.server.test_pages import EVIL, see
from tests.server.test_trees import FALSE

BASE = Digest.of(b"a base")
PATHS = ("french", "french/law", "french/law/torts", "german")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("tree-pages") / "served") as server:
        server.token, server.other = server.add_user("me"), server.add_user("you")
        yield server


@pytest.fixture
def server(served, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which peers' tests set
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("HF_TOKEN", served.token)
    return served


@pytest.fixture
def name(request):
    """A name that no other test has."""
    return f"t{request.session.items.index(request.node)}"


def put(store, folder, value, parent=None, operation="train", *, rank=2, report=None):
    inputs = () if parent is None else (Input(parent),)
    said = {} if parent is None else {"parent": str(parent.content_id)}
    weights = pair("model.layers.0.q", value=value, rank=rank) | pair("model.layers.0.v", value=value, rank=rank)
    where = write_adapter(folder / f"{value}-{rank}", weights=weights, settings=config(r=rank))
    with open_adapter(where) as incoming:
        return store.put(incoming, derivation=Derivation(operation, 1, inputs, said), report=report)


def plant(store, folder, ref, paths=PATHS, *, base="acme/base", first=0.5, operation="train"):
    """Put a tree with these nodes into a store, and return their artifacts."""
    made = {}
    with store.session():
        for number, path in enumerate(paths):
            above, value = made.get(path.rpartition("/")[0]), first + number / 8
            loss = {"loss": 1.5 + number}
            made[path] = put(store, folder, value, above, operation, rank=2 + number, report=loss)
        record = TreeRecord(BASE, base, {path: artifact.digest for path, artifact in made.items()})
        store.put_tree(record, RefName.parse(ref), expected=None, what="tree grow")
    return made


def get(server, path, token=None):
    """The page as somebody's browser gets it: its status, and what is in it."""
    basic = b64encode(f"me:{token}".encode()).decode()
    headers = {"Accept": "text/html"} | ({"Authorization": f"Basic {basic}"} if token else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers), timeout=30) as answer:  # noqa: S310 - our own server
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def seen(server, path, token=None):
    status, html = get(server, path, token)
    assert status == 200, html
    found = see(html)
    assert not found.handlers
    assert found.tags.count("script") == 1
    assert "style" not in found.tags
    return found


def local_tree(server, tmp_path, name, **options):
    return plant(Store(server.store), tmp_path, f"me--{name}", **options)


def pushed_tree(server, tmp_path, run, name, **options):
    made = plant(Store(tmp_path / "default-store"), tmp_path, "t", **options)
    assert run("push", "t", "--to", f"hf://me/{name}").code == 0
    return made


@pytest.mark.parametrize("kind", [local_tree, pushed_tree])
def test_a_tree_has_a_page_and_each_node_has_one(kind, server, tmp_path, run, name):
    made = kind(server, tmp_path, name=name) if kind is local_tree else kind(server, tmp_path, run, name)
    page = seen(server, f"/me/{name}")
    for path, artifact in made.items():
        assert f"/me/{name}/tree/main/{path}" in page.links
        assert artifact.digest.short in page.text
    for words in ("a tree of 4 nodes", "acme/base", "the base · 4 nodes", "rank 3 · loss 2.5", "280 parameters"):
        assert words in page.text, words
    assert "would refuse it" not in page.text
    assert page.tags.count("path") == 4
    node = seen(server, f"/me/{name}/tree/main/french/law")
    for words in ("atop french", "rank 3", "2 targets", "model.layers.*.q", "loss 2.5", "of all 2 folders"):
        assert words in node.text, words
    assert {f"/me/{name}/tree/main/{path}" for path in ("french", "french/law/torts")} <= set(node.links)
    assert f"/me/{name}/tree/main/german" not in node.links, "its own path, and what grew on it"
    (config,) = [link for link in node.links if link.endswith("law/adapter_config.json")]
    assert json.loads(get(server, config)[1])["r"] == 3
    assert get(server, f"/me/{name}/tree/main/french/no")[0] == 404
    assert get(server, f"/me/{name}/tree/main/french/law/adapter_config.json")[0] == 404


@pytest.mark.parametrize("kind", [local_tree, pushed_tree])
def test_the_hubs_clients_list_it_like_any_repository_and_ours_pulls_it(kind, server, tmp_path, run, name):
    base = f"acme/{name}"
    if kind is local_tree:
        kind(server, tmp_path, name=name, base=base)
        digest = str(Store(server.store).resolve(f"me--{name}"))
    else:
        kind(server, tmp_path, run, name, base=base)
        digest = str(Store(tmp_path / "default-store").resolve("t"))
    api = HfApi(server.url, token=False)
    assert [model.id for model in api.list_models(filter=f"base_model:adapter:{base}")] == [f"me/{name}"]
    (model,) = api.list_models(search=name, author="me", filter="lora")
    assert {"library_name": "peft"}.items() <= vars(model).items()
    assert "peft" in model.tags
    assert {f"{path}/adapter_model.safetensors" for path in PATHS} <= set(api.list_repo_files(f"me/{name}"))
    assert api.model_info(f"me/{name}", files_metadata=True).siblings
    found = run("--store", tmp_path / "other", "--json", "pull", f"hf://me/{name}", "--as", "x").json
    assert found["digest"] == digest
    part = ("--store", tmp_path / "part", "--json")
    one = run(*part, "pull", f"hf://me/{name}", "--as", "x", "--node", "french/law").json
    assert set(one["nodes"]) == {"french", "french/law"}
    listed = run("search", name, "--on", "hf://").out
    assert f"me/{name}" in listed


def test_the_front_page_lists_trees_and_adapters_and_either_alone(server, tmp_path, run, name):
    base = f"acme/{name}"
    local_tree(server, tmp_path, name=name, base=base)
    settings = config(base_model_name_or_path=base)
    source = write_adapter(tmp_path / "plain", weights=tensors(9.0), settings=settings)
    assert run("--store", server.store, "push", source, f"me--plain-{name}:v1").code == 0

    def listed(query):
        found = seen(server, f"/?base={quote(base, safe='')}{query}")
        return [link for link in found.links if link.startswith("/me/")], found

    both, found = listed("")
    assert both == [f"/me/plain-{name}", f"/me/{name}"]
    assert "1 adapter and 1 tree" in found.text
    assert "a tree of 4 nodes" in found.text
    assert listed("&kind=tree")[0] == [f"/me/{name}"]
    assert listed("&kind=adapter")[0] == [f"/me/plain-{name}"]
    assert listed("&kind=nonsense")[0] == both
    assert listed(f"&kind=tree&search={name}&sort=smallest")[0] == [f"/me/{name}"]
    nothing = seen(server, f"/?search=plain-{name}&kind=tree")
    assert "among trees" in nothing.text
    chosen = next(link for link in found.links if "base=" in link)
    assert "kind" not in chosen
    assert any("kind=tree" in link for link in listed("&kind=tree")[1].links), "a base keeps the kind"


def test_an_adapter_and_the_node_that_it_is_are_linked_both_ways(server, tmp_path, name):
    store = Store(server.store)
    made = local_tree(server, tmp_path, name=name, first=20.0)
    store.tag(made["french/law"].digest, RefName(f"own-{name}", "v1"))
    assert f"/own-{name}" in seen(server, f"/me/{name}").links
    assert f"/own-{name}" in seen(server, f"/me/{name}/tree/main/french/law").links
    adapter = seen(server, f"/own-{name}")
    assert "A node of" in adapter.text
    assert f"/me/{name}/tree/main/french/law" in adapter.links
    at = raw.request(server, "GET", f"/-/at/{made['german'].digest.hex}")
    assert (at.status, at.headers["location"]) == (302, f"/me/{name}/tree/main/german")
    whole = raw.request(server, "GET", f"/-/at/{store.resolve(f'me--{name}').hex}")
    assert whole.headers["location"] == f"/me/{name}"
    flat = store.put_again(made["german"].digest, Derivation("flatten", 1, (Input(made["german"]),)))
    store.tag(flat.digest, RefName(f"flat-{name}", "v1"))
    assert f"/-/at/{made['german'].digest.hex}" in seen(server, f"/flat-{name}").links
    assert f"/flat-{name}" in seen(server, f"/me/{name}/tree/main/german").links


def test_what_is_private_is_said_to_nobody_else(server, tmp_path, run, name):
    """A private tree with a public adapter as a node, and a public tree with a private adapter as one."""
    api = HfApi(server.url, token=server.token)
    for kind in ("hidden", "open"):
        api.create_repo(f"me/{kind}-{name}", private=kind == "hidden")
    made = plant(Store(tmp_path / "default-store"), tmp_path, "t", first=30.0)
    store = Store(tmp_path / "default-store")
    store.tag(made["french"].digest, RefName("french", "v1"))
    store.tag(made["german"].digest, RefName("german", "v1"))
    assert run("push", "t", "--to", f"hf://me/hidden-{name}").code == 0
    api.create_repo(f"me/german-{name}", private=True)
    for what, to in (("french:v1", f"french-{name}"), ("german:v1", f"german-{name}")):
        assert run("push", what, "--to", f"hf://me/{to}").code == 0
    for token, is_seen in ((server.token, True), (None, False), (server.other, False)):
        html = get(server, f"/me/french-{name}", token)[1]
        assert (f"hidden-{name}" in html) is is_seen
        assert (f"hidden-{name}" in get(server, f"/?search={name}", token)[1]) is is_seen
        for path in ("", "/tree/main", "/tree/main/french"):
            assert get(server, f"/me/hidden-{name}{path}", token)[0] == (200 if is_seen else 404)
        assert (get(server, f"/-/at/{made['french/law'].digest.hex}", token)[0] == 200) is is_seen
    assert run("push", "t", "--to", f"hf://me/open-{name}").code == 0
    for token, is_seen in ((server.token, True), (None, False), (server.other, False)):
        for path in ("", "/tree/main/german"):
            html = get(server, f"/me/open-{name}{path}", token)[1]
            assert (f"german-{name}" in html) is is_seen
            assert (f"hidden-{name}" in html) is False or is_seen
    at = get(server, f"/-/at/{made['french/law'].digest.hex}")
    assert at[0] == 200, "the public one"


def test_every_branch_and_tag_has_its_tree(server, tmp_path, run, name):
    pushed_tree(server, tmp_path, run, name, first=40.0)
    api = HfApi(server.url, token=server.token)
    api.create_tag(f"me/{name}", tag="v1")
    assert run("tree", "prune", "t", "french", "--recursive").code == 0
    assert run("push", "t", "--to", f"hf://me/{name}").code == 0
    assert "a tree of 1 node" in seen(server, f"/me/{name}").text
    old = seen(server, f"/me/{name}/tree/v1")
    assert "a tree of 4 nodes" in old.text
    assert f"/me/{name}/tree/v1/french/law" in old.links
    node = seen(server, f"/me/{name}/tree/v1/french/law")
    assert f"hf://me/{name}@v1" in node.text
    assert 'revision="v1"' in node.text
    assert get(server, f"/me/{name}/tree/main/french/law")[0] == 404


# --- what strangers write -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", FALSE)
def test_what_is_false_is_a_sentence_on_the_page(what, server, tmp_path, run, name):
    store = Store(tmp_path / "default-store")
    made = plant(store, tmp_path, "t", ("french", "french/law", "german"), base="/models/base", first=50.0)
    assert run("push", "t", "--to", f"hf://me/{name}").code == 0
    api = HfApi(server.url, token=server.token)
    change, said = FALSE[what]
    files = change(api, f"me/{name}", store)
    if said == "header":
        return  # the server refuses it at the door
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    api.create_commit(f"me/{name}", operations, commit_message="x")
    page = seen(server, f"/me/{name}")
    of_a_node = ("a node in another place", "a node that is not there", "a false node")
    root = "loraforge.json" in files and what not in of_a_node
    if root:
        assert "This is shown as no tree of adapters: loraforge.json: " in page.text
        assert said in page.text or what == "a record of a newer kind"
        assert f"/me/{name}/tree/main/german" not in page.links
    elif what != "a false node":  # whole in itself: only who hashes all tensors finds out, as a pull does
        assert "a pull would refuse it" in page.text
        assert made["french"].digest.short in page.text
        wrong = "spanish" if what == "a node that is not there" else "german"
        assert "a pull would refuse it" in get(server, f"/me/{name}/tree/main/{wrong}")[1]
        assert "Load it" not in page.text
    for path in ("/", f"/?search={name}", "/?kind=tree"):
        assert seen(server, path)
    assert f"me/{name}" in [model.id for model in api.list_models(search=name)]


def stated(server, name, tree, **files):
    """Push a tree's record by hand, with whatever else."""
    api = HfApi(server.url, token=server.token)
    api.create_repo(f"me/{name}", exist_ok=True)
    record = encode_tree_record(TreeOnHub(Digest.of(encode_tree(tree)), tree))
    operations = [CommitOperationAdd(path, data) for path, data in {"loraforge.json": record, **files}.items()]
    api.create_commit(f"me/{name}", operations, commit_message="x")
    return api


def test_ten_thousand_nodes_are_a_page_of_a_few(server, name):
    wide = {f"n{number:04}": Digest.of(b"%d" % number) for number in range(9_000)}
    deep = {"/".join(["d"] * depth): Digest.of(b"d%d" % depth) for depth in range(1, 17)}
    below = {f"n0000/c{number:03}": Digest.of(b"c%d" % number) for number in range(900)}
    stated(server, name, TreeRecord(BASE, EVIL, {**wide, **deep, **below}))
    begin = time.monotonic()
    status, html = get(server, f"/me/{name}")
    found = see(html)
    assert status == 200
    assert "a tree of 9,916 nodes" in found.text
    assert f"and {9_001 - tree_page.MAX_DRAWN:,} more" in found.text
    assert f"{9_916 - tree_page.MAX_ROWS:,} more nodes are not listed" in found.text
    assert "has no loraforge.json" in found.text
    assert len(html) < 400_000
    assert "img" not in found.tags
    assert found.tags.count("script") == 1
    for path in ("n0000", "/".join(["d"] * 16)):
        status, html = get(server, f"/me/{name}/tree/main/{path}")
        assert (status, len(html) < 200_000) == (200, True)
    assert "and 861 more" in see(get(server, f"/me/{name}/tree/main/n0000")[1]).text
    assert time.monotonic() - begin < 30, "a loose ceiling"
    row = seen(server, f"/?search={name}").text
    assert "a tree of 9,916 nodes" in row


def test_a_record_too_large_to_be_read_says_so(server, name):
    stated(server, name, TreeRecord(BASE, "b" * 5_000_000))
    page = seen(server, f"/me/{name}")
    assert f"what is read of it here is {forest.MAX_STATED:,}" in page.text
    assert f"/me/{name}" in seen(server, f"/?search={name}").links


def test_a_node_atop_itself_and_one_in_two_places_are_not_as_the_tree_says(server, tmp_path, run, name):
    store = Store(tmp_path / "default-store")
    made = plant(store, tmp_path, "t", ("a",), first=60.0)
    assert run("push", "t", "--to", f"hf://me/{name}").code == 0
    digest = made["a"].digest
    there = {}
    for file in ("adapter_config.json", "loraforge.json", "adapter_model.safetensors"):
        with urllib.request.urlopen(f"{server.url}/me/{name}/resolve/main/a/{file}") as answer:  # noqa: S310 - our own
            there[file] = answer.read()
    circle = {"a": digest, "a/a": digest, "a/a/a": digest, "b": digest}
    files = {f"{path}/{file}": data for path in circle for file, data in there.items()}
    stated(server, name, TreeRecord(BASE, "acme/base", circle), **files)
    page = seen(server, f"/me/{name}")
    assert page.text.count("it was made atop the base, its place is atop sha256:") == 2
    assert "a/a/a" in page.text


def test_what_a_strangers_nodes_say_is_text(server, tmp_path, run, name):
    store = Store(tmp_path / "default-store")
    plant(store, tmp_path, "t", base=EVIL, first=70.0, operation=f"{EVIL}{'x' * 300}")
    assert run("push", "t", "--to", f"hf://me/{name}").code == 0
    for path in (f"/me/{name}", f"/me/{name}/tree/main/french/law", f"/?search={name}"):
        html = get(server, path)[1]
        found = see(html)
        assert "img" not in found.tags
        assert found.tags.count("script") == 1
        assert not found.handlers
        assert "\u202e" not in html
        assert EVIL[:20] in found.text
    code = re.search("<pre data-copy>(.*?)</pre>", get(server, f"/me/{name}")[1], re.DOTALL)[1]
    (base,) = [
        line
        for line in ast.parse(unescape(code)).body
        if getattr(line, "targets", None) and line.targets[0].id == "base"
    ]
    assert base.value.args[0].value.startswith(EVIL[:20])
    assert "BASE is the directory of the base" in see(get(server, f"/me/{name}")[1]).text


def test_numbers_that_no_file_has_are_not_believed(server, tmp_path, run, name):
    """A record that states tensors of another shape than those in the file, and is whole in itself."""
    from loraforge_registry.hub_record import Record, decode_record, encode_record
    from loraforge_registry.manifest import encode_manifest

    store = Store(tmp_path / "default-store")
    plant(store, tmp_path, "t", ("a",), first=80.0)
    assert run("push", "t", "--to", f"hf://me/{name}").code == 0
    record = decode_record(get(server, f"/me/{name}/resolve/main/a/loraforge.json")[1].encode())
    first, *rest = record.manifest.tensors
    wide = replace(first, entry=replace(first.entry, shape=(2**40, 3)))
    manifest = replace(record.manifest, tensors=(wide, *rest))
    digest = Digest.of(encode_manifest(manifest))
    tree = TreeRecord(BASE, "acme/base", {"a": digest})
    stated(server, name, tree, **{"a/loraforge.json": encode_record(Record(digest, manifest))})
    page = seen(server, f"/me/{name}")
    assert "states other tensors" in page.text
    assert f"{2**40:,}" not in page.text


# --- in one process -----------------------------------------------------------------------------------------------


def test_a_second_look_reads_no_record_and_no_file(tmp_path, monkeypatch, run):
    store = Store(tmp_path / "store")
    made = plant(store, tmp_path, "here:v1")
    with Server(tmp_path / "store") as server:
        token = server.add_user("me")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", token)
        plant(Store(tmp_path / "default-store"), tmp_path, "t")
        assert run("push", "t", "--to", "hf://me/there").code == 0
    hub, pins = open_hub(tmp_path / "store", Settings())
    first = [(entry.repository.id, entry.facts.nodes) for entry in Around(hub, None).entries()]
    assert first == [("here", 4), ("me/there", 4)]
    found = list(Around(hub, None).trees_with(made["german"].digest))
    monkeypatch.setattr(LocalRefs, "_read", lambda *_: pytest.fail("a record was read again"))
    monkeypatch.setattr(LocalBlobs, "read", lambda *_: pytest.fail("a file was read again"))
    assert [(entry.repository.id, entry.facts.nodes) for entry in Around(hub, None).entries()] == first
    assert [(place.href, path) for place, path in found] == [("/here", "german"), ("/me/there", "german")]
    assert [path for _, path in Around(hub, None).trees_with(made["german"].digest)] == ["german", "german"]
    assert list(Around(hub, None).trees_with(Digest.of(b"nobody"))) == []
    pins.close()


def test_a_local_tree_that_is_damaged_or_too_large_is_still_a_page(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    made = plant(store, tmp_path, "t:v1")
    digest = made["french/law"].digest
    (tmp_path / "store" / "manifests" / "sha256" / digest.hex[:2] / digest.hex).chmod(0o600)
    (tmp_path / "store" / "manifests" / "sha256" / digest.hex[:2] / digest.hex).unlink()
    with Server(tmp_path / "store") as server:
        page = seen(server, "/t")
        assert "french/law: it is not in the store, or it is damaged" in page.text
        assert seen(server, "/t/tree/main/french/law")
        assert "/t" in seen(server, "/").links
        assert len(list(HfApi(server.url, token=False).list_models())) == 1
    monkeypatch.setattr(repos, "MAX_FOLDERS", 3)
    hub, pins = open_hub(tmp_path / "store", Settings())
    (repository,) = repos.everything(hub, None)
    revision = repos.revision_of(hub, repository.record.branches["main"])
    assert not repos._tree_files(hub, revision.digest, forest.tree_at(hub, revision.commit).record)[0]
    pins.close()


def test_what_a_page_reads_has_a_limit(monkeypatch, tmp_path):
    store = Store(tmp_path / "store")
    plant(store, tmp_path, "t:v1")
    hub, pins = open_hub(tmp_path / "store", Settings())
    (repository,) = repos.everything(hub, None)
    commit = repos.revision_of(hub, repository.record.branches["main"]).commit
    tree = forest.tree_at(hub, commit)
    monkeypatch.setattr(nodes, "MAX_READ", 2)
    read = [node.facts is not None for node in nodes.read_nodes(hub, commit, tree, sorted(PATHS))]
    assert read == [True, True, False, False]
    pins.close()


def test_an_answer_reads_only_so_much_of_trees_that_were_not_read_before(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    made = [plant(store, tmp_path, f"t{number}:v1", ("a", "b"), base=f"acme/{number}") for number in range(3)]
    assert len({artifacts["a"].digest for artifacts in made}) == 1
    monkeypatch.setattr(around, "MAX_UNREAD", 4)
    monkeypatch.setattr(forest, "_MEMBERS", Recent(1000))
    hub, pins = open_hub(tmp_path / "store", Settings())
    for expected in (["/t0", "/t1"], ["/t0", "/t1"]):  # which have its name; the third is known, and not asked for it
        assert [place.href for place, _ in Around(hub, None).trees_with(made[0]["a"].digest)] == expected
    monkeypatch.setattr(around, "MAX_UNREAD", 6)
    assert len(list(Around(hub, None).trees_with(made[0]["a"].digest))) == 3
    pins.close()


def test_what_of_a_tree_is_kept_says_what_it_may_hold():
    paths = {f"n{number}": Digest.of(b"%d" % number) for number in range(500)}
    members = members_of(TreeRecord(BASE, "b", paths))
    assert all(members.may_hold(digest) for digest in paths.values())
    assert not any(members.may_hold(Digest.of(b"x%d" % number)) for number in range(500))
    assert not members_of(TreeRecord(BASE, "b", {})).may_hold(BASE)


def test_a_drawing_has_every_card_in_its_place():
    paths = ["a", "a/b", "a/c", "d"]
    for lines in (1, 2, 3):
        drawn = figure(Card("", "base"), [Card(path, path[-1], ("x", "y")) for path in paths], lines=lines, edge=0)
        boxes = [tuple(map(float, box)) for box in re.findall(r't-card" x="([\d.]+)" y="([\d.-]+)"', drawn.body)]
        assert len(boxes) == 4
        assert len({y for x, y in boxes if x == max(x for x, _ in boxes)}) == 2
        assert all(0 <= y < drawn.height and x < drawn.width for x, y in boxes)
    assert figure(Card("", "base"), []).height > 40
    assert 'href="/x?&quot;&lt;"' in figure(Card("", "b", href='/x?"<'), []).body


def test_the_nearest_nodes_are_drawn_and_the_others_counted():
    paths = [f"a{number}" for number in range(5)] + [f"a0/b{number}" for number in range(4)]
    shown, hidden = shown_first(paths, 6)
    assert shown == ["a0", "a0/b0", "a1", "a2", "a3", "a4"]
    assert hidden == {"a0": 3}
    assert shown_first(paths, 3) == (["a0", "a1", "a2"], {"": 2, "a0": 4})
    assert more("a0", 3).path.startswith("a0/")
    assert [fitting([Card(str(n), "x") for n in range(count)]) for count in (8, 9, 17)] == [3, 2, 1]


def test_who_made_it_and_where_is_an_artifact_in_store(tmp_path):
    """The parent and the loss in the facts are those of the whole manifest."""
    store = Store(tmp_path / "store")
    made = plant(store, tmp_path, "t")
    hub, pins = open_hub(tmp_path / "store", Settings())
    for path, artifact in made.items():
        manifest, facts = store.manifest(artifact.digest), repos.facts_of(hub, artifact.digest)
        assert facts.parent == manifest.parent
        assert facts.loss == manifest.report["loss"]
        assert facts.targets == 2
        assert isinstance(artifact, Artifact), path
    pins.close()
