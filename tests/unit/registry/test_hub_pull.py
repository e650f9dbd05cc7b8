"""Pulls from a hub that answers wrongly in every way we know: the error, its sentence, and a store without traces."""

import contextlib
import json
import socket
import struct
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from loraforge_registry import hub_record as record
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, FormatError, NotFoundError, RemoteError
from loraforge_registry.git import git_id
from loraforge_registry.manifest import encode_manifest
from loraforge_registry.remotes import http
from loraforge_registry.store import Store
from tests.bad_files import config, pair, safetensors_bytes, tensors, write_adapter
from tests.hostile_hub import TOKEN, running_hub

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RESOLVE = r"GET /me/french/resolve/\w+/"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(http, "PAUSES", (0.0,) * 3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which peers' tests set
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with running_hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


@pytest.fixture
def big() -> dict[str, bytes]:
    """An adapter whose weights take many reads; made by nobody who knows of loraforge."""
    weights = {**pair("model.layers.0.q", rank=2, rows=3000, columns=3000), **pair("model.layers.0.v", columns=60)}
    return {CONFIG: json.dumps(config()).encode(), WEIGHTS: safetensors_bytes(weights), "README.md": b"# by hand\n"}


@pytest.fixture
def files() -> dict[str, bytes]:
    return {CONFIG: json.dumps(config()).encode(), WEIGHTS: safetensors_bytes(tensors())}


def left(store: Path) -> list[str]:
    """What a store holds beside its directories."""
    names = [str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()]
    return [name for name in names if name != "FORMAT" and not name.startswith(("locks/", "index"))]


def refused(run, url: str = "hf://me/french", code: int = 5, kind: str = "remote") -> str:
    """Pull what must be refused: one line, the right code and kind, nothing in the store, no token anywhere."""
    ran = run("--json", "pull", url, "--as", "x:v1")
    assert ran.code == code, ran
    error = ran.json["error"]
    assert error["kind"] == kind, error
    assert "\n" not in error["message"]
    assert "Traceback" not in ran.err
    assert TOKEN not in ran.out + ran.err
    store = Store()
    assert left(store.path) == []
    return error["message"]


def test_a_repository_that_peft_made(hub, big, run):
    hub.add("me/french", big)
    first = run("--json", "pull", "hf://me/french").json
    assert (first["name"], first["tag"], first["received"]) == ("french", "latest", sum(map(len, big.values())))
    store = Store()
    stored = store.manifest(Digest.parse(first["digest"]))
    assert {f.path: store.read_file(f, 10**8) for f in stored.files} == big
    hub.requests.clear()
    again = run("--json", "pull", "hf://me/french").json
    assert (again["digest"], again["received"]) == (first["digest"], 0)
    assert hub.count("resolve") == 0


def test_only_missing_files_are_fetched(hub, big, run):
    repo = hub.add("me/french", big)
    run("pull", "hf://me/french")
    repo.commit({**big, "README.md": b"# edited on the hub\n"})
    ran = run("--json", "pull", "hf://me/french").json
    assert (ran["received"], ran["skipped"]) == (20, len(big[WEIGHTS]) + len(big[CONFIG]))


def test_revisions_and_names(hub, files, run):
    repo = hub.add("me/My-French_LoRA", files)
    repo.tags["v1"] = repo.branches["main"]
    other = {**files, WEIGHTS: safetensors_bytes(tensors(0.75))}
    repo.branches["feat/a"] = repo.branches["main"]
    commit = repo.commit(other, "feat/a")
    named = [run("--json", "pull", f"hf://me/My-French_LoRA{at}").json for at in ("@v1", "", f"@{commit}", "@feat/a")]
    assert [(row["name"], row["tag"]) for row in named[:3]] == [
        ("my-french_lora", t) for t in ("v1", "latest", "latest")
    ]
    assert named[0]["digest"] == named[1]["digest"] != named[2]["digest"]
    assert named[3]["error"]["kind"] == "usage"  # feat/a can be no tag here
    assert run("pull", "hf://me/My-French_LoRA@feat/a", "--as", "a:v1").code == 0
    assert run("--json", "pull", f"hf://me/My-French_LoRA@{commit}", "--as", "a:v1").code == 0
    taken = run("--json", "pull", "hf://me/My-French_LoRA", "--as", "a:v1")
    assert (taken.code, taken.json["error"]["kind"]) == (4, "conflict")
    assert run("pull", "hf://me/My-French_LoRA", "--as", "a:v1", "--force").code == 0


def test_to_a_directory(hub, files, run, tmp_path):
    hub.add("me/french", files)
    assert run("pull", "hf://me/french", "--to", tmp_path / "out").code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


CUTS = ["at once", "a reset", "headers", "no body", "8 bytes", "the header", "half", "the last byte"]


def cut(where: str):
    """Answer with the beginning of the right answer, and hang up."""

    def spoiler(handler):
        data = handler.hub.repos["me/french"].head[WEIGHTS]
        header = 8 + int.from_bytes(data[:8], "little")
        sizes = {
            "no body": 0,
            "8 bytes": 8,
            "the header": header,
            "half": len(data) // 2,
            "the last byte": len(data) - 1,
        }
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1])
        if where == "a reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif where == "headers":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Len")
        elif where != "at once":
            part = f"HTTP/1.1 206 OK\r\nContent-Range: bytes {start}-{len(data) - 1}/{len(data)}\r\n"
            handler.wfile.write(part.encode() if start else b"HTTP/1.1 200 OK\r\n")
            handler.wfile.write(f"Content-Length: {len(data) - start}\r\n\r\n".encode())
            handler.wfile.write(data[start : max(start, sizes[where])])
        handler.close_connection = True

    return spoiler


