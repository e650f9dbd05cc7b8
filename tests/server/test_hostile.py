"""Requests that mean harm, or make no sense: each is refused with its status, and the server goes on."""

import hashlib
import json
import select
import socket
import subprocess
import threading
from base64 import b64encode
from contextlib import suppress

import pytest

from loraforge_registry.server.tickets import Signer
from tests.hub import Server
from tests.server.raw import commit, post, read_answer, request, send, upload


@pytest.fixture(scope="module")
def repo(server, alice):
    """A private repository of alice's with one file in LFS."""
    assert post(server, "/api/repos/create", {"name": "secret", "visibility": "private"}, token=alice).status == 200
    data = b"\0alice's" * 1000
    oid = hashlib.sha256(data).hexdigest()
    assert upload(server, "alice/secret", alice, data, oid).status == 200
    assert commit(server, "alice/secret", alice, ("w.dat", oid, len(data)), ("a.txt", b"text")).status == 200
    return oid


def head_of(server, repo, token):
    return request(server, "GET", f"/api/models/{repo}", token=token).json["sha"]


BAD_TOKENS = {
    "none": [],
    "wrong": ["Bearer lf_wrong"],
    "empty": ["Bearer "],
    "no kind": ["lf_x"],
    "basic": ["Basic " + b64encode(b"alice:lf_x").decode()],
    "not ascii": ["Bearer lf_größe"],
    "long": ["Bearer lf_" + "x" * 30_000],
    "very long": ["Bearer lf_" + "x" * 1_000_000],
    "nul": ["Bearer lf_\x01"],
}


@pytest.mark.parametrize("values", BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_no_token_that_is_nobodys_gets_in(server, repo, values):
    headers = [("Authorization", value) for value in values]
    for method, path in (("GET", "/api/whoami-v2"), ("POST", "/api/repos/create"), ("GET", "/api/models/alice/secret")):
        try:
            status = request(server, method, path, headers=headers).status
        except ConnectionError:
            status = 0  # headers of a megabyte are read to no end
        assert status in ((0, 400) if len(str(values)) > 100_000 else (400, 401))


def test_two_tokens_or_one_in_the_query_are_none(server, alice, repo):
    twice = [("Authorization", f"Bearer {alice}"), ("Authorization", f"Bearer {alice}")]
    assert request(server, "GET", "/api/whoami-v2", headers=twice).status == 401
    assert request(server, "GET", f"/api/whoami-v2?token={alice}&access_token={alice}").status == 401


def test_a_token_does_only_what_its_scopes_say(server, alice, repo):
    reader, other = server.add_user("reader", "read:alice"), server.add_user("other")
    assert request(server, "GET", "/api/models/alice/secret", token=reader).status == 200
    assert request(server, "GET", "/api/models/alice/secret", token=other).status == 404
    for token, status in ((reader, 403), (other, 404)):
        assert commit(server, "alice/secret", token, ("x", b"x")).status == status
        body = {"name": "secret", "organization": "alice"}
        assert post(server, "/api/repos/delete", body, token=token, method="DELETE").status == status
        assert post(server, "/api/models/alice/secret/tag/main", {"tag": "t"}, token=token).status == status
        assert request(server, "GET", "/api/models/alice/secret/xet-write-token/main", token=token).status == status
    assert post(server, "/api/repos/create", {"name": "x", "organization": "alice"}, token=other).status == 403
    assert "alice/secret" not in [m["id"] for m in request(server, "GET", "/api/models", token=other).json]


def test_a_revoked_token_stops_at_the_next_request_also_between_upload_and_commit(server):
    from loraforge_registry.server.run import accounts_of

    token = server.add_user("leaver")
    assert post(server, "/api/repos/create", {"name": "r"}, token=token).status == 200
    data = b"\0left" * 100
    oid = hashlib.sha256(data).hexdigest()
    assert upload(server, "leaver/r", token, data, oid).status == 200
    accounts_of(server.store).remove("leaver")
    assert commit(server, "leaver/r", token, ("w.dat", oid, len(data))).status == 401
    assert request(server, "GET", "/api/models/leaver/r").json["siblings"] == [{"rfilename": ".gitattributes"}]


PATHS = (
    "/alice/secret/resolve/main/../../../etc/passwd",
    "/alice/secret/resolve/main/%2e%2e%2f%2e%2e%2fetc/passwd",
    "/alice/secret/resolve/main/%252e%252e%252fetc",
    "/alice/secret/resolve/main/..%5c..%5cboot.ini",
    "/alice/secret/resolve/main//etc/passwd",
    "/alice/secret/resolve/main/a.txt;x=1",
    "/alice/secret/resolve/main/a.txt%00.safetensors",
    "/alice/secret/resolve/main/%c0%ae%c0%ae/x",
    "/alice/secret/resolve/main/%0d%0aX-Evil:%201",
    "/alice/secret/resolve/main/%1b%5b31m",
    "/alice/secret/resolve/..%2f..%2frefs/a.txt",
    "/api/models/..%2f..%2fetc",
    "/api/models/alice%2Fsecret%2F..%2Fx",
    "/api/models/alice/se--cret",
    "/-/at/../../etc/passwd",
    "/lfs/put/../../../etc/passwd",
    "/" + "a" * 60_000,
    "/alice/secret/resolve/main/file:///etc/passwd",
    "http://evil.example/../etc/passwd",
    "file:///etc/passwd",
    "etc/passwd",
    "//etc/passwd",
    "*",
)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p[:50])
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_no_path_leads_anywhere_but_to_names(server, alice, repo, path, method):
    answer = request(server, method, path, token=alice)
    assert answer.status in (0, 400, 404, 405, 414)
    assert b"root:" not in answer.body
    assert "x-evil" not in answer.headers


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/x",
        "a/../x",
        "a//x",
        ".git/hooks/x",
        "a/.GIT/x",
        "a\\x",
        "a\nb",
        "",
        ".",
        "x" * 300,
        "c:x",
        "a/" * 600 + "x",
    ],
    ids=lambda p: repr(p)[:20],
)
def test_no_path_in_a_commit_leads_out_of_a_directory(server, alice, repo, path):
    before = head_of(server, "alice/secret", alice)
    assert commit(server, "alice/secret", alice, (path, b"x")).status == 400
    assert commit(server, "alice/secret", alice, ("a.txt/below-a-file", b"x")).status == 400
    assert head_of(server, "alice/secret", alice) == before


