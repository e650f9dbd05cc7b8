"""Reading from a hub: few bytes of metadata, and bodies of exactly the length that was announced.

The hub's own client is not used for this: it checks no hash, follows redirects as it likes, and waits for ever. Here
the token goes to the endpoint's origin and nowhere else, a redirect is followed five times at most, nothing is
decompressed, and what trickles is given up.
"""

import http.client
import io
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import urljoin, urlsplit

from loraforge_registry import strict_json
from loraforge_registry.errors import FormatError, RemoteError
from loraforge_registry.strict_json import Json
from loraforge_registry.system import Buffer

MAX_JSON = 16 * 1024 * 1024
MAX_REDIRECTS = 5
ATTEMPTS = 4
PAUSES = (0.5, 2.0, 5.0)
TIMEOUT = 30.0
"""Seconds for a connection, and for the next byte of an answer."""
LONGEST_PAUSE = 20.0
"""Seconds that a hub may ask to wait before another attempt."""
GRACE, LEAST_RATE = 30.0, 1024
"""Seconds after which an answer must have come with so many bytes a second."""

_CHUNK = 4 * 1024 * 1024
_PROGRESS = 16 * 1024 * 1024
"""Bytes after which a connection that broke counts as the first that did."""
_REDIRECTS = (301, 302, 303, 307, 308)
_TRY_AGAIN = (408, 429, 500, 502, 503, 504)
_BROKEN = (OSError, http.client.HTTPException)


class _BusyError(ConnectionError):
    """An answer that means: later. ``wait`` is what it asks for, in seconds."""

    def __init__(self, status: int, wait: str) -> None:
        super().__init__(f"status {status}")
        digits = wait.strip()  # a date would need both clocks to be right
        self.wait = min(int(digits), LONGEST_PAUSE) if digits.isascii() and digits.isdecimal() else 0.0


class RefusalError(Exception):
    """An answer that is none: its status, and the hub's words for why."""

    def __init__(self, status: int, code: str, said: str) -> None:
        super().__init__(f"status {status}")
        self.status, self.code, self.said = status, code, said


