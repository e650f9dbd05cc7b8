"""Time, connections and disk that clients may take: limits lowered, so that nobody waits for them here."""

import hashlib
import socket
import threading
import time
from contextlib import ExitStack, suppress

import pytest

from tests.hub import Server
from tests.server.raw import commit, post, read_answer, request, send, upload

PROGRAM = """
from loraforge_registry import files
from loraforge_registry.server import call, run
{}
from loraforge_cli.main import main
main()
"""
BODY = "POST /api/validate-yaml HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {}\r\n\r\n"


def server_with(folder, code):
    server = Server(folder / "store")
    server.program = ["-c", PROGRAM.format(code)]
    return server


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    """A server that waits half a second where others wait for half a minute."""
    code = "call.IDLE = call.GRACE = run.HEADER_SECONDS = 0.5; run.KEEP_ALIVE = 1"
    with server_with(tmp_path_factory.mktemp("hasty"), code) as server:
        yield server


def dribble(server, begin, piece):
    """Send the beginning, then a piece ten times a second, until the server has enough; return what it said."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(begin.encode())
        connection.settimeout(0.1)
        for _ in range(200):
            try:
                with suppress(TimeoutError):
                    return read_answer(connection).status
                connection.sendall(piece)
            except OSError:  # closed, or reset since there was more to read
                return 0
    raise AssertionError("the server listens for ever")


@pytest.mark.parametrize(
    ("begin", "piece", "status"),
    [
        ("", b"", 0),
        ("GET / HTTP/1.1\r\n", b"X", 0),
        ("GET / HTTP/1.1\r\n", b"X: 1\r\n", 0),
        (BODY.format(1000) + "{", b"", 408),
        (BODY.format(1000), b" ", 408),
        (BODY.replace("Content-Length: {}", "Transfer-Encoding: chunked"), b"1\r\n \r\n", 408),
        (BODY.format(100_000) + "x" * 20_000, b"", 408),
        ("", b"\r\n", 0),
    ],
    ids=["silence", "a header", "headers", "a silent body", "a slow body", "chunks", "a long body", "line breaks"],
)
def test_who_dawdles_is_sent_away(hasty, begin, piece, status):
    assert dribble(hasty, begin, piece) in {status, 0}


def test_a_connection_is_not_kept_for_ever(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=20) as connection:
        connection.sendall(b"GET /api/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert read_answer(connection).status == 200
        assert connection.recv(1) == b""


def test_headers_have_an_end(hasty):
    line = b"X-Long: " + b"x" * 10_000 + b"\r\n"
    with suppress(ConnectionError):
        assert send(hasty, b"GET /api/models HTTP/1.1\r\nHost: 127.0.0.1\r\n" + line * 200).status in (0, 400)
    assert request(hasty, "GET", "/api/models").status == 200
    assert hasty.memory() < 200e6


def test_silent_connections_make_room_for_who_asks(tmp_path):
    """Those that have been silent for longest go first; who asks is served at any number of them."""
    with server_with(tmp_path, "run.MAX_CONNECTIONS = 20") as server, ExitStack() as stack:
        silent = []
        for _ in range(60):
            silent.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20)))
            assert request(server, "GET", "/api/models").status == 200
        for connection in silent[:30]:
            with suppress(ConnectionError):
                assert connection.recv(1) == b""
        silent[-1].settimeout(0.05)
        with pytest.raises(TimeoutError):
            silent[-1].recv(1)


def test_who_asks_slowly_holds_up_nobody_who_asks(tmp_path):
    """More of them than there are threads, without a token; questions with a body are answered meanwhile."""
    with server_with(tmp_path, "") as server, ExitStack() as stack:
        token = server.add_user("me")
        for _ in range(120):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            slow.sendall(BODY.format(100).encode() + b"{")
        for number in range(5):
            assert post(server, "/api/repos/create", {"name": f"r{number}"}, token=token).status == 200
        assert post(server, "/api/validate-yaml", {"content": "x" * 5000}).status == 200


@pytest.mark.parametrize(
    ("lines", "body", "allowed"),
    [
        ([], b"", {200}),
        (["Expect: 100-continue", "Content-Length: 2"], b"{}", {100, 200}),
        (["Expect: the unexpected", "Content-Length: 2"], b"{}", {200, 417}),
        (["Content-Length: 2"], b"{}GARBAGE / HTTP/1.1\r\n\r\n", {200}),
        (["Content-Length: 20"], b"{}", {0, 400, 408}),
        (["Content-Length: +2"], b"{}", {0, 400}),
        (["Content-Length: 0x2"], b"{}", {0, 400}),
        (["Content-Length: 2, 2"], b"{}", {0, 400}),
        (["Transfer-Encoding: chunked"], b"2\r\n{}\r\n0\r\n\r\n", {200}),
        (["Transfer-Encoding: chunked"], b"-2\r\n{}\r\n0\r\n\r\n", {0, 400}),
        (["Transfer-Encoding: chunked"], b"ffffffffffffffffff\r\n{}", {0, 400}),
        (["Transfer-Encoding: chunked"], b"400000\r\n" + b" " * 4_194_304 + b"\r\n1\r\n \r\n0\r\n\r\n", {413}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_how_long_a_body_is(hasty, lines, body, allowed):
    head = ["POST /api/validate-yaml HTTP/1.1", f"Host: 127.0.0.1:{hasty.port}", "Connection: close", *lines]
    answer = send(hasty, "\r\n".join(head).encode() + b"\r\n\r\n" + body)
    assert answer.status in allowed


def test_a_full_disk_is_said_and_harms_nothing(tmp_path):
    """Writes of more than 100 kB fail as they do on a full disk."""
    code = """
