"""The one type for digests, with the one constructor that every path and comparison goes through."""

import hashlib
import re
from dataclasses import dataclass
from typing import Self

from loraforge_registry.errors import ReferenceSyntaxError

_SPELLING = re.compile(r"(sha256|blake3):([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A 256-bit digest: SHA-256 for files and artifacts, BLAKE3 for the raw bytes of a tensor.

    Round trip: ``Digest.parse(str(d)) == d`` and ``Digest.from_raw(d.algorithm, d.raw) == d``.

    Raises:
        ReferenceSyntaxError: another algorithm, length or alphabet than ``sha256:`` or ``blake3:`` and 64
            lower-case hex digits.
    """

    algorithm: str
    hex: str

    def __post_init__(self) -> None:
        # fullmatch: a '$' would let a final newline through, and with it a second name for one blob
        if not _SPELLING.fullmatch(f"{self.algorithm}:{self.hex}"):
            raise ReferenceSyntaxError(
                f"{f'{self.algorithm}:{self.hex}'[:90]!r} is not a digest; "
                "expected sha256: or blake3: and 64 lower-case hex digits"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``sha256:<hex>`` or ``blake3:<hex>``."""
        algorithm, _, hexadecimal = text.partition(":")
        return cls(algorithm, hexadecimal)

    @classmethod
    def from_raw(cls, algorithm: str, raw: bytes) -> Self:
        """Take the 32 bytes a hash function returns."""
        return cls(algorithm, raw.hex())

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Return the SHA-256 of ``data``."""
        return cls("sha256", hashlib.sha256(data).hexdigest())

    @property
    def raw(self) -> bytes:
        """The 32 bytes."""
        return bytes.fromhex(self.hex)

    @property
    def short(self) -> str:
        """Twelve hex digits, for people."""
        return self.hex[:12]

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"