@pytest.mark.parametrize("where", CUTS)
def test_cut_off_for_good(where, hub, big, run):
    hub.add("me/french", big)
    hub.spoil(RESOLVE + WEIGHTS, cut(where))
    refused(run)
    assert hub.count(RESOLVE + WEIGHTS) == http.ATTEMPTS


@pytest.mark.parametrize("where", CUTS)
def test_cut_off_once(where, hub, big, run):
    hub.add("me/french", big)
    hub.spoil(RESOLVE + WEIGHTS, once(cut(where)))
    ran = run("--json", "pull", "hf://me/french").json
    assert ran["received"] == sum(map(len, big.values()))
    assert hub.count(RESOLVE + WEIGHTS) == 2


def test_cut_off_anywhere(hub, files, run, monkeypatch):
    """Hang up behind every byte of a small answer; the second try asks for the rest, and the whole is right."""
    hub.add("me/french", files)
    data = files[WEIGHTS]
    from loraforge_registry.remotes.http import Client

    client = Client(hub.url, TOKEN)
    commit = hub.repos["me/french"].branches["main"]
    for offset in range(len(data)):
        hub._spoilers.clear()
        hub.spoil(
            RESOLVE + WEIGHTS, once(lambda h, n=offset: h.reply(200, data[:n], {"Content-Length": str(len(data))}))
        )
        assert b"".join(map(bytes, client.body(f"/me/french/resolve/{commit}/{WEIGHTS}", len(data)))) == data


def once(spoiler):
    """Spoil the first answer, and none after it."""
    done = []

    def first(handler):
        return False if done else (done.append(1), spoiler(handler))[1]

    return first


def body(change, status: int = 200, **headers: str):
    """Answer with a changed body."""

    def spoiler(handler):
        handler.reply(status, change(handler.hub.repos["me/french"].head[WEIGHTS]), headers)

    return spoiler


