"""Files of a commit, whole or from some byte on; a branch or tag is answered with where its commit's file is."""

import re
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from urllib.parse import quote

import anyio.to_thread
from starlette.responses import Response, StreamingResponse

from loraforge_registry.digest import Digest
from loraforge_registry.repositories import CommittedFile
from loraforge_registry.server import repos
from loraforge_registry.server.call import Call, is_hex
from loraforge_registry.server.errors import RefusedError, bad_request, no_entry
from loraforge_registry.server.holdings import blobs_of
from loraforge_registry.server.hub import Hub
from loraforge_registry.system import Buffer

_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")
_OUT = anyio.CapacityLimiter(64)  # threads that read for downloads: never those that answer small requests


def resolve(hub: Hub, call: Call) -> Response:
    """GET, HEAD /{id}/resolve/{rev}/{path}.

    What a branch means can move between a client's HEAD and its GET, and the client would keep new bytes under the old
    name. So a name is answered with the path of the commit, and only that path with bytes.
    """
    repository = repos.find(hub, call.segments["id"], call.user)
    revision = repos.resolve(hub, repository, call.segments["rev"])
    path = call.segments["path"]
    file = revision.commit.files.get(path)
    if file is None:
        raise no_entry(path[:200], revision.id)
    headers = {"X-Repo-Commit": revision.id, "ETag": f'"{file.etag}"'}
    if file.blob is None:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
    if call.segments["rev"] != revision.id:
        query = f"?{call.query_string}" if call.query_string in ("download=true", "download=1") else ""
        where = f"/{quote(repository.id)}/resolve/{revision.id}/{quote(path)}{query}"
        return Response(status_code=307, headers={**headers, "Location": where, "Content-Length": "0"})
    name = path.rpartition("/")[2]
    headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(name, safe='')}"
    made = revision.made.get(file.digest)
    return send(call, file, headers, _part_of(made) if made is not None else partial(hub.blobs.read, file.digest))


def lfs_object(hub: Hub, call: Call) -> Response:
    """GET /{id}/lfs/{oid}: a file by its digest, where the repository has it."""
    repository = repos.find(hub, call.segments["id"], call.user)
    oid = call.segments["oid"]
    if not is_hex(oid, 64):
        raise bad_request("not a sha256")
    digest = Digest("sha256", oid)
    size = blobs_of(hub, repository).get(digest)
    if size is None:
        raise RefusedError(404, f"{oid} is not in {repository.id}", "EntryNotFound")
    return send(call, CommittedFile(digest, size), {"ETag": f'"{oid}"'}, partial(hub.blobs.read, digest))


def send(
    call: Call, file: CommittedFile, headers: dict[str, str], read: Callable[[int, int], Iterator[Buffer]]
) -> Response:
    """Answer with a file, or the range of it that was asked for."""
    headers["Accept-Ranges"] = "bytes"
    begin, end = 0, file.size
    asked = _range(call.headers.get("range"), file.size)
    status = 200
    if asked is not None and call.headers.get("if-range") in (None, headers["ETag"]):
        (begin, end), status = asked, 206
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{file.size}"
    elif call.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(end - begin)
    media = "application/octet-stream"
    if call.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media)
    return StreamingResponse(_in_threads(read(begin, end)), status_code=status, headers=headers, media_type=media)


def _part_of(data: bytes) -> Callable[[int, int], Iterator[Buffer]]:
    return lambda begin, end: iter([data[begin:end]])


def _range(text: str | None, size: int) -> tuple[int, int] | None:
    """One range, as begin and end; several are answered with the whole file, which HTTP allows.

    Raises:
        RefusedError: 416, nothing of it is in the file.
    """
    match = None if text is None else _RANGE.fullmatch(text.replace(" ", ""))
    if match is None:
        return None
    first, last, suffix = match.groups()
    begin = max(0, size - int(suffix)) if suffix else int(first)
    end = min(size, int(last) + 1) if last else size
    if begin >= end:
        raise RefusedError(416, f"the file has {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return begin, end


async def _in_threads(pieces: Iterator[Buffer]) -> AsyncIterator[bytes]:
    """Read in threads, one piece ahead of nobody: a slow client keeps one piece in memory."""

    def following() -> bytes | None:
        piece = next(pieces, None)
        return None if piece is None else bytes(piece)

    try:
        while (piece := await anyio.to_thread.run_sync(following, limiter=_OUT)) is not None:
            yield piece
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()
