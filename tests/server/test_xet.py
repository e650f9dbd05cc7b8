"""Xorbs and shards that are not what they say are refused; what was rebuilt is let go of."""

import os
import time

import pytest

from loraforge_registry.errors import FormatError
from loraforge_registry.server import xorbs
from tests.server.raw import post, request


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


def test_a_place_takes_only_its_own_token_and_is_let_go_of(server, alice):
    post(server, "/api/repos/create", {"name": "xet"}, token=alice)
    path = "/api/models/alice/xet/xet-write-token/main"
    one, two = (request(server, "GET", path, token=alice).json for _ in range(2))
    where = one["casUrl"].partition(f":{server.port}")[2] + "/v1/xorbs/default/" + "a" * 64
    assert request(server, "POST", where, body=chunk(b"abc")).status == 401
    assert request(server, "POST", where, token=two["accessToken"], body=chunk(b"abc")).status == 403
    assert request(server, "POST", where, token=alice, body=chunk(b"abc")).status == 403
    assert request(server, "POST", where, token=one["accessToken"], body=b"abc").status == 400
    assert request(server, "POST", where, token=one["accessToken"], body=chunk(b"abc")).status == 200
    shard = where.partition("/xorbs")[0] + "/shards"
    assert request(server, "POST", shard, token=one["accessToken"], body=b"no shard").status == 400

    directory = server.store.with_name("store.server") / "uploads" / f"cas-{one['casUrl'].rpartition('/')[2]}"
    (directory / "done").touch()
    long_ago = time.time() - 3600
    os.utime(directory, (long_ago, long_ago))
    request(server, "GET", path, token=alice)
    assert not directory.exists()