@dataclass(frozen=True)
class Client:
    """One hub, and the token for it."""

    endpoint: str
    token: str | None = field(repr=False)

    def json(self, path: str, limit: int = MAX_JSON) -> Json:
        """GET a document.

        Raises:
            RefusalError: the hub says no.
            RemoteError: no answer, or one that is no JSON or larger than ``limit``.
        """
        try:
            return strict_json.loads(self.small(path, limit), max_bytes=limit, max_depth=48)
        except FormatError as error:
            raise RemoteError(f"{self.host} answered what is no document: {self.clean(str(error))}") from error

    def small(self, path: str, limit: int) -> bytes:
        """GET a small file whole; a connection that breaks is tried again. Raises as ``json``."""
        for attempt in range(ATTEMPTS):
            try:
                with closing(self._open(path, {})) as response:
                    return self._all(response, limit)
            except RemoteError:
                raise
            except _BROKEN as error:
                self._pause(attempt, error)
        raise AssertionError

    def body(self, path: str, size: int) -> Iterator[Buffer]:
        """Yield a body of exactly ``size`` bytes; where it breaks off, the rest is asked for.

        A chunk is valid until the next one is asked for: they share one buffer.

        Raises:
            RefusalError: the hub says no.
            RemoteError: it sends another length, or stops.
        """
        buffer = memoryview(bytearray(min(_CHUNK, size)))
        position = attempt = 0
        while position < size:
            start = position
            try:
                with closing(self._open(path, {"Range": f"bytes={position}-"} if position else {})) as response:
                    self._check_length(response, position, size)
                    for count in _fill(response, buffer, size - position):
                        yield buffer[:count]
                        position += count
                    if position < size:
                        raise ConnectionResetError(f"the connection ended after {position} of {size} bytes")
            except RemoteError:
                raise
            except _BROKEN as error:
                attempt = 0 if position - start > _PROGRESS else attempt
                self._pause(attempt, error)
                attempt += 1

    @property
    def host(self) -> str:
        """The endpoint, for messages."""
        parts = urlsplit(self.endpoint)
        return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")

    def clean(self, text: str) -> str:
        """Return what a hub said without the token, should it have sent it back."""
        return text.replace(self.token, "<token>")[:300] if self.token else text[:300]

    def _open(self, path: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """GET, along redirects; the answer is a 200 or 206."""
        url = self.endpoint + path
        for _ in range(MAX_REDIRECTS + 1):
            response = self._request(url, headers)
            if response.status in (200, 206):
                return response
            with closing(response):
                if response.status not in _REDIRECTS:
                    self._refuse(response)
                url = self._next(url, response.headers.get("Location", ""))
        raise RemoteError(f"{self.host} redirects more than {MAX_REDIRECTS} times")

    def _request(self, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", **headers})  # noqa: S310 - _next
        request.add_header("User-Agent", "loraforge")
        if self.token and _origin(url) == _origin(self.endpoint):
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        try:
            response: http.client.HTTPResponse = _opener().open(request, timeout=TIMEOUT)
        except (ValueError, http.client.InvalidURL) as error:  # a redirect to what is no address
            raise RemoteError(f"{self.host} is no address, or leads to none: {self.clean(str(error))}") from error
        return response

    def _refuse(self, response: http.client.HTTPResponse) -> None:
        if response.status in _TRY_AGAIN:
            raise _BusyError(response.status, response.headers.get("Retry-After", "")[:10])
        said = response.headers.get("X-Error-Message", "")
        raise RefusalError(response.status, response.headers.get("X-Error-Code", ""), self.clean(said))

    def _next(self, url: str, location: str) -> str:
        """Where a redirect leads: never to another kind of URL, never from TLS to none."""
        try:
            target = urljoin(url, location)
            scheme = urlsplit(target).scheme
        except ValueError as error:
            raise RemoteError(f"{self.host} redirects to what is no address") from error
        if not location or scheme not in ("http", "https") or (urlsplit(url).scheme == "https" and scheme != "https"):
            raise RemoteError(f"{self.host} redirects to {self.clean(repr(scheme))}, which is not followed")
        if _is_inside(urlsplit(target).hostname) and not _is_inside(urlsplit(self.endpoint).hostname):
            raise RemoteError(f"{self.host} redirects to an address of this machine or network, which is not followed")
        return target

    def _check_length(self, response: http.client.HTTPResponse, position: int, size: int) -> None:
        """Before anything is read: this is the part that was asked for, of a body as long as announced."""
        _check_encoding(response, self.host)
        wanted = f"bytes {position}-{size - 1}/{size}"
        if position and (response.status != 206 or response.headers.get("Content-Range") != wanted):
            raise RemoteError(f"{self.host} broke off, and cannot go on from where it did; run it again")
        if not position and response.status != 200:
            raise RemoteError(f"{self.host} answered {response.status} to a plain request")
        if response.length is not None and response.length != size - position:
            raise RemoteError(f"{self.host} sends {response.length} bytes where it announced {size - position}")

    def _all(self, response: http.client.HTTPResponse, limit: int) -> bytes:
        _check_encoding(response, self.host)
        if (response.length or 0) > limit:
            raise RemoteError(f"{self.host} sends {response.length} bytes where at most {limit} make sense")
        data, announced = bytearray(), response.length
        while len(data) <= limit and (piece := response.read1(_CHUNK)):
            data += piece
        if len(data) > limit:
            raise RemoteError(f"{self.host} sends more than {limit} bytes where they make no sense")
        if announced is not None and len(data) != announced:
            raise ConnectionResetError(f"the connection ended after {len(data)} of {announced} bytes")
        return bytes(data)

    def _pause(self, attempt: int, error: Exception) -> None:
        """Wait before another attempt, or give up and say why."""
        if attempt < min(ATTEMPTS - 1, len(PAUSES)) and not _is_final(error):
            time.sleep(max(PAUSES[attempt], error.wait if isinstance(error, _BusyError) else 0.0))
            return
        raise RemoteError(f"{self.host}: {self.clean(_reason(error))}") from error


def _fill(response: http.client.HTTPResponse, buffer: memoryview, wanted: int) -> Iterator[int]:
    """Fill the buffer again and again, and yield how far; ends where the body does, complete or not."""
    got = 0
    while got < wanted:
        filled, full = 0, min(len(buffer), wanted - got)
        try:
            while filled < full and (piece := response.read1(min(full - filled, 1024 * 1024))):
                buffer[filled : filled + len(piece)] = piece
                filled += len(piece)
        except _BROKEN:
            if filled:
                yield filled  # what came is not asked for again
            raise
        if filled:
            yield filled
        got += filled
        if filled < full:
            return
    if response.length is None and response.read1(1):
        raise RemoteError("the body is longer than announced")


def _check_encoding(response: http.client.HTTPResponse, host: str) -> None:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise RemoteError(f"{host} sends {encoding[:20]!r} where plain bytes were asked for")


def _is_final(error: Exception) -> bool:
    """Whether another attempt would end the same: a wrong certificate, no TLS at all, a host that is not there."""
    reason = getattr(error, "reason", error)
    return isinstance(reason, ssl.SSLError | ConnectionRefusedError) or "Name or service" in str(reason)


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"no answer for {TIMEOUT:g} seconds"
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"its certificate is not to be trusted: {reason.verify_message}"
    if isinstance(reason, ssl.SSLError):
        return f"it does not speak TLS ({reason.reason}); is its address http://?"
    if isinstance(reason, OSError) and reason.strerror:
        return f"cannot be reached: {reason.strerror}"
    return str(reason) or type(reason).__name__


def _is_inside(host: str | None) -> bool:
    """Whether a host is this machine, or one that only this network reaches."""
    try:
        found = {row[4][0] for row in socket.getaddrinfo(host, None)}
    except OSError:
        return False  # nobody is there
    return not all(ipaddress.ip_address(str(address).partition("%")[0]).is_global for address in found)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class _Reader(io.RawIOBase):
    """What comes from a socket, given up where it trickles: in headers, between chunks, in the body."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._start, self._received = time.monotonic(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 - anything that is a buffer
        count: int = self._raw.readinto(buffer) or 0
        self._received += count
        elapsed = time.monotonic() - self._start
        if elapsed > GRACE and self._received < elapsed * LEAST_RATE:
            raise RemoteError(f"gave up: {self._received} bytes in {elapsed:.0f} seconds")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that is read through a ``_Reader``."""

    def __init__(self, *arguments: Any, **named: Any) -> None:  # noqa: ANN401 - http.client's own
        super().__init__(*arguments, **named)
        self.fp = io.BufferedReader(_Reader(self.fp.detach()))


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req, context=ssl.create_default_context())


@cache
def _opener() -> urllib.request.OpenerDirector:
    """HTTP and nothing else: no file:, no redirect that is followed unseen; proxies as the environment says."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), _Handler(), _SecureHandler()):
        opener.add_handler(handler)
    return opener
