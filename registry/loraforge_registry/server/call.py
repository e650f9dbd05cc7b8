"""One request, as handlers see it: plain functions in threads, that read a body piece by piece."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import anyio.from_thread

from loraforge_registry.server.accounts import User
from loraforge_registry.server.errors import RefusedError, bad_request, too_large

PIECE = 1024 * 1024  # what a handler is given at once: one hop between threads for each
SMALL_BODY = 4 * 1024 * 1024
AHEAD = 16 * 1024  # what is read of a body before a thread waits for it
IDLE = 30.0  # seconds without a byte
GRACE, MIN_RATE = 30.0, 1024  # from here on, bytes a second on average

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


@dataclass
class Call:
    """A request: the parts of its path that the route names, unquoted one by one."""

    method: str
    path: str
    segments: Mapping[str, str]
    query_string: str
    headers: Mapping[str, str]
    endpoint: str
    user: User | None
    receive: Receive
    route: str = ""
    query: Mapping[str, str] = field(init=False)
    _reader: "_Body" = field(init=False)

    def __post_init__(self) -> None:
        self._reader = _Body(self.receive)
        try:
            parsed = parse_qs(self.query_string, keep_blank_values=True, max_num_fields=100)
        except ValueError as error:
            raise bad_request("too many fields in the query") from error
        self.query = {key: values[-1] for key, values in parsed.items()}

    def pieces(self, limit: int) -> Iterator[bytes]:
        """Yield the body, in pieces of about a megabyte, in the thread of a handler.

        Raises:
            RefusedError: 413 beyond ``limit``, 408 where it trickles, 400 where the client went away.
        """
        self._check_declared(limit)
        while piece := anyio.from_thread.run(self._reader.piece, limit):
            yield piece

    async def begin(self) -> bool:
        """Read the beginning of the body on the event loop, where who dawdles holds no thread; say whether it is all.

        Raises:
            RefusedError: as ``pieces``.
        """
        self._check_declared(SMALL_BODY)
        return await self._reader.begin()

    def _check_declared(self, limit: int) -> None:
        declared = self.headers.get("content-length")
        if declared is not None and (not declared.isdecimal() or int(declared) > limit):
            raise too_large(f"a body of {declared[:20]} bytes; the limit here is {limit}")

    def body(self, limit: int = SMALL_BODY) -> bytes:
        """Return a small body whole."""
        return b"".join(self.pieces(limit))

    def json(self) -> dict[str, Any]:
        """Return a small body that is a JSON object; none at all is an empty one.

        Raises:
            RefusedError: 400, it is not.
        """
        data = self.body()
        try:
            found = json.loads(data) if data.strip() else {}
        except (ValueError, RecursionError) as error:
            raise bad_request("the body is not JSON") from error
        if not isinstance(found, dict):
            raise bad_request("the body is not a JSON object")
        return found


class _Body:
    """Gathers what the network gives into pieces, on the event loop."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept = bytearray()
        self._size = 0
        self._begin = time.monotonic()
        self._ended = False

    async def begin(self) -> bool:
        await self._gather(AHEAD)
        return self._ended

    async def piece(self, limit: int) -> bytes:
        await self._gather(PIECE, limit)
        piece, self._kept = bytes(self._kept), bytearray()
        return piece

    async def _gather(self, wanted: int, limit: int | None = None) -> None:
        while not self._ended and len(self._kept) < wanted:
            try:
                message = await asyncio.wait_for(self._receive(), IDLE)
            except TimeoutError as error:
                raise RefusedError(408, f"no byte came for {IDLE:.0f} s") from error
            if message["type"] == "http.disconnect":
                raise RefusedError(400, "the client went away")
            self._kept += message.get("body", b"")
            self._size += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)
            self._check_rate()
            if limit is not None and self._size > limit:
                raise too_large(f"a body of more than {limit} bytes")

    def _check_rate(self) -> None:
        spent = time.monotonic() - self._begin
        if spent > GRACE and self._size < MIN_RATE * spent and not self._ended:
            raise RefusedError(408, f"the body comes at less than {MIN_RATE} bytes a second")


def text_field(fields: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """Return a text from a JSON body.

    Raises:
        RefusedError: 400, it is missing or no text.
    """
    value = fields.get(name, default)
    if not isinstance(value, str) or len(value) > 100_000:
        raise bad_request(f"{name} is {type(value).__name__}, expected a text")
    return value


def list_field(fields: Mapping[str, Any], name: str, limit: int) -> list[Any]:
    """Return a list from a JSON body.

    Raises:
        RefusedError: 400, it is missing, no list, or longer than ``limit``.
    """
    value = fields.get(name)
    if not isinstance(value, list) or len(value) > limit:
        raise bad_request(f"{name} is not a list of at most {limit}")
    return value


def size_field(fields: Mapping[str, Any], name: str) -> int:
    """Return a size from a JSON body.

    Raises:
        RefusedError: 400, it is missing or no size.
    """
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 2**53:
        raise bad_request(f"{name} is not a size in bytes")
    return value


def is_hex(text: object, digits: int) -> bool:
    """Whether a text is so many lower-case hex digits."""
    return isinstance(text, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", text) is not None