def flipped(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def chunked(handler):
    data = handler.hub.repos["me/french"].head[WEIGHTS] + b"more"
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    handler.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
    handler.close_connection = True


BODIES = {
    "another of the same size": (body(flipped), "the bytes that came are"),
    "longer": (body(lambda data: data + b"x"), "where it announced"),
    "shorter": (body(lambda data: data[:-1]), "where it announced"),
    "longer, in chunks": (chunked, "longer than announced"),
    "gzip": (body(lambda data: data, **{"Content-Encoding": "gzip"}), "'gzip'"),
    "206 unasked": (body(lambda data: data, 206), "206"),
    "huge": (body(lambda data: data, **{"Content-Length": str(10**15)}), "where it announced"),
    "an HTML page": (body(lambda _: b"<html>"), "where it announced"),
    "403": (body(lambda _: b"", 403), "not allowed"),
    "500": (body(lambda _: b"", 500), "status 500"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_wrong_body(case, hub, big, run):
    spoiler, said = BODIES[case]
    hub.add("me/french", big)
    hub.spoil(RESOLVE + WEIGHTS, spoiler)
    assert said in refused(run)


@pytest.mark.parametrize("name", [CONFIG, "README.md", "loraforge.json"])
def test_a_small_file_with_other_bytes(name, hub, big, run):
    hub.add("me/french", {**big, "loraforge.json": b"{}"} if name == "loraforge.json" else big)
    data = hub.repos["me/french"].head[name]
    hub.spoil(RESOLVE + name, lambda handler: handler.reply(200, data[:-1] + b"!"))
    kind = ("bad_format", 2) if name == "loraforge.json" else ("remote", 5)
    refused(run, kind=kind[0], code=kind[1])


def test_after_a_break_other_bytes_do_not_count_as_the_rest(hub, big, run):
    hub.add("me/french", big)
    hub.spoil(RESOLVE + WEIGHTS, once(cut("half")))
    hub.spoil(RESOLVE + WEIGHTS, body(lambda data: data))  # a 200 where a 206 was asked for
    assert "cannot go on" in refused(run)


def test_after_a_break_another_part_does_not_count_as_the_rest(hub, big, run):
    """The rest of another file, of another length, or from another byte on."""
    hub.add("me/french", big)
    size = len(big[WEIGHTS])
    for part in (
        f"bytes 5-{size - 1}/{size}",
        f"bytes 0-{size - 1}/{size}",
        "bytes */*",
        "",
        f"bytes 9-{size}/{size + 1}",
    ):
        hub._spoilers.clear()
        hub.spoil(RESOLVE + WEIGHTS, once(cut("half")))
        hub.spoil(RESOLVE + WEIGHTS, body(lambda data: data[len(data) // 2 :], 206, **{"Content-Range": part}))
        assert "cannot go on" in refused(run), part


def test_after_a_break_the_rest_of_another_version_is_refused(hub, big, run):
    repo = hub.add("me/french", big)
    hub.spoil(RESOLVE + WEIGHTS, once(cut("half")))
    hub.spoil(RESOLVE + WEIGHTS, lambda _: (repo.head.update({WEIGHTS: flipped(big[WEIGHTS])}), False)[1])
    assert "the bytes that came are" in refused(run)


def test_a_file_that_is_listed_and_not_there(hub, big, run):
    hub.add("me/french", big)
    hub.spoil(RESOLVE + WEIGHTS, lambda handler: handler.refuse(404, "EntryNotFound"))
    assert "no such file" in refused(run, code=3, kind="not_found")


def slowly(*pieces):
    def spoiler(handler):
        with contextlib.suppress(OSError):
            for piece in pieces:
                handler.wfile.write(piece)
                handler.wfile.flush()
                time.sleep(0.01)
        handler.close_connection = True

    return spoiler


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200 OK\r\n", *[b"X"] * 50],
        [*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 50],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"0"] * 50],
    ],
    ids=["headers", "continue", "chunks"],
)
@pytest.mark.parametrize("what", ["revision", "resolve"])
def test_a_hub_that_trickles_before_a_body(hub, big, run, monkeypatch, pieces, what):
    monkeypatch.setattr(http, "GRACE", 0.05)
    monkeypatch.setattr(http, "LEAST_RATE", 10**9)
    hub.add("me/french", big)
    hub.spoil(f"GET .*/{what}", slowly(*pieces))
    assert "gave up" in refused(run)


@pytest.mark.parametrize(
    ("asked", "waited"),
    [
        ("2", 2),
        ("999999999", 20),
        ("-5", 0.1),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 0.1),
        ("nan", 0.1),
        ("", 0.1),
        ("٣", 0.1),
    ],
)
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_how_long_a_hub_may_make_one_wait(hub, files, run, monkeypatch, asked, waited, status):
    slept = []
    monkeypatch.setattr(http, "PAUSES", (0.1,) * 3)
    monkeypatch.setattr(http, "time", SimpleNamespace(sleep=slept.append, monotonic=time.monotonic))
    hub.add("me/french", files)
    headers = {"Retry-After": asked.encode().decode("latin-1")}
    hub.spoil("GET /api/models/me/french/revision", lambda handler: handler.reply(status, headers=headers))
    assert f"status {status}" in refused(run)
    assert slept == [waited] * 3


PRIVATE = ["127.0.0.1", "localhost", "169.254.169.254", "10.0.0.7", "192.168.1.1", "0x7f000001", "2130706433", "[::1]",
           "[fe80::1]", "[::ffff:169.254.169.254]", "0.0.0.0", "inside.example"]  # noqa: S104  # fmt: skip


@pytest.mark.parametrize("host", [*PRIVATE, "93.184.216.34", "blobs.example"])
def test_a_hub_outside_leads_nobody_inside(host, monkeypatch):
    names = {"hub.example": "93.184.216.34", "blobs.example": "93.184.216.35", "inside.example": "10.0.0.8"}
    found = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *rest: found(names.get(name, name), *rest))
    client, target = http.Client("https://hub.example", TOKEN), f"https://{host}/latest/meta-data"
    if host in PRIVATE:
        with pytest.raises(RemoteError, match="of this machine or network"):
            client._next("https://hub.example/x", target)
    else:
        assert client._next("https://hub.example/x", target) == target
    assert http.Client("https://inside.example", TOKEN)._next("https://inside.example/x", target) == target


