"""Git LFS: files that are sent apart from a commit, whole or in parts, to URLs that say themselves what they allow."""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlencode

from starlette.responses import JSONResponse, Response

from loraforge_registry.digest import Digest
from loraforge_registry.errors import StoreError
from loraforge_registry.server import quota, repos
from loraforge_registry.server.api import known
from loraforge_registry.server.call import Call, is_hex, list_field, size_field
from loraforge_registry.server.errors import RefusedError, bad_request, too_large
from loraforge_registry.server.holdings import Nameable
from loraforge_registry.server.hub import Hub
from loraforge_registry.system import Buffer

MEDIA = "application/vnd.git-lfs+json"
MAX_PARTS = 10_000
Claims = Mapping[str, str | int]


def batch(hub: Hub, call: Call) -> Response:
    """POST /{id}.git/info/lfs/objects/batch: where to send what is not here, where to get what is."""
    user, fields = known(call), call.json()
    operation = fields.get("operation")
    if operation not in ("upload", "download"):
        raise bad_request(f"{str(operation)[:40]!r} is no operation of LFS")
    find = repos.find_to_write if operation == "upload" else repos.find
    repository = find(hub, call.segments["id"], user)
    objects, transfer = [], "basic"
    wanted = [_object(entry) for entry in list_field(fields, "objects", 1000)]
    if operation == "upload":
        quota.check(hub, repository.namespace, dict(wanted))
    offers = fields.get("transfers")
    in_parts = isinstance(offers, list) and "multipart" in offers
    nameable = Nameable(hub, user, repository)
    for digest, size in wanted:
        said: dict[str, object] = {"oid": digest.hex, "size": size}
        there = nameable.size(digest)
        if operation == "download":
            said |= _download(call, digest) if there == size else _missing(digest)
        elif size > hub.settings.max_file:
            limit = hub.settings.max_file
            said["error"] = {"code": 422, "message": f"{size} bytes; the limit of this server is {limit}"}
        elif there is None:
            apart = in_parts and size > hub.settings.multipart_above
            transfer = "multipart" if apart else transfer
            claims: Claims = {"oid": digest.hex, "size": size, "user": user.name, "repository": repository.id}
            said["actions"] = _parts(hub, call, claims) if apart else _whole(hub, call, claims)
        elif there != size:
            said["error"] = {"code": 422, "message": f"{digest.hex} has {there} bytes here"}
        objects.append(said)
    return JSONResponse({"transfer": transfer, "objects": objects, "hash_algo": "sha256"}, media_type=MEDIA)


def put(hub: Hub, call: Call) -> Response:
    """PUT /lfs/put/{oid}?ticket=: a file, whole."""
    claims = _claims(hub, call, "put")
    _store(hub, claims, call.pieces(int(claims["size"])))
    return Response(headers={"ETag": f'"{claims["oid"]}"'})


def part(hub: Hub, call: Call) -> Response:
    """PUT /lfs/part/{oid}?ticket=: one part of a file; sent again, the last counts."""
    claims = _claims(hub, call, "part")
    number, size = int(claims["part"]), int(claims["size"])
    directory = _directory(hub, claims)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = directory / secrets.token_hex(8)
    try:
        with temporary.open("xb") as file:
            for piece in call.pieces(size):
                file.write(piece)
        if temporary.stat().st_size != size:
            raise bad_request(f"part {number} ended before its {size} bytes")
        temporary.replace(directory / f"{number:05d}")
    finally:
        temporary.unlink(missing_ok=True)
    return Response(headers={"ETag": f'"{number:05d}"'})


def complete(hub: Hub, call: Call) -> Response:
    """POST /lfs/complete/{oid}?ticket=: the parts are one file now."""
    claims = _claims(hub, call, "complete")
    directory = _directory(hub, claims)
    count = int(claims["parts"])
    paths = [directory / f"{number:05d}" for number in range(1, count + 1)]
    call.body()
    if not all(path.is_file() for path in paths):
        raise bad_request(f"not all of the {count} parts have come")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        _store(hub, claims, _joined(paths))
    return JSONResponse({"message": "complete"})


def verify(hub: Hub, call: Call) -> Response:
    """POST /lfs/verify: did it come, from this user? What others sent is not said."""
    user = known(call)
    digest, size = _object(call.json())
    if hub.staged.size(user.name, digest) != size:
        raise RefusedError(404, f"{digest.hex} has not come")
    return JSONResponse({"message": "here"})


def _object(entry: object) -> tuple[Digest, int]:
    if not isinstance(entry, dict) or not is_hex(entry.get("oid"), 64):
        raise bad_request("an object without the sha256 of its bytes as oid")
    return Digest("sha256", entry["oid"]), size_field(entry, "size")


def _whole(hub: Hub, call: Call, claims: Claims) -> dict[str, object]:
    return {
        "upload": {"href": _url(hub, call, "put", claims)},
        "verify": {"href": f"{call.endpoint}/lfs/verify"},
    }


def _parts(hub: Hub, call: Call, claims: Claims) -> dict[str, object]:
    size, part_size = int(claims["size"]), hub.settings.part_size
    part_size = max(part_size, -(-size // MAX_PARTS))
    count = -(-size // part_size)
    claims = {**claims, "upload": secrets.token_hex(16), "parts": count}
    header = {"chunk_size": str(part_size)}
    for number in range(1, count + 1):
        length = min(part_size, size - (number - 1) * part_size)
        header[f"{number:05d}"] = _url(hub, call, "part", {**claims, "part": number, "size": length})
    return {
        "upload": {"href": _url(hub, call, "complete", claims), "header": header},
        "verify": {"href": f"{call.endpoint}/lfs/verify"},
    }


def _url(hub: Hub, call: Call, kind: str, claims: Claims) -> str:
    query = urlencode({"ticket": hub.signer.sign(kind, claims)})
    return f"{call.endpoint}/lfs/{kind}/{claims['oid']}?{query}"


def _claims(hub: Hub, call: Call, kind: str) -> Claims:
    claims = hub.signer.read(kind, call.query.get("ticket", ""))
    if claims["oid"] != call.segments["oid"]:
        raise RefusedError(403, "this URL was signed for other bytes", "Forbidden")
    return claims


def _directory(hub: Hub, claims: Claims) -> Path:
    return hub.scratch / f"parts-{claims['upload']}"


def _store(hub: Hub, claims: Claims, chunks: Iterator[Buffer]) -> None:
    digest, size = Digest("sha256", str(claims["oid"])), int(claims["size"])
    try:
        hub.blobs.put(_exactly(chunks, size), expected=digest)
    except StoreError as error:
        raise bad_request(f"the bytes are not those of {digest.hex}: {error}") from error
    hub.staged.add(str(claims["user"]), digest, size)


def _exactly(chunks: Iterator[Buffer], size: int) -> Iterator[Buffer]:
    came = 0
    for chunk in chunks:
        came += len(chunk)
        if came > size:
            raise too_large(f"more than the {size} bytes that were announced")
        yield chunk
    if came != size:
        raise bad_request(f"{came} bytes came of {size}")


def _joined(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while piece := file.read(1024 * 1024):
                yield piece


def _download(call: Call, digest: Digest) -> dict[str, object]:
    return {"actions": {"download": {"href": f"{call.endpoint}/{call.segments['id']}/lfs/{digest.hex}"}}}


def _missing(digest: Digest) -> dict[str, object]:
    return {"error": {"code": 404, "message": f"{digest.hex} is not here"}}
