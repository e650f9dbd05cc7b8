"""What may be pushed: the same gates as everywhere, and a sentence for what they refuse."""

import hashlib
import json
from dataclasses import replace

import pytest

from loraforge_registry.git import Signature, blob_id
from loraforge_registry.repositories import (
    CommitRecord,
    CommittedFile,
    RepositoryRecord,
    encode_commit,
    encode_repository,
)
from loraforge_registry.server import commits, gate, repos
from loraforge_registry.server.hub import Settings
from loraforge_registry.server.run import open_hub
from tests.conformance.hub_matrix import ADAPTER
from tests.server.raw import commit, post, request, upload

CONFIG = (ADAPTER / "adapter_config.json").read_bytes()
WEIGHTS = (ADAPTER / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def repo(server, alice, request):
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    assert post(server, "/api/repos/create", {"name": name}, token=alice).status == 200
    return f"alice/{name}"


def push(server, repo, token, config, weights):
    oid = hashlib.sha256(weights).hexdigest()
    upload(server, repo, token, weights, oid)
    files = [("adapter_config.json", config), ("adapter_model.safetensors", oid, len(weights))]
    return commit(server, repo, token, *files)


def test_an_adapter_is_one_for_loraforge_on_the_machine(server, alice, repo, run):
    assert push(server, repo, alice, CONFIG, WEIGHTS).status == 200
    name = repo.replace("/", "--")
    assert run("--store", server.store, "--json", "show", name).json["rank"]
    tags = request(server, "GET", f"/api/models/{repo}").json["tags"]
    assert {"peft", "lora"} <= set(tags)


def test_a_config_that_is_not_that_of_the_tensors_is_refused(server, alice, repo):
    wrong = json.dumps({**json.loads(CONFIG), "r": 77}).encode()
    answer = push(server, repo, alice, wrong, WEIGHTS)
    assert answer.status == 400
    assert "77" in answer.json["error"]
    assert len(request(server, "GET", f"/api/models/{repo}").json["siblings"]) == 1


@pytest.mark.parametrize("name", ["adapter_model.bin", "x/y.PT", "model.ckpt", "a.pkl"])
def test_a_pickle_is_refused_by_name_with_the_way_out(server, alice, repo, name):
    asked = {"files": [{"path": name, "size": 10, "sample": ""}]}
    for answer in (
        post(server, f"/api/models/{repo}/preupload/main", asked, token=alice),
        commit(server, repo, alice, (name, b"\x80\x04N.")),
    ):
        assert answer.status == 400
        assert "safe_serialization" in answer.json["error"]


def test_what_a_trainer_leaves_beside_is_left_out(server, alice, repo):
    asked = {"files": [{"path": "training_args.bin", "size": 10, "sample": ""}]}
    (said,) = post(server, f"/api/models/{repo}/preupload/main", asked, token=alice).json["files"]
    assert said["shouldIgnore"] is True


def test_a_safetensors_file_anywhere_passes_the_header_gate(server, alice, repo):
    bad = b"\xff" * 100
    oid = hashlib.sha256(bad).hexdigest()
    assert upload(server, repo, alice, bad, oid).status == 200
    answer = commit(server, repo, alice, ("deep/bad.safetensors", oid, len(bad)))
    assert answer.status == 400
    assert "not a safetensors file" in answer.json["error"]


@pytest.fixture
def hub(tmp_path):
    hub, pins = open_hub(tmp_path / "store", Settings())
    yield hub
    pins.close()


def test_weights_are_read_once_however_often_others_are_first(hub, monkeypatch):
    me = hub.accounts.find(hub.accounts.add("me"))
    first = hub.refs.put_record(encode_commit(CommitRecord({}, Signature("me", 0), "")))
    record = hub.refs.put_record(encode_repository(RepositoryRecord("me/r", 0, branches={"main": first})))
    assert hub.refs.swap("me--r", None, record, who="me", what="test")
    files = {
        "adapter_config.json": CommittedFile(*hub.blobs.put([CONFIG]), blob_id(CONFIG)),
        "adapter_model.safetensors": CommittedFile(*hub.blobs.put([WEIGHTS])),
    }
    read, others, examine, change = [], iter("abcde"), gate.examine, repos.change

    def late(hub, repository, record, *, user, what):
        if name := next(others, None):  # somebody else makes a tag meanwhile
            change(hub, repository, replace(repository.record, tags={name: first}), user=user, what="test")
        return change(hub, repository, record, user=user, what=what)

    monkeypatch.setattr(repos, "change", late)
    monkeypatch.setattr(gate, "examine", lambda *given, **named: read.append(1) or examine(*given, **named))
    made = commits._commit(hub, me, "me/r", "main", commits.Wanted("an adapter", files=files))
    assert made.commit.adapter is not None
    assert next(others, None) is None
    assert len(read) == 1
