"""The two binary forms in which Xet's clients send files: xorbs of chunks, and shards that say which chunks are a file.

The public specification is at huggingface.co/docs/xet (1.1.0). Nothing here is believed: a file that is rebuilt is
stored only under the SHA-256 of its bytes. The limits bound memory; a client that goes beyond them is refused.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lz4 import frame

from loraforge_registry.errors import FormatError

MAX_XORB = 80 * 1024 * 1024
MAX_CHUNK = 4 * 128 * 1024
MAX_CHUNKS = 16 * 1024
MAX_SHARD = 64 * 1024 * 1024
_FOOTER = b"XETBLOB"
_RECORD = 48
_MAGIC = b"HFRepoMetaData"
_VERIFIED, _WITH_SHA256 = 1 << 31, 1 << 30
_END = b"\xff" * 32


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where a chunk lies in its xorb, how it is packed, and how long it is."""

    begin: int
    packed: int
    scheme: int
    size: int


@dataclass(frozen=True, slots=True)
class Term:
    """A run of chunks of one xorb."""

    xorb: str
    size: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a shard: the runs it is made of, and its SHA-256 where the client says it."""

    terms: tuple[Term, ...]
    sha256: str | None


def read_chunks(size: int, read: Callable[[int, int], bytes]) -> list[Chunk]:
    """Return the chunks of a xorb of ``size`` bytes; ``read(begin, length)`` gives its bytes.

    Raises:
        FormatError: not a xorb, or beyond the limits.
    """
    chunks: list[Chunk] = []
    position = 0
    while position < size:
        head = read(position, 8)
        if len(head) < 8 or head.startswith(_FOOTER):
            break
        packed, scheme, length = int.from_bytes(head[1:4], "little"), head[4], int.from_bytes(head[5:8], "little")
        position += 8
        fits = position + packed <= size and length <= MAX_CHUNK and packed <= MAX_CHUNK + 1024
        if head[0] != 0 or scheme > 2 or not fits or len(chunks) >= MAX_CHUNKS:
            raise FormatError(f"chunk {len(chunks)} of a xorb: version {head[0]}, scheme {scheme}, {length} bytes")
        chunks.append(Chunk(position, packed, scheme, length))
        position += packed
    if not chunks:
        raise FormatError("a xorb without chunks")
    return chunks


def unpack(chunk: Chunk, data: bytes) -> bytes:
    """Return the bytes of a chunk.

    Raises:
        FormatError: they are not as long as the chunk says, or not packed as it says.
    """
    if chunk.scheme:
        data = _decompress(data, chunk.size)
    if len(data) != chunk.size:
        raise FormatError(f"a chunk of {len(data)} bytes that says it has {chunk.size}")
    return _ungroup(data) if chunk.scheme == 2 else data


def read_shard(data: bytes) -> Iterator[FileInfo]:
    """Yield the files of a shard.

    Raises:
        FormatError: not a shard.
    """
    if not data.startswith(_MAGIC):
        raise FormatError("not a shard")
    position = _RECORD
    while True:
        head = _record(data, position)
        position += _RECORD
        if head[:32] == _END:
            return
        flags, count = struct.unpack_from("<II", head, 32)
        terms = tuple(_term(_record(data, position + _RECORD * index)) for index in range(count))
        position += _RECORD * count * (2 if flags & _VERIFIED else 1)
        sha256 = None
        if flags & _WITH_SHA256:
            sha256 = spell(_record(data, position)[:32])
            position += _RECORD
        yield FileInfo(terms, sha256)


def spell(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers in hex."""
    return "".join(raw[begin : begin + 8][::-1].hex() for begin in range(0, 32, 8))


def _record(data: bytes, position: int) -> bytes:
    found = data[position : position + _RECORD]
    if len(found) < _RECORD:
        raise FormatError("a shard that ends in the middle of a record")
    return found


def _term(record: bytes) -> Term:
    _, size, begin, end = struct.unpack_from("<IIII", record, 32)
    if not begin < end <= MAX_CHUNKS:
        raise FormatError(f"a term of the chunks {begin} to {end}")
    return Term(spell(record[:32]), size, begin, end)


def _decompress(data: bytes, size: int) -> bytes:
    try:
        found: bytes = frame.LZ4FrameDecompressor().decompress(data, max_length=size + 1)
    except (RuntimeError, EOFError) as error:
        raise FormatError(f"a chunk that is not LZ4: {error}") from error
    return found


def _ungroup(data: bytes) -> bytes:
    """Undo the grouping of every fourth byte, which lets floats compress."""
    whole = bytearray(len(data))
    quarter, rest = divmod(len(data), 4)
    begin = 0
    for lane in range(4):
        length = quarter + (lane < rest)
        whole[lane::4] = data[begin : begin + length]
        begin += length
    return bytes(whole)
