"""A file of a canonical document and a payload, under one digest: receipts and journals are such files.

On disk: a line that names the format, the document's length (8 bytes, little-endian), the document (canonical
msgpack), the payload, and BLAKE3 of everything before.
"""

import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from blake3 import blake3

from loraforge.checkpoint import output
from loraforge.errors import FormatError
from loraforge_registry import canonical
from loraforge_registry.canonical import Value
from loraforge_registry.ingest import open_source

_FOOT = 32
_PIECE = 4 * 1024 * 1024


def write_container(path: Path, magic: bytes, document: Value, payload: Iterable[bytes]) -> int:
    """Write a new file, durably, and return its size.

    Raises:
        ManifestError: the document is too large.
    """
    data = canonical.encode(document)
    hasher, position = blake3(), 0
    fd = output.open_new(path)
    try:
        for piece in chain([magic + len(data).to_bytes(8, "little") + data], payload):
            output.write_at(fd, piece, position, path)
            position += len(piece)
            hasher.update(piece)
        output.write_at(fd, hasher.digest(), position, path)
        output.sync(fd, path)
    finally:
        os.close(fd)
    return position + _FOOT


class Container:
    """An open container: its document, and its payload by pieces."""

    def __init__(self, path: Path, magic: bytes) -> None:
        """Read and check a container.

        Raises:
            NotFoundError: there is none.
            FormatError: it is damaged, or another format.
        """
        self.path = path
        with open_source(path) as fd:
            start = len(magic) + 8
            head = os.pread(fd, start, 0)
            length = int.from_bytes(head[len(magic) :], "little")
            if not head.startswith(magic) or length > canonical.MAX_BYTES:
                raise FormatError(f"begins with {head[:20]!r}, expected {magic!r}")
            self._payload = start + length
            self._size = os.fstat(fd).st_size - self._payload - _FOOT
            self._check(fd)
            self.document = canonical.decode(os.pread(fd, length, start))

    def payload(self, begin: int, size: int) -> bytes:
        """Return a piece of the payload.

        Raises:
            FormatError: it is not there.
        """
        with open_source(self.path) as fd:
            data = os.pread(fd, size, self._payload + begin) if 0 <= begin <= begin + size <= self._size else b""
        if len(data) != size:
            raise FormatError(f"{self.path}: it has no bytes {begin} to {begin + size}")
        return data

    def _check(self, fd: int) -> None:
        hasher, position, end = blake3(), 0, self._payload + self._size
        while position < end:
            piece = os.pread(fd, min(_PIECE, end - position), position)
            if not piece:
                break
            hasher.update(piece)
            position += len(piece)
        if position != end or os.pread(fd, _FOOT + 1, end) != hasher.digest():
            raise FormatError("it is damaged, or cut short")
