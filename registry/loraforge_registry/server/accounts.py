"""Who may do what: users, the hashes of their tokens, and the scopes of each (SPEC.md section 14).

A token is 256 random bits, so one SHA-256 of it is as good as a slow hash: nobody can try 2^256, and a slow hash at
every request would be a way to keep a server busy. A password that people choose would need scrypt; there is none.
"""

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge_registry.errors import NotFoundError, ReferenceSyntaxError, StoreError

PREFIX = "lf_"
FORMAT = 1
EVERYWHERE = "*"
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?!-)){0,38}")
_SCOPE = re.compile(r"(read|write):(\*|[a-z0-9](?:[a-z0-9]|-(?!-)){0,38})")
_MAX_TOKEN = 512


@dataclass(frozen=True, slots=True)
class User:
    """Who asks, and what the token that came with the request may do."""

    name: str
    scopes: frozenset[tuple[str, str]]

    def may_write(self, namespace: str) -> bool:
        """Whether repositories there may be made and changed."""
        return bool(self.scopes & {("write", namespace.lower()), ("write", EVERYWHERE)})

    def may_read(self, namespace: str) -> bool:
        """Whether private repositories there may be read."""
        return self.may_write(namespace) or bool(self.scopes & {("read", namespace.lower()), ("read", EVERYWHERE)})

    @property
    def organisations(self) -> list[str]:
        """The namespaces, other than the user's own, that it may write to."""
        return sorted({where for what, where in self.scopes if what == "write"} - {self.name, EVERYWHERE})


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a user: its hash, a short name to revoke it by, and its scopes."""

    id: str
    user: str
    sha256: str
    scopes: tuple[str, ...]


class Accounts:
    """The file of users. It is read again when it changes, so a token that is revoked stops at the next request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._tokens: Mapping[str, Token] = {}

    def find(self, token: str) -> User | None:
        """Return whose token this is, or None. The work does not depend on how much of it is right."""
        if not token.startswith(PREFIX) or len(token) > _MAX_TOKEN:
            return None
        sha256 = _hash(token)
        found = self._read().get(sha256)
        if found is None or not hmac.compare_digest(found.sha256, sha256):
            return None
        return User(found.user, frozenset(_parse_scope(scope) for scope in found.scopes))

    def tokens(self) -> list[Token]:
        """All tokens, by user."""
        return sorted(self._read().values(), key=lambda token: (token.user, token.id))

    def add(self, name: str, scopes: Iterable[str] = ()) -> str:
        """Give a user a token, make the user where it is new, and return the token: it is kept nowhere.

        Raises:
            ReferenceSyntaxError: not the name of a user, or not a scope.
        """
        if not _NAME.fullmatch(name):
            raise ReferenceSyntaxError(
                f"{name[:60]!r} is not the name of a user: expected letters a-z, digits and single '-', at most 39"
            )
        wanted = tuple(scopes) or (f"write:{name}", f"read:{name}")
        for scope in wanted:
            _parse_scope(scope)
        token = new_token()
        with self._changing() as tokens:
            new = Token(secrets.token_hex(4), name, _hash(token), wanted)
            tokens[new.sha256] = new
        return token

    def remove(self, name: str, token_id: str | None = None) -> int:
        """Revoke a user's tokens, or one of them; return how many.

        Raises:
            NotFoundError: there is none.
        """
        with self._changing() as tokens:
            gone = [t.sha256 for t in tokens.values() if t.user == name and token_id in (None, t.id)]
            if not gone:
                raise NotFoundError(f"{name} has no {'token' if token_id is None else f'token {token_id}'}")
            for sha256 in gone:
                del tokens[sha256]
        return len(gone)

    def key(self) -> bytes:
        """The key that capabilities are signed with; made once, so that those a server gave outlive it."""
        path = self.path.with_name("key")
        with _locked(self.path), _own_directory(self.path):
            if not path.exists():
                _replace(path, secrets.token_bytes(32).hex())
            return bytes.fromhex(_read_own(path))

    def _read(self) -> Mapping[str, Token]:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            self._seen, self._tokens = None, {}
            return self._tokens
        seen = (found.st_ino, found.st_size, found.st_mtime_ns)
        if seen != self._seen:
            self._tokens, self._seen = _parse(self.path, _read_own(self.path)), seen
        return self._tokens

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Token]]:
        with _locked(self.path):
            tokens = dict(self._read())
            yield tokens
            listed = [
                {"id": t.id, "user": t.user, "sha256": t.sha256, "scopes": list(t.scopes)} for t in tokens.values()
            ]
            _replace(self.path, json.dumps({"format": FORMAT, "tokens": listed}, indent=1))


def new_token() -> str:
    """Make a token: 256 random bits, which begin so that a scanner for secrets knows one."""
    return PREFIX + secrets.token_urlsafe(32)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _parse_scope(text: str) -> tuple[str, str]:
    match = _SCOPE.fullmatch(text)
    if match is None:
        raise ReferenceSyntaxError(
            f"{text[:60]!r} is not a scope: expected read:NAMESPACE, write:NAMESPACE, or * for all"
        )
    return match[1], match[2]


def _parse(path: Path, text: str) -> dict[str, Token]:
    try:
        data: dict[str, Any] = json.loads(text)
        if data["format"] != FORMAT:
            raise StoreError(f"{path}: format {data['format']!r}, this version reads {FORMAT}: upgrade loraforge")
        found = [Token(t["id"], t["user"], t["sha256"], tuple(t["scopes"])) for t in data["tokens"]]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged, so nobody is let in: {type(error).__name__}") from error
    return {token.sha256: token for token in found}


@contextmanager
def _own_directory(path: Path) -> Iterator[None]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent.stat().st_uid != os.getuid() or path.parent.stat().st_mode & 0o022:
        raise StoreError(
            f"{path.parent} belongs to somebody else, or others may write to it: chmod go-w, or name another"
        )
    yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with _own_directory(path):
        fd = os.open(path.with_name("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _read_own(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd) as file:
        return file.read(16 * 1024 * 1024)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(fd)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