def test_cookies_links_and_realms_are_nothing_to_it(hub, big, run):
    """A hub sets a cookie, names a next page elsewhere, and asks for a password: nobody comes."""
    hub.add("me/french", big)
    cookies = []
    with running_hub() as other:

        def adorn(handler):
            cookies.append(handler.headers.get("Cookie"))
            end = handler.end_headers

            def with_more():
                handler.send_header("Set-Cookie", "id=1; Path=/")
                handler.send_header("Link", f'<{other.url}/next>; rel="next"')
                handler.send_header("WWW-Authenticate", f'Bearer realm="{other.url}/token"')
                end()

            handler.end_headers = with_more
            return False

        hub.spoil(".", adorn)
        assert run("pull", "hf://me/french").code == 0
        assert run("search", "french", "--on", "hf://").code == 0
        hub.spoil("revision", lambda handler: handler.reply(401))
        assert run("pull", "hf://me/french").code == 5
        assert (set(cookies), other.requests) == ({None}, [])


def test_what_a_hub_says_is_shown_harmless(hub, files, run):
    hub.add("me/french", files)
    hub.spoil("revision", lambda handler: handler.refuse(403, "x", "\x1b[31m\x07" + "a" * 5000 + "\x9b2J"))
    ran = run("pull", "hf://me/french")
    assert (ran.code, ran.err.count("\n")) == (5, 1)
    assert not [c for c in ran.err[:-1] if not c.isprintable()]
    assert len(ran.err) < 1000


