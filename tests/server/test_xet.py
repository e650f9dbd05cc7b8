"""Xorbs and shards that are not what they say are refused; what was rebuilt is let go of."""

import hashlib
import os
import secrets
import struct
import time

import pytest

from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError
from loraforge_registry.server import places, xorbs
from tests.server.raw import commit, post, request


def chunk(data, *, scheme=0, size=None, version=0):
    length = len(data) if size is None else size
    return bytes([version]) + len(data).to_bytes(3, "little") + bytes([scheme]) + length.to_bytes(3, "little") + data


@pytest.mark.parametrize(
    "data",
    [b"", b"x", chunk(b"abc")[:-1], chunk(b"abc", scheme=7), chunk(b"abc", version=1), chunk(b"a", size=2**24 - 1)],
)
def test_no_xorb(data):
    with pytest.raises(FormatError):
        xorbs.read_chunks(len(data), lambda begin, length: data[begin : begin + length])


@pytest.mark.parametrize("packed", [b"abc", chunk(b"not lz4", scheme=1)[8:], b"\x04\x22\x4d\x18" + b"\xff" * 20])
def test_a_chunk_that_does_not_unpack(packed):
    with pytest.raises(FormatError):
        xorbs.unpack(xorbs.Chunk(0, len(packed), 1, 100), packed)


def test_a_bomb_is_unpacked_no_further_than_it_says():
    from lz4 import frame

    packed = frame.compress(bytes(50_000_000))
    with pytest.raises(FormatError, match="1001 bytes that says it has 1000"):
        xorbs.unpack(xorbs.Chunk(0, len(packed), 1, 1000), packed)


@pytest.mark.parametrize("size", range(9))
def test_grouped_bytes_come_back(size):
    data = bytes(range(size))
    grouped = b"".join(data[lane::4] for lane in range(4))
    assert xorbs._ungroup(grouped) == data


@pytest.mark.parametrize("data", [b"", b"HFRepoMetaData" + bytes(34), b"HFRepoMetaData" + bytes(34) + b"\1" * 48])
def test_no_shard(data):
    with pytest.raises(FormatError):
        list(xorbs.read_shard(data))


def place(server, token, repo="alice/xet"):
    """Where to send to, the token for it, and the directory."""
    said = request(server, "GET", f"/api/models/{repo}/xet-write-token/main", token=token).json
    where = said["casUrl"].partition(f":{server.port}")[2]
    directory = server.store.with_name("store.server") / "uploads" / f"cas-{where.rpartition('/')[2]}"
    return where, said["accessToken"], directory


def test_a_place_takes_only_its_own_token(server, alice, bob):
    for token in (alice, bob):
        post(server, "/api/repos/create", {"name": "xet"}, token=token)
    (where, token, _), (_, another, _) = place(server, alice), place(server, bob, "bob/xet")
    xorb = f"{where}/v1/xorbs/default/{'a' * 64}"
    assert request(server, "POST", xorb, body=chunk(b"abc")).status == 401
    assert request(server, "POST", xorb, token=another, body=chunk(b"abc")).status == 403
    assert request(server, "POST", xorb, token=alice, body=chunk(b"abc")).status == 403
    assert request(server, "POST", xorb, token=token, body=b"abc").status == 400
    assert request(server, "POST", xorb, token=token, body=chunk(b"abc")).status == 200


def record(raw, *numbers):
    return raw + struct.pack(f"<{len(numbers)}I", *numbers) + bytes(16 - 4 * len(numbers))


def shard_of(data, *terms):
    """A shard of one file: runs of chunks, each of the xorb whose hash is all one byte."""
    words = [hashlib.sha256(data).digest()[begin : begin + 8][::-1] for begin in range(0, 32, 8)]
    records = [b"HFRepoMetaData" + bytes(34), record(b"f" * 32, 1 << 30, len(terms))]
    records += [record(bytes([byte]) * 32, 0, 0, begin, end) for byte, begin, end in terms]
    return b"".join([*records, record(b"".join(words)), b"\xff" * 48])


def old(path):
    os.utime(path, (time.time() - 3600,) * 2)


def test_a_xorb_that_was_taken_away_is_found_in_the_file_that_it_became(server, alice):
    """What a client sends no second time, because it remembers that it did, is here, or the place is given up."""
    repo = f"xet-{secrets.token_hex(4)}"
    post(server, "/api/repos/create", {"name": repo}, token=alice)
    where, token, directory = place(server, alice, f"alice/{repo}")
    parts = [secrets.token_bytes(1000) for _ in range(4)]
    name = bytes([7]) * 32
    assert request(
        server, "POST", f"{where}/v1/xorbs/default/{xorbs.spell(name)}", token=token, body=b"".join(map(chunk, parts))
    ).status == 200  # fmt: skip
    files = [(b"".join(parts), (7, 0, 4)), (b"".join(parts[1:3] + parts[3:]), (7, 1, 3), (7, 3, 4))]
    for number, (data, *terms) in enumerate(files):
        assert request(server, "POST", f"{where}/v1/shards", token=token, body=shard_of(data, *terms)).status == 200
        oid = hashlib.sha256(data).hexdigest()
        assert commit(server, f"alice/{repo}", alice, (f"{number}.dat", oid, len(data))).status == 200
        for path in directory.iterdir():
            old(path)
        assert place(server, alice, f"alice/{repo}")[0] == where
        assert not (directory / xorbs.spell(name)).exists(), "the recipe stands for it"
    unknown = request(server, "POST", f"{where}/v1/shards", token=token, body=shard_of(b"", (8, 0, 1)))
    assert (unknown.status, "push again" in unknown.json["error"]) == (400, True)
    assert place(server, alice, f"alice/{repo}")[0] != where, "a client that believes what is not so begins anew"


def test_a_place_whose_file_went_is_given_up(tmp_path):
    kept = [Digest.of(b"a"), Digest.of(b"b")]
    one = places.open_place(tmp_path, "alice", lambda _: True)
    directory = places.directory_of(tmp_path, one)
    for number, digest in enumerate(kept):
        places.remember(directory, f"{number:064x}", [3, 4], [places.Run(0, 2, digest, 10)])
    assert places.open_place(tmp_path, "alice", kept.__contains__) == one
    assert places.open_place(tmp_path, "bob", lambda _: True) != one
    assert places.open_place(tmp_path, "alice", lambda digest: digest != kept[1]) != one
    recipe = places.recipe_of(directory, f"{1:064x}")
    assert list(recipe.find(1, 2)) == [(kept[1], 13, 17)]
    assert list(recipe.find(2, 3)) == []


def test_what_uploads_leave_goes_after_a_day(tmp_path):
    one = places.directory_of(tmp_path, places.open_place(tmp_path, "alice", lambda _: True))
    (tmp_path / "parts-1").mkdir()
    for path in (one / ("a" * 64), one / "temporary", tmp_path / "parts-1" / "00001"):
        path.touch()
        old(path)
    places.clean(tmp_path)
    assert len(list(one.iterdir())) == 2
    for path in (*one.iterdir(), tmp_path / "parts-1"):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    places.clean(tmp_path)
    assert (list(one.iterdir()), (tmp_path / "parts-1").exists()) == ([], False)
