"""Names, tags and references: what a user types to mean an artifact (SPEC.md section 5)."""

import re
from dataclasses import dataclass

from loraforge_registry.errors import ReferenceSyntaxError

DEFAULT_TAG = "latest"

_PART = re.compile(r"[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?")
_DIGEST_LIKE = re.compile(r"sha256|blake3|[0-9a-f]{64}")
_PREFIX = re.compile(r"sha256:([0-9a-f]{8,64})")


@dataclass(frozen=True, slots=True, order=True)
class RefName:
    """A ``name:tag`` pair that is safe to be a file name.

    Raises:
        ReferenceSyntaxError: a part outside ``[a-z0-9._-]``, longer than 128, with ``..``, or like a digest.
    """

    name: str
    tag: str = DEFAULT_TAG

    def __post_init__(self) -> None:
        _check_part("name", self.name)
        _check_part("tag", self.tag)

    @classmethod
    def parse(cls, text: str) -> "RefName":
        """Read ``name`` or ``name:tag``."""
        name, colon, tag = text.partition(":")
        return cls(name, tag if colon else DEFAULT_TAG)

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}"


@dataclass(frozen=True, slots=True)
class Reference:
    """What ``name[:tag]``, ``name@sha256:<hex>`` or ``sha256:<hex prefix>`` asks for.

    Exactly one of ``ref`` and ``prefix`` is set; ``name`` accompanies a prefix that was given behind ``name@``.
    """

    ref: RefName | None
    prefix: str | None = None
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Read a reference.

        Raises:
            ReferenceSyntaxError: neither form.
        """
        name, at, digest = text.partition("@")
        if at:
            _check_part("name", name)
            return cls(None, _prefix(digest), name)
        if text.startswith(("sha256:", "blake3:")):
            return cls(None, _prefix(text))
        return cls(RefName.parse(text))


def _prefix(text: str) -> str:
    match = _PREFIX.fullmatch(text)
    if match is None:
        raise ReferenceSyntaxError(f"{text[:90]!r} is not sha256: and 8 to 64 lower-case hex digits")
    return match[1]


def _check_part(what: str, text: str) -> None:
    if not _PART.fullmatch(text) or ".." in text or text.endswith(".lock"):
        raise ReferenceSyntaxError(
            f"{text[:130]!r} is not a {what}: expected lower-case letters, digits, '.', '_' and '-', "
            "beginning and ending with a letter or digit, at most 128"
        )
    if _DIGEST_LIKE.fullmatch(text):
        raise ReferenceSyntaxError(f"{text[:70]!r} could be mistaken for a digest; choose another {what}")