def test_a_hub_that_stalls(hub, big, run, monkeypatch):
    monkeypatch.setattr(http, "TIMEOUT", 0.1)
    hub.add("me/french", big)

    def stall(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Len")
        handler.wfile.flush()
        time.sleep(0.4)
        handler.close_connection = True

    hub.spoil(RESOLVE + WEIGHTS, stall)
    assert "no answer for" in refused(run)


def test_a_hub_that_trickles(hub, big, run, monkeypatch):
    monkeypatch.setattr(http, "GRACE", 0.05)
    monkeypatch.setattr(http, "LEAST_RATE", 10**9)
    hub.add("me/french", big)

    def trickle(handler):
        data = handler.hub.repos["me/french"].head[WEIGHTS]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        with contextlib.suppress(OSError):
            for byte in data[:60]:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(0.005)
        handler.close_connection = True

    hub.spoil(RESOLVE + WEIGHTS, trickle)
    assert "gave up" in refused(run)


def redirect(location: str, status: int = 302):
    return lambda handler: handler.reply(status, headers={"Location": location.replace("{here}", handler.path)})


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("{here}", "redirects more than"),
        ("file:///etc/passwd", "not followed"),
        ("ftp://example.invalid/x", "not followed"),
        ("", "not followed"),
        ("http://[", "no address"),
        ("http://127.0.0.1:1/x", "cannot be reached"),
    ],
)
def test_redirects_that_are_not_followed(location, said, hub, big, run):
    hub.add("me/french", big)
    hub.spoil(RESOLVE + WEIGHTS, redirect(location))
    assert said in refused(run)


def test_a_redirect_to_another_host_takes_the_bytes_but_not_the_token(hub, big, run):
    hub.add("me/french", big)
    with running_hub() as other:
        other.spoil("GET /blob", lambda handler: handler.send_file(big[WEIGHTS], "0" * 40, WEIGHTS))
        hub.spoil(RESOLVE + WEIGHTS, redirect(f"{other.url}/blob?signed=1"))
        assert run("pull", "hf://me/french").code == 0
        assert other.tokens == [("/blob?signed=1", "")]
    assert {token for path, token in hub.tokens} == {f"Bearer {TOKEN}"}


def test_a_redirect_on_the_same_host_keeps_the_token(hub, big, run):
    hub.add("me/french", big, private=True)
    hub.spoil(r"/main/", redirect("{here}"))
    hub.spoil(RESOLVE + WEIGHTS, redirect("/elsewhere", 307))
    hub.spoil("GET /elsewhere", lambda handler: handler.send_file(big[WEIGHTS], "0" * 40, WEIGHTS))
    assert run("pull", "hf://me/french").code == 0
    assert ("/elsewhere", f"Bearer {TOKEN}") in hub.tokens


def test_a_branch_that_moves_meanwhile(hub, big, run):
    repo = hub.add("me/french", big)
    hub.spoil(RESOLVE, lambda _: (repo.commit({**big, WEIGHTS: flipped(big[WEIGHTS])}), False)[1])
    got = run("--json", "pull", "hf://me/french").json
    stored = Store().manifest(Digest.parse(got["digest"])).file(WEIGHTS)
    assert stored.digest == Digest.of(big[WEIGHTS]) != Digest.of(repo.head[WEIGHTS])


def changed(**changes):
    """Answer the question for a repository with other fields."""

    def spoiler(handler):
        repo = handler.hub.repos["me/french"]
        rows = [
            {"rfilename": name, "size": len(data), "blobId": git_id([data], len(data))}
            for name, data in repo.head.items()
        ]
        handler.reply_json({"sha": repo.branches["main"], "siblings": rows, **changes})

    return spoiler


