"""Capabilities in URLs: what the Hub's clients PUT to carries no token, so the URL itself says what it allows.

A ticket names one thing that may be done, by whom and until when, and is signed. It is no secret of the user's: a log
that caught one could at worst let somebody send the very bytes that its digest asks for.
"""

import hashlib
import hmac
import json
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping

from loraforge_registry.server.errors import RefusedError

LIFETIME = 6 * 3600  # seconds: a large file over a slow line


class Signer:
    """Signs and reads tickets."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, kind: str, claims: Mapping[str, str | int], lifetime: int = LIFETIME) -> str:
        """Return a ticket for one kind of request, good for a while."""
        body = json.dumps({"kind": kind, "until": int(time.time()) + lifetime, **claims}, sort_keys=True).encode()
        return f"{_out(body)}.{_out(self._mac(body))}"

    def read(self, kind: str, ticket: str) -> Mapping[str, str | int]:
        """Return what a ticket claims.

        Raises:
            RefusedError: 403: it was not signed here, is for something else, or has expired.
        """
        first, _, second = ticket.partition(".")
        try:
            body, mac = _in(first), _in(second)
        except ValueError:
            body, mac = b"", b""
        if not hmac.compare_digest(mac, self._mac(body)):
            raise RefusedError(403, "this URL was not signed here: ask for another", "Forbidden")
        claims: dict[str, str | int] = json.loads(body)
        if claims["kind"] != kind or int(claims["until"]) < time.time():
            raise RefusedError(403, "this URL has expired, or is for something else: ask for another", "Forbidden")
        return claims

    def _mac(self, body: bytes) -> bytes:
        return hmac.new(self._key, body, hashlib.sha256).digest()


def _out(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _in(text: str) -> bytes:
    return urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