write = files.write_all
def full(fd, data):
    if len(memoryview(data).cast("B")) > 100_000:
        raise OSError(28, "No space left on device")
    write(fd, data)
files.write_all = full
"""
    with server_with(tmp_path, code) as server:
        token = server.add_user("me")
        assert post(server, "/api/repos/create", {"name": "r"}, token=token).status == 200
        for size, status in ((500_000, 507), (50_000, 200)):
            data = b"\0" * size
            oid = hashlib.sha256(data).hexdigest()
            answer = upload(server, "me/r", token, data, oid)
            assert answer.status == status, answer
            assert commit(server, "me/r", token, (f"{size}.dat", oid, size)).status == (200 if status == 200 else 400)
            assert not list((server.store / "tmp").iterdir())


def test_who_goes_away_before_the_end_leaves_nothing(tmp_path):
    with server_with(tmp_path, "") as server:
        token = server.add_user("me")
        post(server, "/api/repos/create", {"name": "r"}, token=token)
        data = b"\0" * 3_000_000
        oid = hashlib.sha256(data).hexdigest()
        listed = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": len(data)}]}
        said = post(server, "/me/r.git/info/lfs/objects/batch", listed, token=token).json["objects"][0]
        where = said["actions"]["upload"]["href"].partition(f":{server.port}")[2]
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"PUT {where} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data[:2_970_000])
        while b"PUT /lfs/put/{oid} 400" not in server.log.read_bytes():
            time.sleep(0.02)
        assert not list((server.store / "tmp").iterdir())
        assert commit(server, "me/r", token, ("w.dat", oid, len(data))).status == 400
        assert upload(server, "me/r", token, data, oid).status == 200


def test_of_two_who_want_one_tag_one_gets_it(tmp_path):
    with server_with(tmp_path, "") as server:
        token = server.add_user("me")
        post(server, "/api/repos/create", {"name": "r"}, token=token)
        made = [commit(server, "me/r", token, (f"{n}.txt", b"x")).json["commitOid"] for n in range(4)]
        statuses = []

        def want(commit):
            statuses.append(post(server, f"/api/models/me/r/tag/{commit}", {"tag": "v1"}, token=token).status)

        threads = [threading.Thread(target=want, args=(commit,)) for commit in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200, 409, 409, 409]