def test_knowing_a_digest_gives_nobody_the_bytes(server, alice, bob, repo):
    """Bob knows the sha256 of alice's private file: he can neither get it nor name it, and must send it himself."""
    assert post(server, "/api/repos/create", {"name": "mine"}, token=bob).status == 200
    assert commit(server, "bob/mine", bob, ("w.dat", repo, 8000)).status == 400
    asked = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": repo, "size": 8000}]}
    (said,) = post(server, "/bob/mine.git/info/lfs/objects/batch", asked, token=bob).json["objects"]
    assert "actions" in said, "that it is here must not be said"
    asked["operation"] = "download"
    (said,) = post(server, "/bob/mine.git/info/lfs/objects/batch", asked, token=bob).json["objects"]
    assert said["error"]["code"] == 404
    assert request(server, "GET", f"/bob/mine/lfs/{repo}", token=bob).status == 404
    assert request(server, "GET", f"/alice/secret/lfs/{repo}", token=bob).status == 404
    assert request(server, "GET", f"/alice/secret/lfs/{repo}", token=alice).status == 200
    none = post(server, "/lfs/verify", {"oid": "0" * 64, "size": 8000}, token=bob)
    there = post(server, "/lfs/verify", {"oid": repo, "size": 8000}, token=bob)
    assert none.status == there.status == 404, "no oracle for what is here"


FROM_ELSEWHERE = dict.fromkeys(("source", "url", "href", "src", "srcPath", "template", "from"), "file:///etc/passwd")


