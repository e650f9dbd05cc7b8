"""Our client and our server: what is pushed comes back the same, and nothing goes twice over the wire."""

import pytest

from loraforge_registry.server import accounts
from tests.bad_files import config, tensors, write_adapter
from tests.hub import Server


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which peers' tests set
    with Server(tmp_path / "served") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.add_user("me"))
        yield server


def test_there_and_back(server, tmp_path, run):
    for name, value in (("french", 0.5), ("law", -0.25)):
        write_adapter(tmp_path / name, weights=tensors(value), settings=config(base_model_name_or_path="acme/base"))
        assert run("push", tmp_path / name, f"{name}:v1").code == 0
    assert run("compose", "french:v1=0.7", "law:v1=0.3", "--rank", "1", "--as", "blend:v1").code == 0
    sent = run("--json", "push", "blend:v1", "--to", "hf://me/blend").json
    assert sent["sent"] > 0
    assert run("--json", "push", "blend:v1", "--to", "hf://me/blend").json["sent"] == 0
    there = ("--store", tmp_path / "other", "--json")
    pulled = run(*there, "pull", "hf://me/blend@v1").json
    assert (pulled["digest"], pulled["tag"]) == (sent["digest"], "v1")
    assert pulled["derivation"] == run("--json", "show", "blend:v1").json["derivation"]
    assert run(*there, "pull", "hf://me/blend@v1").json["received"] == 0
    assert run("search", "blend", "--on", "hf://").out.count("hf://me/blend") == 1
    assert run("--store", server.store, "fsck", "--deep").code == 0
    missing = run("pull", "hf://me/nothing")
    assert (missing.code, missing.err.count("\n")) == (3, 1)


def test_a_token_that_is_nobodys(server, tmp_path, run, monkeypatch):
    write_adapter(tmp_path / "a")
    assert run("push", tmp_path / "a", "a:v1").code == 0
    monkeypatch.setenv("HF_TOKEN", f"{accounts.PREFIX}nobodys")
    for command in (("push", "a:v1", "--to", "hf://me/a"), ("pull", "hf://me/a"), ("search", "a", "--on", "hf://")):
        ran = run(*command)
        assert (ran.code, ran.err.count("\n"), "does not accept the token" in ran.err) == (5, 1, True), ran


@pytest.mark.parametrize("port", [None, 99_999, -1])
def test_a_port_that_cannot_be_had(server, tmp_path, run, port):
    """Said in a sentence, before there is a store or a session that somebody would have to clean up."""
    ran = run("--store", tmp_path / "new", "serve", "--port", port or server.port)
    assert (ran.code, "Traceback" in ran.err) == (5 if port is None else 2, False), ran
    assert not (tmp_path / "new").exists()


def test_a_server_that_is_killed_in_the_middle(server, tmp_path, run):
    write_adapter(tmp_path / "a")
    server.kill()
    refused = run("push", tmp_path / "a", "a:v1", "--to", "hf://me/a")
    assert (refused.code, refused.err.count("\n"), "cannot be reached" in refused.err) == (5, 1, True), refused
    server.start()
    assert run("push", "a:v1", "--to", "hf://me/a").code == 0
