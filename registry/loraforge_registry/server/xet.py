"""The half of Xet that writes: since 1.20 the Hub's clients send large files in no other way, unless they are told to.

Every token gets a place of its own: a client remembers what it sent to one, and would not send it again after it was
taken away. A file is rebuilt when its shard comes, and stored under the SHA-256 of its bytes. Nothing here is ever read
by clients: downloads stay plain HTTP.
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from starlette.responses import JSONResponse, Response

from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError, StoreError
from loraforge_registry.server import repos, xorbs
from loraforge_registry.server.api import known
from loraforge_registry.server.call import Call
from loraforge_registry.server.errors import RefusedError, bad_request, too_large
from loraforge_registry.server.hub import Hub

LIFETIME = 12 * 3600
REBUILT = 600.0  # seconds that xorbs stay: a client may send several shards of one upload
_DONE = "done"
_HASH = re.compile(r"[0-9a-f]{64}")


def write_token(hub: Hub, call: Call) -> Response:
    """GET /api/models/{id}/xet-write-token/{rev}: the body is what hf_xet reads, the headers what Python does."""
    user = known(call)
    repository = repos.find_to_write(hub, call.segments["id"], user)
    clean(hub)
    place = secrets.token_hex(16)
    token = hub.signer.sign("cas", {"user": user.name, "place": place, "repository": repository.id}, LIFETIME)
    url, until = f"{call.endpoint}/cas/{place}", int(time.time()) + LIFETIME
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": until}, headers=headers)


def xorb(hub: Hub, call: Call) -> Response:
    """POST /cas/{place}/v1/xorbs/default/{hash}."""
    directory, _ = _place(hub, call)
    name = call.segments["hash"]
    if _HASH.fullmatch(name) is None:
        raise bad_request("not the hash of a xorb")
    limit = hub.settings.quota or 2 * hub.settings.max_file
    if sum(path.stat().st_size for path in directory.iterdir() if _HASH.fullmatch(path.name)) > limit:
        raise too_large(f"more than {limit} bytes wait for their shard")
    temporary = directory / secrets.token_hex(8)
    try:
        with temporary.open("xb") as file:
            for piece in call.pieces(xorbs.MAX_XORB):
                file.write(piece)
        with _Xorb(temporary):
            temporary.replace(directory / name)
    except FormatError as error:
        raise bad_request(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return JSONResponse({"was_inserted": True})


def shard(hub: Hub, call: Call) -> Response:
    """POST /cas/{place}/v1/shards: rebuild its files; the xorbs may go, soon."""
    directory, user = _place(hub, call)
    try:
        files = list(xorbs.read_shard(call.body(xorbs.MAX_SHARD)))
        for file in files:
            expected = None if file.sha256 is None else Digest("sha256", file.sha256)
            limit = hub.settings.max_file
            digest, size = hub.blobs.put(_rebuilt(directory, file, limit), expected)
            hub.staged.add(user, digest, size)
    except (FormatError, StoreError) as error:
        raise bad_request(f"a file of this shard cannot be rebuilt: {error}") from error
    (directory / _DONE).touch()
    return JSONResponse({"result": 1})


def clean(hub: Hub) -> None:
    """Take away xorbs whose files were rebuilt ten minutes ago, and what uploads that never ended have left."""
    now = time.time()
    for directory in hub.scratch.iterdir():
        with suppress(FileNotFoundError):
            age = now - directory.stat().st_mtime
            if age > 2 * LIFETIME or (age > REBUILT and (directory / _DONE).exists()):
                shutil.rmtree(directory, ignore_errors=True)


def _place(hub: Hub, call: Call) -> tuple[Path, str]:
    """Where the xorbs of a token lie, and whose it is.

    Raises:
        RefusedError: 401 or 403, no token for this place.
    """
    kind, _, ticket = call.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer":
        raise RefusedError(401, "no token of xet-write-token came with this")
    claims = hub.signer.read("cas", ticket)
    if claims["place"] != call.segments["place"]:
        raise RefusedError(403, "this token is for another place", "Forbidden")
    directory = hub.scratch / f"cas-{claims['place']}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory, str(claims["user"])


class _Xorb:
    """An open xorb: where its chunks are."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise FormatError(f"the xorb {path.name} has not come") from error
        size = os.fstat(self._file.fileno()).st_size
        try:
            self.chunks = xorbs.read_chunks(size, self._read)
        except FormatError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def run(self, term: xorbs.Term) -> Iterator[bytes]:
        """Yield the bytes of a run of chunks."""
        if term.end > len(self.chunks):
            raise FormatError(f"a term of the chunks {term.begin} to {term.end} of {len(self.chunks)}")
        for chunk in self.chunks[term.begin : term.end]:
            yield xorbs.unpack(chunk, self._read(chunk.begin, chunk.packed))

    def _read(self, begin: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, begin)


def _rebuilt(directory: Path, file: xorbs.FileInfo, limit: int) -> Iterator[bytes]:
    """Yield a file in pieces of a megabyte: what stores them starts a thread's work for each."""
    kept, size = bytearray(), 0
    with ExitStack() as stack:
        opened: dict[str, _Xorb] = {}
        for term in file.terms:
            if term.xorb not in opened:
                if len(opened) >= 8:
                    opened.pop(next(iter(opened))).__exit__()
                opened[term.xorb] = stack.enter_context(_Xorb(directory / term.xorb))
            for data in opened[term.xorb].run(term):
                kept += data
                if len(kept) >= 1024 * 1024:
                    size += len(kept)
                    if size > limit:
                        raise too_large(f"a file of more than {limit} bytes")
                    yield bytes(kept)
                    kept.clear()
    if kept:
        yield bytes(kept)
