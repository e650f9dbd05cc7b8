"""Where an artifact is: at heads and tags, in histories, under several names; never where the reader may not look."""

import json
import re

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

import loraforge as lf
from tests.bad_files import config, safetensors_bytes, tensors, write_adapter
from tests.hub import Server
from tests.server import raw
from tests.server.test_pages import see


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("at") / "store") as server:
        server.token = server.add_user("me")
        server.stranger = server.add_user("you")
        yield server


def push(server, repo, value, *, card=None, private=False, branch=None):
    """Commit an adapter as a client does, and return its digests."""
    api = HfApi(server.url, token=server.token)
    api.create_repo(repo, private=private, exist_ok=True)
    if branch is not None:
        api.create_branch(repo, branch=branch, exist_ok=True)
    files = {
        "adapter_config.json": json.dumps(config(base_model_name_or_path="acme/base")).encode(),
        "adapter_model.safetensors": safetensors_bytes(tensors(value)),
        **({} if card is None else {"README.md": card}),
    }
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    commit = api.create_commit(repo, operations, commit_message="push", revision=branch)
    page = raw.request(server, "GET", f"/{repo}/tree/{commit.oid}", token=server.token).body.decode()
    return commit.oid, *re.findall("sha256:([0-9a-f]{64})", page)


def at(server, hexed, token=None):
    return raw.request(server, "GET", f"/-/at/{hexed}", token=token, headers=[("Accept", "text/html")])


def test_what_a_branch_has_left_behind_has_its_page(server):
    first, old, _ = push(server, "me/moves", 0.5)
    second, new, content = push(server, "me/moves", 0.25)
    assert at(server, new).headers["location"] == "/me/moves"
    assert at(server, old).headers["location"] == f"/me/moves/tree/{first}"
    assert at(server, content).headers["location"] == "/me/moves"
    page = raw.request(server, "GET", f"/me/moves/tree/{first}").body.decode()
    assert f"sha256:{old}" in page
    assert f"sha256:{new}" not in page
    assert f"@{first}" in page  # and loading loads this one

    api = HfApi(server.url, token=server.token)
    api.create_tag("me/moves", tag="v1", revision=first)
    assert at(server, old).headers["location"] == "/me/moves/tree/v1"
    api.delete_tag("me/moves", tag="v1")
    _, on_branch, _ = push(server, "me/moves", 0.125, branch="feat/x")
    assert at(server, on_branch).headers["location"] == "/me/moves/tree/feat%2Fx"
    assert raw.request(server, "GET", "/me/moves/tree/feat%2Fx").status == 200
    api.delete_branch("me/moves", branch="feat/x")
    assert at(server, on_branch).status == 404
    assert second != first


def test_equal_content_under_other_names_is_listed(server):
    _, plain, content = push(server, "me/one", 2.0)
    _, carded, same = push(server, "me/two", 2.0, card=b"# Another card")
    _, other, _ = push(server, "me/three", 3.0)
    assert content == same
    assert len({plain, carded, other}) == 3
    found = at(server, content)
    assert found.status == 200
    seen = see(found.body.decode())
    assert [link for link in seen.links if link.startswith("/me/")] == ["/me/one", "/me/two"]
    assert plain[:12] in seen.text
    assert carded[:12] in seen.text
    for repo in ("me/one", "me/two"):
        assert f"/-/at/{content}" in see(raw.request(server, "GET", f"/{repo}").body.decode()).links
    assert not [link for link in see(raw.request(server, "GET", "/me/three").body.decode()).links if "/-/at/" in link]
    push(server, "me/twin", 2.0)
    assert [link for link in see(at(server, plain).body.decode()).links if link.startswith("/me/")] == [
        "/me/one",
        "/me/twin",
    ]


def test_what_is_private_is_as_what_is_not_there(server):
    _, hidden, content = push(server, "me/secret", 7.0, private=True)
    _, mine, _ = push(server, "me/secret", 8.0, private=True)
    answers = []
    for hexed in (hidden, content, mine, "0" * 64, "f" * 64):
        for token in (None, server.stranger):
            found = at(server, hexed, token)
            assert found.status == 404
            body = found.body.decode().replace(hexed, "X")
            answers.append((token, {**found.headers, "x-request-id": "", "date": ""}, body))
    for token in (None, server.stranger):
        mine_only = [(headers, body) for asked, headers, body in answers if asked == token]
        assert all(len(body) == len(mine_only[0][1]) for _, body in mine_only)
        assert all(one == mine_only[0] for one in mine_only)
    assert at(server, hidden, server.token).status == 302
    assert at(server, content, server.token).status == 302


def test_a_private_twin_is_not_counted(server):
    _, public, content = push(server, "me/shown", 9.0)
    push(server, "me/hidden", 9.0, private=True)
    assert at(server, public).headers["location"] == "/me/shown"
    assert at(server, content).headers["location"] == "/me/shown"
    for token, listed in ((None, False), (server.stranger, False), (server.token, True)):
        page = raw.request(server, "GET", "/me/shown", token=token).body.decode()
        assert ("/-/at/" in page) == listed
        assert "hidden" not in page


def test_lineage_leads_to_what_no_name_means_any_more(server, tmp_path):
    registry = lf.Registry(server.store)
    settings = config(base_model_name_or_path="acme/base")
    kept = registry.push(write_adapter(tmp_path / "a", weights=tensors(0.75), settings=settings), "a:v1")
    stranger = lf.load(write_adapter(tmp_path / "b", weights=tensors(1.5), settings=settings))
    made = lf.rerank(lf.linear([(lf.load("a:v1", registry=registry), 0.5), (stranger, 0.5)]), rank=1)
    registry.push(made, "made:v1")
    page = raw.request(server, "GET", "/made").body.decode()
    assert "href='/a'" in page
    assert "content</span> <code>" in page  # what was never here is no link
    first, pushed, content = push(server, "me/leaves", 1.5)
    push(server, "me/leaves", 1.75)
    page = raw.request(server, "GET", "/made").body.decode()
    assert f"content</span> <a href='/-/at/{content}'>" in page
    assert at(server, content).headers["location"] == f"/me/leaves/tree/{first}"
    assert kept.hex != pushed


@pytest.mark.parametrize("hexed", ["", "0", "g" * 64, "A" * 64, "0" * 65, "..%2F..%2Fetc", "%00", "sha256:" + "0" * 64])
def test_what_is_no_digest_is_nothing(server, hexed):
    assert at(server, hexed).status in (400, 404)