ROW = {"rfilename": CONFIG, "size": 3, "blobId": "a" * 40}
INFOS = {
    "a path as commit": (changed(sha="../../../etc"), "as a commit"),
    "a long commit": (changed(sha="a" * 64), "as a commit"),
    "no commit": (changed(sha=None), "as sha"),
    "siblings is a map": (changed(siblings={}), "something else than a list"),
    "siblings are numbers": (changed(siblings=[1]), "something else than a list"),
    "a name is a number": (changed(siblings=[{**ROW, "rfilename": 5}]), "as rfilename"),
    "one name twice": (changed(siblings=[ROW, ROW]), "stands twice"),
    "a size below zero": (changed(siblings=[{**ROW, "size": -1}]), "as a size"),
    "a huge size": (changed(siblings=[{**ROW, "size": 10**30}]), "as a size"),
    "a size that is true": (changed(siblings=[{**ROW, "size": True}]), "as a size"),
    "no hash": (changed(siblings=[{**ROW, "blobId": None}]), "no hash"),
    "a path as oid": (changed(siblings=[{**ROW, "lfs": {"sha256": "../" * 20}}]), "no digest"),
    "a line break in the oid": (changed(siblings=[{**ROW, "lfs": {"sha256": "a" * 64 + "\n"}}]), "no digest"),
    "too many files": (changed(siblings=[ROW] * 10_001), "the limit is"),
    "a list": (lambda handler: handler.reply_json([]), "something else"),
    "HTML": (lambda handler: handler.reply(200, b"<html>sign in</html>"), "no document"),
    "deep": (lambda handler: handler.reply(200, b"[" * 100_000), "no document"),
    "a huge number": (lambda handler: handler.reply(200, b"9" * 5000), "no document"),
    "NaN": (lambda handler: handler.reply(200, b"NaN"), "no document"),
    "a huge document": (lambda h: h.reply(200, b"{}", {"Content-Length": str(10**12)}), "where at most"),
    "an endless one": (lambda h: h.reply(200, b" " * (17 * 2**20), {"Content-Length": "-"}), "where they make no"),
    "gzip": (lambda handler: handler.reply(200, b"", {"Content-Encoding": "gzip"}), "'gzip'"),
    "hung up": (lambda handler: handler.wfile.write(b""), ""),
    "no HTTP": (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n"), ""),
    "500": (lambda handler: handler.reply(500), "status 500"),
    "429": (lambda handler: handler.reply(429, headers={"Retry-After": "999999"}), "status 429"),
    "a loop": (redirect("{here}"), "redirects more than"),
    "a teapot": (lambda handler: handler.reply(418), "answered 418"),
    "the token, back": (lambda h: h.refuse(403, "x", f"bad {h.headers['Authorization']}"), "<token>"),
    "gated": (lambda handler: handler.refuse(403, "GatedRepo"), "must be asked for"),
    "token expired": (lambda handler: handler.reply(401), "does not accept the token"),
}


@pytest.mark.parametrize("case", INFOS)
def test_a_wrong_description(case, hub, files, run, monkeypatch):
    spoiler, said = INFOS[case]
    monkeypatch.setattr(http, "LONGEST_PAUSE", 0.0)
    hub.add("me/french", files)
    hub.spoil("GET /api/models/me/french/revision", spoiler)
    assert said in refused(run)


def test_a_short_trouble_is_waited_out(hub, files, run):
    hub.add("me/french", files)
    hub.spoil("GET /api/models/me/french/revision", once(lambda handler: handler.reply(503)))
    assert run("pull", "hf://me/french").code == 0


REPOS = {
    "pickle": ({CONFIG: b"{}", "adapter_model.bin": b"\x80"}, "a pickle, which can run code"),
    "pickle, says how": ({CONFIG: b"{}", "adapter_model.bin": b"\x80"}, "safe_serialization=True"),
    "a whole model": ({"config.json": b"{}", "model.safetensors": b""}, "whole model"),
    "empty": ({".gitattributes": b""}, "no PEFT adapter"),
    "no config": ({WEIGHTS: b""}, "no adapter_config.json"),
    "one level down": ({f"a/b/{WEIGHTS}": b"", f"a/b/{CONFIG}": b""}, "in a/b/"),
    "case": ({"ADAPTER_CONFIG.json": b"{}", WEIGHTS: b""}, "must be called"),
    "a pickle by another name": ({CONFIG: json.dumps(config()).encode(), WEIGHTS: b"\x80\x04" * 40}, "pickle"),
    "an unsafe key": (
        {
            CONFIG: json.dumps(config()).encode(),
            WEIGHTS: safetensors_bytes({**tensors(), "base_model.model.lm_head.weight": ("F32", (1,), b"0000")}),
        },
        "lm_head",
    ),
    "code": ({CONFIG: json.dumps(config(peft_type="EVIL")).encode(), WEIGHTS: b""}, "EVIL"),
    "a config that is too large": ({CONFIG: b" " * (2**20 + 1), WEIGHTS: safetensors_bytes(tensors())}, "the limit is"),
}


@pytest.mark.parametrize("case", REPOS)
def test_what_is_no_adapter_that_may_be_stored(case, hub, run):
    files, said = REPOS[case]
    hub.add("me/french", files)
    assert said in refused(run, code=2, kind="bad_format")


def test_names_of_files_are_never_paths(hub, files, run, tmp_path):
    evil = {
        "../../x": b"evil",
        "/etc/x": b"evil",
        ".git/hooks/post-checkout": b"evil",
        "a\nb": b"evil",
        "C:\\x": b"evil",
    }
    hub.add("me/french", {**files, **evil})
    assert run("pull", "hf://me/french").code == 0
    everything = [path.read_bytes() for path in tmp_path.parent.rglob("*") if path.is_file()]
    assert b"evil" not in everything
    assert hub.count("evil|hooks|etc") == 0


def test_who_is_not_there_and_who_may_not(hub, files, run, monkeypatch):
    hub.add("me/french", files, private=True)
    assert "no such repository" in refused(run, "hf://me/other", 3, "not_found")
    assert "no such tag" in refused(run, "hf://me/french@v9", 3, "not_found")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(run, "hf://me/french", 3, "not_found")
    assert {token for _, token in hub.tokens[-1:]} == {""}


def test_nobody_there(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert "cannot be reached: Connection refused" in refused(run)
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    assert "cannot be reached" in refused(run)
    monkeypatch.setenv("HF_ENDPOINT", "http://user:secret@127.0.0.1:1")
    assert "secret" not in refused(run)


URLS = {
    "hf://": "is not hf://ORG/REPO",
    "hf://me": "is not hf://ORG/REPO",
    "hf://me/a/b": "is not hf://ORG/REPO",
    "hf://../x": "is not hf://ORG/REPO",
    "hf://me/..": "is not hf://ORG/REPO",
    "hf://me/a%2f..": "is not hf://ORG/REPO",
    "hf://me/french@": "is not a revision",
    "hf://me/french@../x": "is not a revision",
    "hf://me/french@a b": "is not a revision",
    "hf:/me/french": "did you mean hf://?",
    "HF://me/french": "did you mean hf://?",
    "hff://me/french": "did you mean hf://?",
    "fil:///tmp/x": "did you mean file://?",
    "s3://bucket/x": "is no remote",
    "https://huggingface.co/me/french/tree/main": "write hf://me/french",
    "file://tmp/x": "third slash",
    "file:///tmp?x": "is not file:///DIR",
    "http://user:secret@host/x": "//...@",
}


@pytest.mark.parametrize("url", URLS)
def test_urls_that_are_none(url, run, tmp_path):
    for command in (["pull", url, "--as", "x"], ["push", write_adapter(tmp_path / "a"), "x", "--to", url]):
        ran = run("--json", *command)
        assert (ran.code, ran.json["error"]["kind"]) == (2, "bad_reference"), ran
        assert URLS[url] in ran.json["error"]["message"]
        assert "secret" not in ran.out
    assert run("--json", "ls").json == []  # the push stored nothing


def test_errors_are_what_they_are():
    assert issubclass(RemoteError, ConnectionError)
    for kind in (RemoteError, ConflictError, NotFoundError, FormatError):
        assert str(kind("a sentence")) == "a sentence"


# loraforge.json, as a stranger may have written it


@pytest.fixture
def pushed(hub, run, tmp_path):
    """An adapter with a parent, on the hub."""
    for name, value in (("a", 0.5), ("b", 0.75)):
        run("push", write_adapter(tmp_path / name, weights=tensors(value)), f"{name}:v1")
    run("compose", "a:v1=0.5", "b:v1=0.5", "--as", "french:v1")
    assert run("push", "french:v1", "--to", "hf://me/french").code == 0
    return hub.repos["me/french"]


def edit(repo, change) -> None:
    fields = json.loads(repo.head[record.RECORD_FILE])
    change(fields)
    repo.commit({**repo.head, record.RECORD_FILE: json.dumps(fields).encode()})


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "elsewhere"))


