"""Where an adapter came from and where it went, drawn: links both ways, and nothing that whoever looks may not see."""

import json
import re
import urllib.error
import urllib.request
from base64 import b64encode

import pytest

from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Artifact, Derivation, Input
from loraforge_registry.names import RefName
from loraforge_registry.server import lineage_figure
from loraforge_registry.server.relations import Place, Relations
from loraforge_registry.store import Store
from tests.bad_files import config, tensors, write_adapter
from tests.hub import Server
from tests.server import raw
from tests.server.test_pages import EVIL, see


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("lineage") / "store") as server:
        yield server


@pytest.fixture
def server(served, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which peers' tests set
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    return served


def drawing(server, path, token=None):
    basic = b64encode(f"me:{token}".encode()).decode()
    headers = {"Authorization": f"Basic {basic}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers), timeout=30) as answer:  # noqa: S310 - our own server
        html = answer.read().decode()
    found = re.search("<svg class=lineage.*?</svg>", html, re.DOTALL)
    return (see(found[0]) if found else None), html


def sources(run, tmp_path, store=()):
    for name, value in (("french", 0.5), ("law", -0.25)):
        source = write_adapter(tmp_path / name, weights=tensors(value), settings=config())
        assert run(*store, "push", source, f"{name}:v1").code == 0
    assert run(*store, "compose", "french:v1=0.7", "law:v1=0.3", "--rank", "1", "--as", "blend:v1").code == 0
    assert run(*store, "rerank", "blend:v1", "--rank", "1", "--as", "small:v1").code == 0


def test_what_it_was_made_from_and_what_was_made_from_it(server, run, tmp_path):
    sources(run, tmp_path, ("--store", server.store))
    found, _ = drawing(server, "/blend")
    assert found.links == ["/french", "/law", "/small"]
    for words in ("0.7", "linear", "rerank · rank 1", "blend"):
        assert words in found.text
    far, _ = drawing(server, "/small")
    assert far.links == ["/french", "/law", "/blend"], "through what was never stored, and what was"
    back, _ = drawing(server, "/french")
    assert back.links == ["/blend"]
    for link in {*found.links, *far.links, *back.links}:
        assert drawing(server, link)[1]


def test_what_is_pushed_over_the_wire_keeps_its_lineage(server, run, tmp_path, monkeypatch):
    token = server.add_user("wire")
    monkeypatch.setenv("HF_TOKEN", token)
    sources(run, tmp_path)
    sources(run, tmp_path, ("--store", server.store))
    for name in ("french", "law", "blend"):
        sent = run("--json", "push", f"{name}:v1", "--to", f"hf://wire/{name}").json
        there = run("--store", server.store, "--json", "show", f"wire--{name}:v1").json
        assert there["digest"] == sent["digest"]
    assert there["derivation"] == run("--json", "show", "blend:v1").json["derivation"]
    assert drawing(server, "/wire/blend")[0].links == ["/wire/french", "/wire/law", "/small"], "near ones"
    assert run("--store", server.store, "fsck", "--deep").code == 0


def test_an_adapter_keeps_its_readme_and_its_digest_below_the_card(server, run, tmp_path, monkeypatch):
    token = server.add_user("writer")
    monkeypatch.setenv("HF_TOKEN", token)
    source = write_adapter(
        tmp_path / "told", weights=tensors(0.5), settings=config(base_model_name_or_path="acme/base")
    )
    (source / "README.md").write_text("# Told\n\nWhat it is for.\n")
    assert run("push", source, "told:v1").code == 0
    sent = run("--json", "push", "told:v1", "--to", "hf://writer/told").json
    assert run("--store", server.store, "--json", "show", "writer--told:v1").json["digest"] == sent["digest"]
    assert run("--store", server.store, "pull", "writer--told:v1", "--to", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "README.md").read_text() == "# Told\n\nWhat it is for.\n"

    with urllib.request.urlopen(f"{server.url}/writer/told/resolve/main/README.md") as answer:  # noqa: S310 - ours
        card = answer.read()
    assert card.startswith(b"---")
    for edited in (b"<!-- edited -->\n" + card, card + b"More.\n"):
        assert raw.commit(server, "writer/told", token, ("README.md", edited)).status == 200
        there = run("--store", server.store, "--json", "show", "writer--told:latest").json
        assert there["digest"] != sent["digest"]
        assert there["content_id"] == sent["content_id"]
    assert run("--store", server.store, "fsck", "--deep").code == 0


def test_a_record_of_other_files_is_no_lineage(server, run, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    token = server.add_user("other")
    monkeypatch.setenv("HF_TOKEN", token)
    sources(run, tmp_path)
    run("push", "blend:v1", "--to", "hf://other/blend")
    settings = json.dumps(config(lora_alpha=16, r=1)).encode()
    HfApi(endpoint=server.url, token=token).upload_file(
        path_or_fileobj=settings, path_in_repo="adapter_config.json", repo_id="other/blend"
    )
    assert drawing(server, "/other/blend")[0] is None
    assert run("--store", server.store, "--json", "show", "other--blend").json["derivation"] is None


def test_what_is_private_is_nowhere_in_the_drawings_of_others(server, run, tmp_path, monkeypatch):
    """A private adapter in the middle: made from a public one, and a public one made from it."""
    token = server.add_user("bob")
    monkeypatch.setenv("HF_TOKEN", token)
    for name, value in (("deep", 0.375), ("open", 0.75)):
        run("push", write_adapter(tmp_path / name, weights=tensors(value)), f"{name}:v1")
    run("compose", "open:v1=0.5", "deep:v1=2", "--as", "hidden:v1")
    run("rerank", "hidden:v1", "--rank", "1", "--as", "out:v1")
    for name, private in (("deep", True), ("open", False), ("hidden", True), ("out", False)):
        body = {"name": name, "organization": None, "private": private}
        assert raw.post(server, "/api/repos/create", body, token=token).status == 200
        assert run("push", f"{name}:v1", "--to", f"hf://bob/{name}").code == 0
    mine, _ = drawing(server, "/bob/out", token)
    assert mine.links == ["/bob/open", "/bob/deep", "/bob/hidden"]
    assert drawing(server, "/bob/open", token)[0].links == ["/bob/hidden"]
    assert drawing(server, "/bob/open")[0] is None
    theirs, html = drawing(server, "/bob/out")
    assert theirs.links == []
    for name in ("bob/deep", "bob/hidden", "bob/open"):
        assert name not in html
    hidden = Store(tmp_path / "default-store").resolve("hidden:v1")
    assert hidden.short in theirs.text, "what the public adapter's own record says"
    with pytest.raises(urllib.error.HTTPError) as refused:
        drawing(server, "/bob/hidden")
    refused.value.close()


def test_long_wide_and_hostile_lineages_stay_small_drawings(server, run, tmp_path):
    store = Store(server.store)
    run("--store", server.store, "push", write_adapter(tmp_path / "root", weights=tensors(0.0625)), "root:v1")
    digest = store.resolve("root:v1")
    last = Artifact(digest, store.manifest(digest).content_id)
    first = last
    for number in range(60):
        last = store.put_again(digest, Derivation("train", 1, (Input(last),), {"steps": number, "rank": EVIL}))
        store.tag(last.digest, RefName(f"step-{number}"))
    found, html = drawing(server, "/step-59")
    assert 10 < len(found.links) <= lineage_figure.MAX_DEPTH
    assert "further back" in found.text
    assert "img" not in see(html).tags
    unseen = [Input(Artifact(Digest.of(bytes([n])), Digest.of(bytes([n]))), 1e-300 * n) for n in range(200)]
    nested = Derivation("x" * 5000 + EVIL, 1, (Input(first), *unseen))
    for _ in range(8):
        nested = Derivation("again", 1, (Input(first), Input(nested), Input(first)))
    wide = store.put_again(digest, nested)
    store.tag(wide.digest, RefName("wide"))
    for number in range(30):
        store.tag(
            store.put_again(digest, Derivation(f"m{number}", 1, (Input(wide),))).digest, RefName(f"made-{number}")
        )
    found, html = drawing(server, "/wide")
    assert "and 18 more" in found.text
    svg = re.search("<svg class=lineage.*?</svg>", html, re.DOTALL)[0]
    assert len(svg) < 60_000
    xs = [float(x) for x in re.findall(r" x=([\d.]+)", svg)]
    assert max(xs) < 160, "there is room for words on a telephone"
    assert "/wide" in drawing(server, "/root")[0].links


def test_the_name_of_a_tag_and_a_label_are_text(run, tmp_path):
    run("push", write_adapter(tmp_path / "a"), "a:v1")
    store = Store(tmp_path / "default-store")
    manifest = store.manifest(store.resolve("a:v1"))
    place = Place("me/a b", "v<1>/x", (), lambda: manifest)
    assert (place.label, place.path) == ("me/a b @ v<1>/x", "/me/a%20b/tree/v%3C1%3E%2Fx")
    assert lineage_figure.figure("a", None, Relations({}), []) == ""
    drawn = lineage_figure.figure(EVIL, Derivation("x", 1, (Input(Digest.of(b"x"), 2.0),)), Relations({}), [place])
    assert "<img" not in drawn
    assert see(drawn).links == [place.path]
