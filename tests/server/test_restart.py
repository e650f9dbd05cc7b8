"""A server that is killed while somebody uploads: what it acknowledged need not be sent again."""

import hashlib
import secrets
import threading
from contextlib import contextmanager

import pytest

from loraforge_registry.server import xorbs
from tests.hub import Server
from tests.server.raw import commit, post, request, upload
from tests.server.test_xet import chunk, place, shard_of

IN_PARTS = """
import functools
from loraforge_registry.server import run
run.Settings = functools.partial(run.Settings, multipart_above=1000, part_size=600)
from loraforge_cli.main import main
main()
"""
DATA = secrets.token_bytes(1500)
OID = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "store")
    server.program = ["-c", IN_PARTS]
    with server:
        server.token = server.add_user("alice")
        assert post(server, "/api/repos/create", {"name": "xet"}, token=server.token).status == 200
        yield server


@contextmanager
def away(server):
    """Kill it; it comes back at the same port."""
    server.kill()
    yield
    server.start()


def batch(server, transfers=("basic",)):
    asked = {"operation": "upload", "transfers": transfers, "objects": [{"oid": OID, "size": len(DATA)}]}
    (said,) = post(server, "/alice/xet.git/info/lfs/objects/batch", asked, token=server.token).json["objects"]
    return said


def path_of(server, url):
    return url.partition(f":{server.port}")[2]


def commits(server):
    return commit(server, "alice/xet", server.token, ("w.dat", OID, len(DATA))).status


def test_a_file_that_was_sent_is_here(server, run):
    assert upload(server, "alice/xet", server.token, DATA, OID).status == 200
    with away(server):
        pass
    assert "actions" not in batch(server), "it is not asked for again"
    assert run("--store", server.store, "gc", "--yes", "--now").code == 0
    assert commits(server) == 200


def test_a_collection_while_nobody_serves_takes_it_and_it_is_asked_for_again(server, run):
    assert upload(server, "alice/xet", server.token, DATA, OID).status == 200
    with away(server):
        assert run("--store", server.store, "gc", "--yes", "--now").code == 0
    assert commits(server) == 400
    assert upload(server, "alice/xet", server.token, DATA, OID).status == 200
    assert commits(server) == 200


def test_another_user_does_not_get_it_by_the_restart(server):
    assert upload(server, "alice/xet", server.token, DATA, OID).status == 200
    other = server.add_user("bob")
    post(server, "/api/repos/create", {"name": "mine"}, token=other)
    with away(server):
        pass
    assert commit(server, "bob/mine", other, ("w.dat", OID, len(DATA))).status == 400


def test_parts_that_were_sent_are_here(server):
    """In any order, twice, by two at once; not with one missing, of another upload, or of another length."""
    upload = batch(server, ["basic", "multipart"])["actions"]["upload"]
    urls = [path_of(server, upload["header"][f"{n:05d}"]) for n in (1, 2, 3)]
    parts = [DATA[:600], DATA[600:1200], DATA[1200:]]
    done = path_of(server, upload["href"])

    def complete():
        return post(server, done, {"oid": OID, "parts": []}).status

    assert request(server, "PUT", urls[2], body=parts[2]).status == 200
    assert request(server, "PUT", urls[0], body=parts[1]).status == 200, "wrong bytes, of the right length"
    assert request(server, "PUT", urls[0], body=parts[0] + b"1").status == 413
    assert request(server, "PUT", urls[1], body=parts[1][:-1]).status == 400
    assert complete() == 400
    other = batch(server, ["basic", "multipart"])["actions"]["upload"]
    assert request(server, "PUT", path_of(server, other["header"]["00002"]), body=parts[1]).status == 200
    assert complete() == 400, "a part of another upload is none of this"
    with away(server):
        pass
    put = {"target": request, "args": (server, "PUT", urls[1]), "kwargs": {"body": parts[1]}}
    at_once = [threading.Thread(**put) for _ in range(2)]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join()
    assert request(server, "PUT", urls[0], body=parts[0]).status == 200, "sent again, the last counts"
    assert complete() == 200
    assert complete() == 400, "an upload ends once"
    assert commits(server) == 200


def test_xorbs_that_were_sent_are_here(server):
    where, token, _ = place(server, server.token)
    name = bytes([7]) * 32
    xorb = f"{where}/v1/xorbs/default/{xorbs.spell(name)}"
    assert request(server, "POST", xorb, token=token, body=chunk(DATA)).status == 200
    with away(server):
        pass
    assert request(server, "POST", f"{where}/v1/shards", token=token, body=shard_of(DATA, (7, 0, 1))).status == 200
    with away(server):
        pass
    assert commits(server) == 200
    assert place(server, server.token)[0] == where
