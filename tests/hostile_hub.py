"""A hub of 250 lines that keeps everything in memory: what the real clients ask for, and every way to answer wrongly.

``hub.spoil(pattern, spoiler)`` lets a function answer the requests whose line matches; it may answer with anything, or
change something first and return False, and the right answer follows.
"""

import base64
import hashlib
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from loraforge_registry.git import git_id
from tests import canary

TOKEN = f"hf_{canary.CANARY}"

Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: commits are whole sets of files."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make a commit on top of a branch, with these files and no others."""
        body = json.dumps([len(self.commits), self.branches.get(branch), sorted(map(repr, files.items()))])
        commit = hashlib.sha1(body.encode()).hexdigest()  # noqa: S324 - as git does
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    @property
    def head(self) -> Files:
        return self.commits[self.branches["main"]]

    def find(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)


class Hub:
    """The state of a hub, what it was asked, and what it is to answer wrongly."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.tokens: list[tuple[str, str]] = []
        self.uploaded = 0
        self.port = 0
        self.scheme = "http"
        self._spoilers: list[tuple[re.Pattern[str], Callable[[Handler], object]]] = []

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def add(self, name: str, files: Mapping[str, bytes], *, private: bool = False) -> Repo:
        self.repos[name] = Repo(private=private)
        self.repos[name].commit(files)
        return self.repos[name]

    def spoil(self, pattern: str, spoiler: Callable[["Handler"], object]) -> None:
        self._spoilers.append((re.compile(pattern), spoiler))

    def spoiled(self, handler: "Handler") -> bool:
        line = f"{handler.command} {handler.path}"
        return any(pattern.search(line) and spoiler(handler) is not False for pattern, spoiler in self._spoilers)

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.requests)


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def sibling(name: str, data: bytes) -> dict[str, object]:
    row: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_id([data], len(data))}
    if is_lfs(name):
        row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return row


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ssl.SSLError):
            self.close_connection = True

    def answer(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        self.hub.tokens.append((self.path, self.headers.get("Authorization", "")))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunked()
        if not self.hub.spoiled(self):
            self._route()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 - as the library wants them

    def _chunked(self) -> bytes:
        data = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            data += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return data

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value != "-":
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = True

    def reply_json(self, value: object, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, said: str = "no") -> None:
        self.reply(status, b'{"error": "no"}', {"X-Error-Code": code, "X-Error-Message": said})

    @property
    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _route(self) -> None:
        path = urlsplit(self.path).path
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, path):
                return method(self, *map(unquote, found.groups()))
        return self.refuse(404, "EntryNotFound")

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.allowed):
            self.refuse(404 if self.allowed else 401, "RepoNotFound")
            return None
        return repo

    def models(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        found = [name for name in self.hub.repos if query["search"][0] in name]
        tags = ["peft", "base_model:adapter:acme/base", "base_model:acme/base"]
        self.reply_json([{"id": name, "tags": tags, "downloads": 7} for name in found])

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name.startswith("others/"):
            return self.refuse(403, "Forbidden", "you may not write here")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.reply_json({"url": f"{self.hub.url}/{name}"})

    def info(self, name: str, revision: str = "main") -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.find(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        siblings = [sibling(path, data) for path, data in sorted(repo.commits[commit].items())]
        return self.reply_json({"id": name, "sha": commit, "siblings": siblings, "private": repo.private})

    def refs(self, name: str) -> None:
        repo = self._repo(name)
        if repo is not None:
            rows = {
                kind: [{"name": n, "ref": f"refs/{n}", "targetCommit": c} for n, c in found.items()]
                for kind, found in (("branches", repo.branches), ("tags", repo.tags))
            }
            self.reply_json({**rows, "converts": [], "pullRequests": []})

    def tag(self, name: str, revision: str) -> None:
        repo = self.hub.repos[name]
        if self.command == "DELETE":
            del repo.tags[revision]
        else:
            repo.tags[json.loads(self.body)["tag"]] = repo.find(revision) or ""
        self.reply(200)

    def preupload(self, _name: str, _revision: str) -> None:
        asked = json.loads(self.body)["files"]
        modes = [(row["path"], "lfs" if is_lfs(row["path"]) else "regular") for row in asked]
        self.reply_json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})

    def batch(self, _name: str) -> None:
        objects = []
        for row in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{row['oid']}"}}
            have = row["oid"] in self.hub.lfs
            objects.append({"oid": row["oid"], "size": row["size"], **({} if have else {"actions": upload})})
        self.reply_json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.reply(400)
        self.hub.uploaded += len(self.body)
        self.hub.lfs[oid] = self.body
        return self.reply(200)

    def commit(self, name: str, branch: str) -> None:
        repo = self.hub.repos[name]
        files, parent = dict(repo.commits[repo.branches[branch]]), None
        for line in self.body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "header":
                parent = value.get("parentCommit")
            elif row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        if parent not in (None, repo.branches[branch]):
            return self.reply_json({"error": "A commit has happened since."}, 412)
        commit = repo.commit(files, branch)
        return self.reply_json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.find(revision)
        if commit is None or path not in repo.commits[commit]:
            return self.refuse(404, "EntryNotFound" if commit else "RevisionNotFound")
        return self.send_file(repo.commits[commit][path], commit, path)

    def send_file(self, data: bytes, commit: str, path: str) -> None:
        etag = hashlib.sha256(data).hexdigest() if is_lfs(path) else git_id([data], len(data))
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.reply(206, data[start:], headers)
        return self.reply(200, data, headers)


_NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("/api/models", Handler.models),
    ("/api/validate-yaml", lambda handler: handler.reply_json({"errors": [], "warnings": []})),
    ("/api/repos/create", Handler.create),
    (f"/api/models/{_NAME}/refs", Handler.refs),
    (f"/api/models/{_NAME}/revision/([^/]+)", Handler.info),
    (f"/api/models/{_NAME}/tag/([^/]+)", Handler.tag),
    (f"/api/models/{_NAME}/preupload/([^/]+)", Handler.preupload),
    (f"/api/models/{_NAME}/commit/([^/]+)", Handler.commit),
    (f"/api/models/{_NAME}", Handler.info),
    (f"/{_NAME}\\.git/info/lfs/objects/batch", Handler.batch),
    ("/lfs/([0-9a-f]{64})", Handler.put),
    (f"/{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def running_hub(tls: ssl.SSLContext | None = None) -> Iterator[Hub]:
    """Serve a hub on a port of its own."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    if tls is not None:
        hub.scheme = "https"
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