def test_the_same_artifact_comes_back(pushed, run, monkeypatch, tmp_path):
    here = run("--json", "show", "french:v1").json
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "elsewhere"))
    there = run("--json", "pull", "hf://me/french@v1").json
    assert {key: there[key] for key in here} == here
    assert there["missing"] == here["parents"] != []
    data = pushed.head[record.RECORD_FILE]
    assert record.encode_record(record.decode_record(data)) == data


def test_lies_are_refused(pushed, elsewhere, run):
    def parent(fields):
        fields["derivation"]["operation"] = "trained with love"

    def tensor(fields):
        next(iter(fields["tensors"].values()))["digest"] = "blake3:" + "0" * 64

    def algorithm(fields):
        row = next(iter(fields["tensors"].values()))
        row["digest"] = row["digest"].replace("blake3", "sha256")

    def unknown(fields):
        fields["run"] = "rm -rf"

    def newer(fields):
        fields["schema"] = "loraforge.hub/2"

    def path(fields):
        fields["files"]["../../x"] = fields["files"][CONFIG]

    whole = pushed.head
    for change in (parent, tensor, algorithm, unknown, newer, path):
        pushed.commit(whole)
        edit(pushed, change)
        assert record.RECORD_FILE in refused(run, code=2, kind="bad_format"), change
    for data in (b"", b"[]", b"{}", b"null", b"{" * 99, b'{"schema": 1, "schema": 1}', b"\xff"):
        pushed.commit({**whole, record.RECORD_FILE: data})
        assert record.RECORD_FILE in refused(run, code=2, kind="bad_format"), data


