"""Requests byte by byte, as no client library would send them."""

import json
import re
import socket
from base64 import b64encode
from dataclasses import dataclass

from tests import canary


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


def send(server, data, *, timeout=20):
    """Send bytes, and return all that comes back until the server closes or the answer is whole."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as connection:
        connection.sendall(data)
        return read_answer(connection)


def read_answer(connection, *, head=False):
    got = b""
    while b"\r\n\r\n" not in got:
        piece = connection.recv(65536)
        if not piece:
            return Answer(0, {}, got)
        got += piece
    start, _, body = got.partition(b"\r\n\r\n")
    lines = start.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    length = int(headers.get("content-length", -1))
    while not head and (length < 0 or len(body) < length):
        piece = connection.recv(65536)
        if not piece:
            break
        body += piece
    canary.look("an answer of the server", start, body)
    return Answer(int(re.match(r"HTTP/1.1 (\d+)", lines[0])[1]), headers, body)


def request(server, method, path, *, token=None, headers=(), body=b"", host=None):
    """An ordinary request."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host or f'127.0.0.1:{server.port}'}", "Connection: close"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    lines += [f"{name}: {value}" for name, value in headers]
    if body or method in ("POST", "PUT"):
        lines.append(f"Content-Length: {len(body)}")
    data = "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(data)
        return read_answer(connection, head=method == "HEAD")


def post(server, path, value, *, token=None, method="POST"):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return request(server, method, path, token=token, body=body, headers=[("Content-Type", "application/json")])


def commit(server, repo, token, *operations, parent=None, branch="main"):
    """Commit ``(path, bytes)``, ``(path, oid, size)`` or ``path`` (to delete)."""
    lines = [{"key": "header", "value": {"summary": "test", "description": "", "parentCommit": parent}}]
    for operation in operations:
        if isinstance(operation, str):
            lines.append({"key": "deletedFile", "value": {"path": operation}})
        elif len(operation) == 2:
            path, data = operation
            content = b64encode(data).decode()
            lines.append({"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}})
        else:
            path, oid, size = operation
            lines.append({"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid, "size": size}})
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    return post(server, f"/api/models/{repo}/commit/{branch}", body, token=token)


def upload(server, repo, token, data, oid):
    """Ask where to send a file by LFS, and send it there."""
    listed = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": len(data)}]}
    said = post(server, f"/{repo}.git/info/lfs/objects/batch", listed, token=token).json["objects"][0]
    if "actions" not in said:
        return None
    where = said["actions"]["upload"]["href"].partition(f":{server.port}")[2]
    return request(server, "PUT", where, body=data)