def test_no_field_names_a_file_of_the_server(server, alice):
    """What a request says beside what it must is not looked at, and there is no operation that copies from a path."""
    asked = {"name": "from", **FROM_ELSEWHERE}
    assert post(server, "/api/repos/create", asked, token=alice).status == 200
    listed = {"operation": "upload", "objects": [{"oid": "a" * 64, "size": 5, **FROM_ELSEWHERE}], **FROM_ELSEWHERE}
    (said,) = post(server, "/alice/from.git/info/lfs/objects/batch", listed, token=alice).json["objects"]
    assert said["actions"]["upload"]["href"].startswith(f"http://127.0.0.1:{server.port}/lfs/put/")
    asked = {"files": [{"path": "x", "size": 5, "sample": "", **FROM_ELSEWHERE}]}
    assert post(server, "/api/models/alice/from/preupload/main", asked, token=alice).status == 200
    path = {"path": "x", **FROM_ELSEWHERE}
    for key in ("file", "lfsFile", "copyFile", "link", "symlink", "import"):
        body = json.dumps({"key": key, "value": path}).encode()
        assert post(server, "/api/models/alice/from/commit/main", body, token=alice).status == 400
    (only,) = request(server, "GET", "/api/models/alice/from").json["siblings"]
    assert only["rfilename"] == ".gitattributes"


def test_what_a_url_allows_ends(server, alice):
    post(server, "/api/repos/create", {"name": "old"}, token=alice)
    signer = Signer(bytes.fromhex((server.store.with_name("store.server") / "key").read_text()))
    data = b"\0" * 100
    claims = {"oid": hashlib.sha256(data).hexdigest(), "size": 100, "user": "alice", "repository": "alice/old"}
    for lifetime, status in ((-1, 403), (60, 200)):
        where = f"/lfs/put/{claims['oid']}?ticket={signer.sign('put', claims, lifetime)}"
        assert request(server, "PUT", where, body=data).status == status


def raw_put(server, lines, body=b""):
    head = ["POST /api/validate-yaml HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Connection: close", *lines]
    return send(server, "\r\n".join(head).encode() + b"\r\n\r\n" + body)