def test_a_consistent_lie_about_tensors_is_found_in_the_bytes(pushed, elsewhere, run):
    found = record.decode_record(pushed.head[record.RECORD_FILE])
    manifest = found.manifest
    lied = replace(manifest, content_id=Digest.of(b"something else"))
    digest = Digest.of(encode_manifest(lied))
    data = record.encode_record(replace(found, digest=digest, manifest=lied))
    pushed.commit({**pushed.head, record.RECORD_FILE: data})
    assert "its files make the artifact" in refused(run, code=2, kind="bad_format")


def test_one_about_other_files_does_not_count(pushed, elsewhere, run):
    pushed.commit({**pushed.head, WEIGHTS: flipped(pushed.head[WEIGHTS])})
    ran = run("--json", "pull", "hf://me/french")
    assert ran.code == 0
    assert ran.json["derivation"] is None
    assert "is about other files" in ran.err


def test_a_huge_one_is_not_read(pushed, elsewhere, hub, run, monkeypatch):
    monkeypatch.setattr("loraforge_registry.remotes.hub.MAX_RECORD", 100)
    hub.requests.clear()
    assert "the limit is" in refused(run, code=2, kind="bad_format")
    assert hub.count("resolve") == 0


def test_parents_among_the_tags_come_along(pushed, elsewhere, hub, run, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "default-store"))
    assert run("push", "a:v1", "--to", "hf://me/french@first").code == 0
    assert run("push", "french:v1", "--to", "hf://me/french@second").code == 0
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "elsewhere"))
    ran = run("--json", "pull", "hf://me/french@second", "--with-lineage")
    assert len(ran.json["missing"]) == 1
    assert "which the remote does not have" in ran.err
    assert Store().has(Digest.parse(ran.json["parents"][0]))
