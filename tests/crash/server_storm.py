"""64 readers, and 16 pushers that race for tags, while the server is killed and started: what was acknowledged stays.

    python -m tests.crash.server_storm [--seconds 60] [--readers 64] [--pushers 16]

Every pusher keeps what the server acknowledged: commits, and tags that it won. At the end, with the server started once
more: each such commit is in the history of its branch, each tag was won by one and means its commit, each file has its
bytes, fsck finds the store whole, and no log or file holds a token. Readers hash every byte; what is timed is the
description of a revision. Meanwhile others dawdle: they say nothing, half a header, or a body a byte a second.
"""

import argparse
import hashlib
import http.client
import json
import random
import secrets
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests import canary
from tests.hub import Server
from tests.server.raw import commit, post, request, upload

TROUBLE = (OSError, http.client.HTTPException, ValueError, KeyError)
REPOS = 4


@dataclass
class Seen:
    """What all clients saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    commits: list = field(default_factory=list)  # repo, commit id, path, sha256
    tags: dict = field(default_factory=dict)  # (repo, tag): [commit ids that won it]
    times: list = field(default_factory=list)
    wrong: list = field(default_factory=list)
    reads: int = 0
    cut: int = 0


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--readers", type=int, default=64)
    parser.add_argument("--pushers", type=int, default=16)
    parser.add_argument("--dawdlers", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        seen, kills, faults = storm(Path(folder) / "store", options)
    times = sorted(seen.times)
    p99 = times[len(times) * 99 // 100] if times else 0.0
    print(
        f"{len(seen.commits)} commits and {sum(map(len, seen.tags.values()))} tags acknowledged, {seen.reads} reads, "
        f"{seen.cut} requests cut off by {kills} kills, {len(seen.wrong)} wrong bytes, p99 of small reads {p99:.3f} s"
    )
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


def storm(path, options):
    seen, stop, up = Seen(), threading.Event(), threading.Event()
    server = Server(path)
    server.start()
    token = server.add_user("me")
    for number in range(REPOS):
        assert post(server, "/api/repos/create", {"name": f"r{number}"}, token=token).status == 200
    up.set()
    workers = [threading.Thread(target=_push, args=(server, token, seen, stop, up, n)) for n in range(options.pushers)]
    workers += [threading.Thread(target=_read, args=(server, seen, stop, up, n)) for n in range(options.readers)]
    workers.append(threading.Thread(target=_dawdle, args=(server, stop, up, options.dawdlers)))
    for worker in workers:
        worker.start()
    kills = _kill_now_and_then(server, up, options)
    stop.set()
    for worker in workers:
        worker.join()
    faults = [*map(str, seen.wrong), *_check(server, token, seen)]
    server.stop()
    faults += [f"a token got out: {place}" for place in canary.places(path.parent)]
    return seen, kills, faults + _fsck(path)


def _kill_now_and_then(server, up, options):
    rng, kills = random.Random(options.seed), 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        time.sleep(min(rng.uniform(2, 6), max(end - time.monotonic(), 0)))
        if time.monotonic() < end:
            up.clear()
            server.kill()
            server.start()
            up.set()
            kills += 1
    return kills


def _push(server, token, seen, stop, up, number):
    rng = random.Random(number)
    while not stop.is_set():
        up.wait(10)
        repo = f"me/r{rng.randrange(REPOS)}"
        data = b"\0" + secrets.token_bytes(rng.choice((2000, 40_000, 900_000)))
        oid, path = hashlib.sha256(data).hexdigest(), f"f{number}-{rng.randrange(5)}.dat"
        try:
            sent = upload(server, repo, token, data, oid)
            if sent is not None and sent.status != 200:
                continue
            made = commit(server, repo, token, (path, oid, len(data)))
            if made.status != 200:
                continue
            new = made.json["commitOid"]
            with seen.lock:
                seen.commits.append((repo, new, path, oid))
            tag = f"t{rng.randrange(1000)}"
            won = post(server, f"/api/models/{repo}/tag/{new}", {"tag": tag}, token=token).status
            if won == 200:
                with seen.lock:
                    seen.tags.setdefault((repo, tag), []).append(new)
        except TROUBLE:
            with seen.lock:
                seen.cut += 1


def _read(server, seen, stop, up, number):
    rng = random.Random(1000 + number)
    while not stop.is_set():
        up.wait(10)
        with seen.lock:
            known = rng.choice(seen.commits) if seen.commits else None
        if known is None:
            time.sleep(0.05)
            continue
        repo, sha, path, oid = known
        try:
            begin = time.monotonic()
            info = request(server, "GET", f"/api/models/{repo}/revision/{sha}")
            small = time.monotonic() - begin
            got = request(server, "GET", f"/{repo}/resolve/{sha}/{path}")
        except TROUBLE:
            with seen.lock:
                seen.cut += 1
            continue
        with seen.lock:
            seen.reads += 1
            if info.status == 200:
                seen.times.append(small)
            whole = got.status == 200 and len(got.body) == int(got.headers["content-length"])
            if whole and hashlib.sha256(got.body).hexdigest() != oid:
                seen.wrong.append(known)
            if 400 <= got.status < 500:
                seen.wrong.append((*known, got.status))


def _dawdle(server, stop, up, count):
    begins = (
        b"",
        b"GET / HTTP/1.1\r\nX: ",
        b"POST /api/validate-yaml HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999\r\n\r\n",
    )
    held = {}
    while not stop.is_set():
        up.wait(10)
        for number in range(count):
            try:
                if number in held:
                    held[number].sendall(b"x" if number % len(begins) else b"")
                else:
                    held[number] = socket.create_connection(("127.0.0.1", server.port), timeout=1)
                    held[number].sendall(begins[number % len(begins)])
            except OSError:
                if number in held:
                    held.pop(number).close()
        stop.wait(1)
    for connection in held.values():
        connection.close()


def _check(server, token, seen):
    for number in range(REPOS):
        repo = f"me/r{number}"
        history, page = set(), 0
        while found := request(server, "GET", f"/api/models/{repo}/commits/main?p={page}").json:
            history |= {entry["id"] for entry in found}
            page += 1
        yield from (f"lost: {c}" for c in seen.commits if c[0] == repo and c[1] not in history)
        refs = request(server, "GET", f"/api/models/{repo}/refs").json
        tags = {entry["name"]: entry["targetCommit"] for entry in refs["tags"]}
        for (where, tag), winners in seen.tags.items():
            if where == repo and (len(winners) != 1 or tags.get(tag) != winners[0]):
                yield f"tag {tag} of {repo} was won by {winners}, and means {tags.get(tag)}"
    for repo, sha, path, oid in random.Random(1).sample(seen.commits, min(200, len(seen.commits))):
        got = request(server, "GET", f"/{repo}/resolve/{sha}/{path}")
        if hashlib.sha256(got.body).hexdigest() != oid:
            yield f"wrong bytes: {repo} {sha} {path}"
    made = request(server, "GET", "/api/models", token=token).json
    if len(made) != REPOS:
        yield f"{len(made)} repositories of {REPOS}"


def _fsck(path):
    from loraforge_registry.store import Store

    report = Store(path).fsck(deep=True)
    return [json.dumps([problem.kind, problem.place, problem.said]) for problem in report.problems if problem.is_damage]


if __name__ == "__main__":
    sys.exit(main())