@pytest.mark.parametrize(
    ("lines", "allowed"),
    [
        (["Content-Length: 5", "Transfer-Encoding: chunked"], (0, 400)),
        (["Content-Length: 5", "Content-Length: 6"], (0, 400)),
        (["Content-Length: -1"], (0, 400)),
        (["Content-Length: 99999999999999999999999"], (0, 400, 413)),
        (["Content-Length: 107374182400"], (413,)),
        (["Transfer-Encoding: gzip, chunked, chunked"], (0, 400)),
        (["Content-Length : 5"], (0, 400)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_has_one_length_and_it_is_small_enough(server, lines, allowed):
    assert raw_put(server, lines, b"12345").status in allowed


def test_an_upload_is_as_long_as_it_said_and_has_the_digest_it_said(server, alice):
    post(server, "/api/repos/create", {"name": "up"}, token=alice)
    data = b"\0" * 5000
    oid = hashlib.sha256(data).hexdigest()
    listed = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": len(data)}]}
    said = post(server, "/alice/up.git/info/lfs/objects/batch", listed, token=alice).json["objects"][0]
    where = said["actions"]["upload"]["href"].partition(f":{server.port}")[2]
    assert request(server, "PUT", where, body=data + b"1").status == 413
    assert request(server, "PUT", where, body=data[:-1]).status == 400
    assert request(server, "PUT", where, body=b"\1" * 5000).status == 400
    assert request(server, "PUT", where.replace(oid, "0" * 64), body=data).status == 403
    assert request(server, "PUT", where[:-4] + "AAAA", body=data).status == 403
    assert request(server, "PUT", where.partition("?")[0], body=data).status == 403
    assert request(server, "PUT", where.replace("/put/", "/part/"), body=data).status == 403
    assert commit(server, "alice/up", alice, ("w.dat", oid, len(data))).status == 400, "it never came"
    assert request(server, "PUT", where, body=data).status == 200
    assert commit(server, "alice/up", alice, ("w.dat", oid, len(data) + 1)).status == 400
    assert commit(server, "alice/up", alice, ("w.dat", oid, len(data))).status == 200


def test_limits_of_size_and_quota_are_said_in_json(server, alice):
    post(server, "/api/repos/create", {"name": "big"}, token=alice)
    over = {"files": [{"path": "x.dat", "size": 151_000_000, "sample": ""}]}
    answer = post(server, "/api/models/alice/big/preupload/main", over, token=alice)
    assert answer.status == 413
    assert "150000000" in answer.json["error"]
    objects = [{"oid": f"{n:064x}", "size": 120_000_000} for n in range(2)]
    listed = {"operation": "upload", "transfers": ["basic"], "objects": objects}
    answer = post(server, "/alice/big.git/info/lfs/objects/batch", listed, token=alice)
    assert answer.status == 413
    assert answer.headers["x-error-code"] == "QuotaExceeded"
    assert commit(server, "alice/big", alice, ("x.txt", b"x" * 11 * 1024 * 1024)).status == 413


@pytest.mark.parametrize(
    ("value", "status", "begin", "end"),
    [
        ("bytes=0-0", 206, 0, 1),
        ("bytes=10-", 206, 10, 8000),
        ("bytes=-5", 206, 7995, 8000),
        ("bytes=0-99999999999999", 206, 0, 8000),
        ("bytes=8000-", 416, 0, 0),
        ("bytes=5-2", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
        ("bytes=" + ",".join(["0-0"] * 10_000), 200, 0, 8000),
        ("bytes=99999999999999999999999999999-", 200, 0, 8000),
        ("lines=1-2", 200, 0, 8000),
        ("bytes=--1", 200, 0, 8000),
    ],
    ids=lambda value: str(value)[:24],
)
def test_one_range_or_the_whole(server, alice, repo, value, status, begin, end):
    sha = head_of(server, "alice/secret", alice)
    path = f"/alice/secret/resolve/{sha}/w.dat"
    answer = request(server, "GET", path, token=alice, headers=[("Range", value)])
    if len(value) > 30_000:
        assert answer.status in (200, 400, 431)
        return
    assert answer.status == status
    if status != 416:
        assert answer.body == (b"\0alice's" * 1000)[begin:end]


@pytest.mark.parametrize(
    "query", ["limit=1000000000000", "limit=-1", "cursor=1e9", "cursor=%00", "limit=" + "9" * 5000]
)
def test_no_list_is_longer_than_a_page(server, alice, query):
    answer = request(server, "GET", f"/api/models?{query}", token=alice)
    assert answer.status == 400 or len(answer.json) <= 1000


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"key":"file"}', b'{"key":"header","value":[]}',
     b'{"key":"x","value":{}}',
     b'{"key":"file","value":{"path":"a","content":"%%%","encoding":"base64"}}',
     b'{"key":"lfsFile","value":{"path":"a","oid":"../../etc/passwd"}}', b"null\n" * 1000],
    ids=lambda body: repr(body)[:24],
)  # fmt: skip
def test_a_commit_that_is_none_changes_nothing(server, alice, repo, body):
    before = head_of(server, "alice/secret", alice)
    answer = post(server, "/api/models/alice/secret/commit/main", body, token=alice)
    assert answer.status == (200 if body == b"" else 400)
    assert head_of(server, "alice/secret", alice) == before


def test_who_did_not_see_the_head_is_told_and_who_sends_a_commit_twice_gets_one(server, alice, repo):
    first = head_of(server, "alice/secret", alice)
    one = commit(server, "alice/secret", alice, ("n.txt", b"1"), parent=first)
    again = commit(server, "alice/secret", alice, ("n.txt", b"1"), parent=first)
    assert one.status == again.status == 200
    assert one.json["commitOid"] == again.json["commitOid"] == head_of(server, "alice/secret", alice)
    assert commit(server, "alice/secret", alice, ("n.txt", b"2"), parent=first).status == 412
    assert post(server, "/api/models/alice/secret/tag/main", {"tag": "t1"}, token=alice).status == 200
    assert post(server, "/api/models/alice/secret/tag/main", {"tag": "t1"}, token=alice).status == 409


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1@evil.example", "", "a" * 300, "[::1", "localhost:x"]
)
def test_a_name_that_is_not_ours_is_not_answered(server, host):
    assert request(server, "GET", "/api/models", host=host or " ").status in (400, 421)


def test_no_other_site_reads_or_shows_what_is_here(server, alice, repo):
    origin = [("Origin", "http://evil.example"), ("Access-Control-Request-Method", "POST")]
    assert request(server, "OPTIONS", "/api/repos/create", headers=origin).status == 405
    sha = head_of(server, "alice/secret", alice)
    answer = request(server, "GET", f"/alice/secret/resolve/{sha}/a.txt", token=alice, headers=origin)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "sandbox" in answer.headers["content-security-policy"]


def test_a_browser_that_knows_a_password_reads_and_never_writes(server, alice, repo):
    basic = [("Authorization", "Basic " + b64encode(f"alice:{alice}".encode()).decode())]
    assert request(server, "GET", "/api/models/alice/secret", headers=basic).status == 200
    assert request(server, "POST", "/api/repos/create", headers=basic, body=b'{"name":"csrf"}').status == 401


def test_it_is_not_reached_from_elsewhere_while_nobody_has_a_token(run, tmp_path):
    refused = run("--store", tmp_path / "store", "serve", "--host", "0.0.0.0", "--port", "0")  # noqa: S104 - refused
    assert refused.code == 5
    assert "user add" in refused.err


def test_links_that_somebody_planted_are_not_followed(tmp_path, alice, server):
    (tmp_path / "store.server").mkdir(mode=0o777)
    (tmp_path / "store.server").chmod(0o777)
    with pytest.raises(RuntimeError, match="others may write to it"), Server(tmp_path / "store"):
        pass
    (tmp_path / "store.server").chmod(0o700)
    (tmp_path / "accounts").write_text('{"format": 1, "tokens": []}')
    (tmp_path / "store.server" / "accounts.json").symlink_to(tmp_path / "accounts")
    with pytest.raises(RuntimeError, match="accounts"), Server(tmp_path / "store"):
        pass


def test_who_dawdles_is_cut_off_and_holds_up_nobody(server, alice):
    """Connections that say nothing, or half a request; meanwhile others are answered at once."""
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    for connection in slow[100:]:
        connection.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
    for _ in range(100):
        assert request(server, "GET", "/api/whoami-v2", token=alice).status == 200
    assert select.select(slow, [], [], 0)[0] == [], "others were answered before these were cut off"
    for connection in slow:
        connection.settimeout(60)
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        connection.close()


def test_pipelined_requests_are_answered_in_order(server, alice):
    one = f"GET /api/whoami-v2 HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {alice}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(one.encode() * 3)
        connection.shutdown(socket.SHUT_WR)
        assert read_answer(connection).status == 200


def test_many_threads_that_hang_in_uploads_leave_reading_alone(server, alice):
    post(server, "/api/repos/create", {"name": "hang"}, token=alice)
    head = f"POST /api/models/alice/hang/commit/main HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {alice}\r\n"
    hung = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(60)]
    for connection in hung:
        connection.sendall((head + "Content-Length: 1000\r\n\r\n{").encode())
    done = threading.Event()
    answers = []

    def read():
        answers.append(request(server, "GET", "/api/whoami-v2", token=alice).status)
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(10)
    assert answers == [200]
    for connection in hung:
        connection.close()


def test_zz_nothing_that_came_out_of_the_server_holds_a_token(server, alice, bob):
    """The last of this file: the whole log, and every file of its state."""
    for path in ("/%1b[31mforged", "/x%0d%0a2026-01-01%20INFO%20forged", "/forged?forged=1"):
        request(server, "GET", path, headers=[("User-Agent", "forged"), ("X-Request-Id", "forged")])
    log = server.log.read_bytes()
    assert b"INFO" in log
    assert b"forged" not in log
    assert not [byte for byte in set(log) if byte < 32 and byte != 10]
    held = [path for path in server.store.with_name("store.server").rglob("*") if path.is_file()]
    for token in (alice, bob, "ticket="):
        assert token.encode() not in log
        assert not [path for path in held if token.encode() in path.read_bytes()]
    assert b"Traceback" not in log
    assert subprocess.run(["grep", "-rlF", alice, server.store], capture_output=True, check=False).stdout == b""
