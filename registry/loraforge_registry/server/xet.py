"""The half of Xet that writes: since 1.20 the Hub's clients send large files in no other way, unless they are told to.

A file is rebuilt when its shard comes, from xorbs that came, or from files that earlier ones became (``places``), and
stored under the SHA-256 of its bytes. Nothing here is ever read by clients: downloads stay plain HTTP.
"""

import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from starlette.responses import JSONResponse, Response

from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError, StoreError
from loraforge_registry.server import places, repos, xorbs
from loraforge_registry.server.api import known
from loraforge_registry.server.call import Call
from loraforge_registry.server.errors import RefusedError, bad_request, too_large
from loraforge_registry.server.holdings import Nameable
from loraforge_registry.server.hub import Hub
from loraforge_registry.system import Buffer

LIFETIME = 12 * 3600
_HASH = re.compile(r"[0-9a-f]{64}")


def write_token(hub: Hub, call: Call) -> Response:
    """GET /api/models/{id}/xet-write-token/{rev}: the body is what hf_xet reads, the headers what Python does."""
    user = known(call)
    repository = repos.find_to_write(hub, call.segments["id"], user)
    places.clean(hub.scratch)
    nameable = Nameable(hub, user, repository)
    place = places.open_place(hub.scratch, user.name, lambda digest: nameable.size(digest) is not None)
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
    if places.waiting(directory) > limit:
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
        for file in xorbs.read_shard(call.body(xorbs.MAX_SHARD)):
            expected = None if file.sha256 is None else Digest("sha256", file.sha256)
            with _Rebuilt(hub, directory, file) as rebuilt:
                digest, size = hub.blobs.put(rebuilt.pieces(hub.settings.max_file), expected)
                rebuilt.remember(digest)
            hub.staged.add(user, digest, size)
    except (FormatError, StoreError) as error:
        places.give_up(hub.scratch, call.segments["place"])  # or the client would believe for good that it is here
        raise bad_request(f"a file of this shard cannot be rebuilt, push again: {error}") from error
    return JSONResponse({"result": 1})


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
    directory = places.directory_of(hub.scratch, str(claims["place"]))
    if not directory.is_dir():
        raise RefusedError(403, "this place was given up: push again", "Forbidden")
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

    def lengths(self) -> list[int]:
        """The lengths of its chunks."""
        return [chunk.size for chunk in self.chunks]

    def run(self, term: xorbs.Term) -> Iterator[bytes]:
        """Yield the bytes of a run of chunks."""
        for chunk in self.chunks[term.begin : term.end]:
            yield xorbs.unpack(chunk, self._read(chunk.begin, chunk.packed))

    def _read(self, begin: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, begin)


class _Rebuilt:
    """A file from the chunks that a shard names; remembers where each came to lie."""

    def __init__(self, hub: Hub, directory: Path, file: xorbs.FileInfo) -> None:
        self._hub, self._directory, self._file = hub, directory, file
        self._open: dict[str, _Xorb] = {}
        self._lengths: dict[str, list[int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for xorb in self._open.values():
            xorb.__exit__()

    def pieces(self, limit: int) -> Iterator[bytes]:
        """Yield it in pieces of a megabyte or more: what stores them starts a thread's work for each."""
        kept, size = bytearray(), 0
        for term in self._file.terms:
            for data in self._run(term):
                kept += data
                size += len(data)
                if size > limit:
                    raise too_large(f"a file of more than {limit} bytes")
                if len(kept) >= 1024 * 1024:
                    yield bytes(kept)
                    kept.clear()
        if kept:
            yield bytes(kept)

    def remember(self, digest: Digest) -> None:
        """Keep where the chunks of its xorbs lie in it."""
        position, runs = 0, dict[str, list[places.Run]]()
        for term in self._file.terms:
            runs.setdefault(term.xorb, []).append(places.Run(term.begin, term.end, digest, position))
            position += sum(self._lengths[term.xorb][term.begin : term.end])
        for xorb, found in runs.items():
            places.remember(self._directory, xorb, self._lengths[xorb], found)

    def _run(self, term: xorbs.Term) -> Iterator[Buffer]:
        if (self._directory / term.xorb).exists():
            xorb = self._opened(term.xorb)
            self._check(term, xorb.lengths())
            return xorb.run(term)
        return self._stored(term)

    def _stored(self, term: xorbs.Term) -> Iterator[Buffer]:
        recipe = places.recipe_of(self._directory, term.xorb)
        if recipe is None:
            raise FormatError(f"the xorb {term.xorb} has not come")
        self._check(term, recipe.lengths)
        ranges = list(recipe.find(term.begin, term.end))
        if sum(end - begin for _, begin, end in ranges) != sum(recipe.lengths[term.begin : term.end]):
            raise FormatError(f"the xorb {term.xorb} is known in parts only")
        for digest, begin, end in ranges:
            yield from self._hub.blobs.read(digest, begin, end)

    def _check(self, term: xorbs.Term, lengths: Sequence[int]) -> None:
        if term.end > len(lengths):
            raise FormatError(f"a term of the chunks {term.begin} to {term.end} of {len(lengths)}")
        self._lengths[term.xorb] = list(lengths)

    def _opened(self, name: str) -> _Xorb:
        if name not in self._open:
            if len(self._open) >= 8:
                self._open.pop(next(iter(self._open))).__exit__()
            self._open[name] = _Xorb(self._directory / name)
        return self._open[name]
