"""Where a remote is: ``hf://ORG/REPO[@REVISION]``, ``file:///DIR[#REFERENCE]``."""

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote, unquote, urlsplit

from loraforge_registry.errors import ReferenceSyntaxError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]{0,198}[A-Za-z0-9_])?")
_HUB_PAGES = ("huggingface.co", "hf.co", "www.huggingface.co")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A repository of the Hub, or of whatever ``HF_ENDPOINT`` names; without a revision its main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")

    def at(self, revision: str) -> "HubAddress":
        """The same repository at another revision."""
        return replace(self, revision=revision)


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Another store on a file system of this machine; the reference is one of its own."""

    path: Path
    reference: str | None = None

    def __str__(self) -> str:
        return f"file://{quote(str(self.path))}" + (f"#{self.reference}" if self.reference else "")


Address: TypeAlias = HubAddress | StoreAddress


def is_url(text: str) -> bool:
    """Whether a text is a URL, or was meant as one: neither a path nor a reference has a scheme."""
    return _SCHEME.match(text) is not None


def parse_address(text: str) -> Address:
    """Read the URL of a remote.

    Raises:
        ReferenceSyntaxError: it is none; the message says what it could have been. It never quotes a password.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "hf" and rest.startswith("//"):
        return _hub(rest[2:])
    if scheme == "file" and rest.startswith("//"):
        return _store(text)
    raise ReferenceSyntaxError(_hint(text))


def parse_endpoint(text: str) -> None:
    """Check the URL of a whole hub, ``hf://``, which is searched.

    Raises:
        ReferenceSyntaxError: it is another.
    """
    if text not in ("hf://", "hf:", "hf"):
        raise ReferenceSyntaxError(f"{_shown(text)}: only hf:// can be searched")


def _hub(rest: str) -> HubAddress:
    repo, at, revision = rest.rstrip("/").partition("@")
    parts = repo.split("/")
    if len(parts) != 2 or not all(_PART.fullmatch(part) and "--" not in part and ".." not in part for part in parts):
        raise ReferenceSyntaxError(f"{_shown(f'hf://{rest}')} is not hf://ORG/REPO or hf://ORG/REPO@REVISION")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        raise ReferenceSyntaxError(f"hf://{repo}: {_shown(revision)} is not a revision: a tag, a branch or a commit")
    return HubAddress(repo, revision if at else None)


def _store(text: str) -> StoreAddress:
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise ReferenceSyntaxError(f"{_shown(text)}: a path begins with a third slash: file:///DIR")
    if not parts.path or parts.query or "\0" in unquote(parts.path):
        raise ReferenceSyntaxError(f"{_shown(text)} is not file:///DIR or file:///DIR#NAME:TAG")
    return StoreAddress(Path(unquote(parts.path)), unquote(parts.fragment) or None)


def _hint(text: str) -> str:
    scheme = text.partition(":")[0]
    parts = urlsplit(text) if "[" not in text else urlsplit("")
    if parts.hostname in _HUB_PAGES and parts.path.count("/") >= 2:
        return f"{_shown(text)} is a page: write hf://{'/'.join(parts.path.strip('/').split('/')[:2])}"
    near = difflib.get_close_matches(scheme.lower(), ("hf", "file"), 1, 0.5)
    hint = f"; did you mean {near[0]}://?" if near else ""
    return f"{_shown(text)} is no remote: expected hf://ORG/REPO[@REVISION] or file:///DIR{hint}"


def _shown(text: str) -> str:
    """Return a text for an error, without what stands before an @ as a user's name and password do."""
    return repr(re.sub(r"//[^/@]*:[^/@]*@", "//...@", text)[:200])
