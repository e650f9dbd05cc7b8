"""What an exact unmerge must remember: a few corrections, sparse before they meet a codec.

Unmerging computes ``V = RN(W' - dW)`` from the merged W' and the adapters, and V is W but for the few elements where
rounding W' lost what it takes to tell. For those the record keeps the place and ``ord(W) - ord(V)``, with ord the
order-preserving map of a float's bits onto the integers, so that a neighbour is 1 away, across zero, too.
At ``|dW|/|W| = 0.005`` in bfloat16 about one element in a hundred has one, nearly always +1 or -1.

Coded: gaps between places and zigzag differences, each split into byte planes (nearly all the high bytes are 0), each
plane by DEFLATE with nothing but its entropy code, since nothing repeats; the low bytes of gaps, in which that saves
two of a hundred, are stored.
"""

import struct
import zlib
from dataclasses import dataclass, field

import numpy as np

from loraforge.checkpoint.floats import Array
from loraforge.errors import FormatError

_HEAD = struct.Struct("<QB")  # number of corrections, bytes of one element
_PLANE = struct.Struct("<Q")


@dataclass
class ResidualWriter:
    """Collects the corrections of one tensor, block after block."""

    itemsize: int
    _gaps: list[Array] = field(default_factory=list)
    _differences: list[Array] = field(default_factory=list)
    _last: int = -1

    def add(self, begin: int, places: Array, differences: Array) -> None:
        """Take corrections at ascending places from element ``begin`` on, all behind those that went before."""
        if not len(places):
            return
        before, self._last = self._last, begin + int(places[-1])
        gaps = np.empty(len(places), "<u4" if self._last - before <= 1 << 32 else "<u8")
        np.subtract(places[1:], places[:-1] + 1, out=gaps[1:], casting="unsafe")
        gaps[0] = begin + int(places[0]) - before - 1
        self._gaps.append(gaps)
        self._differences.append(differences)

    def encode(self) -> bytes:
        """Return the record."""
        signed, unsigned = _types(self.itemsize)
        gaps = np.concatenate([np.empty(0, "<u4"), *self._gaps])
        differences = np.concatenate([np.empty(0, signed), *self._differences])
        sign = differences >> signed.type(8 * self.itemsize - 1)
        zigzag = ((differences << signed.type(1)) ^ sign).view(unsigned)
        return _HEAD.pack(len(gaps), self.itemsize) + _planes(gaps, 8, plain=1) + _planes(zigzag, self.itemsize)


@dataclass(frozen=True)
class Residual:
    """The corrections of one tensor: ascending places, and what to add to ``ord(V)`` there."""

    places: Array
    differences: Array

    def within(self, begin: int, end: int) -> tuple[Array, Array]:
        """Return those of elements begin to end, places from ``begin`` on."""
        first, last = np.searchsorted(self.places, [begin, end])
        return self.places[first:last] - begin, self.differences[first:last]


def decode(data: bytes, elements: int, itemsize: int) -> Residual:
    """Read a record for a tensor of that many elements.

    Raises:
        FormatError: it is damaged, or belongs to another tensor.
    """
    try:
        count, width = _HEAD.unpack_from(data)
        if count > elements or width != itemsize:
            raise FormatError(f"a record of {count} corrections for a tensor of {elements} elements")
        position = _HEAD.size
        gaps, position = _merge_planes(data, position, count, np.dtype(np.uint64))
        signed, unsigned = _types(itemsize)
        zigzag, position = _merge_planes(data, position, count, unsigned)
    except (struct.error, zlib.error) as error:
        raise FormatError(f"an undo record that cannot be read: {error}") from error
    if count and int(gaps.max()) >= elements:  # and no sum of them can wrap around unseen
        raise FormatError("an undo record that points outside its tensor")
    places = np.cumsum(gaps + np.uint64(1)).astype(np.int64) - 1
    if position != len(data) or (count and (int(places[-1]) >= elements or bool((np.diff(places) <= 0).any()))):
        raise FormatError("an undo record that points outside its tensor")
    one = unsigned.type(1)
    differences = (zigzag >> one).view(signed) ^ -(zigzag & one).view(signed)
    return Residual(places, differences)


def _types(itemsize: int) -> tuple[np.dtype[np.signedinteger], np.dtype[np.unsignedinteger]]:
    return np.dtype(f"<i{itemsize}"), np.dtype(f"<u{itemsize}")


def _planes(numbers: Array, size: int, plain: int = 0) -> bytes:
    """Code the ``size`` bytes of unsigned numbers plane by plane, lowest first; the first ``plain`` as they are."""
    columns, most = numbers.view(np.uint8).reshape(-1, numbers.itemsize), int(numbers.max()) if len(numbers) else 0
    coded = []
    for plane in range(size):
        short = b""
        if most >> (8 * plane):
            codec = zlib.compressobj(0 if plane < plain else 1, strategy=zlib.Z_HUFFMAN_ONLY)
            short = codec.compress(columns[:, plane].tobytes()) + codec.flush()
        coded.append(_PLANE.pack(len(short)) + short)
    return b"".join(coded)


def _merge_planes(data: bytes, position: int, count: int, kind: np.dtype[np.generic]) -> tuple[Array, int]:
    columns = np.zeros((count, kind.itemsize), np.uint8)
    for plane in range(kind.itemsize):
        (length,) = _PLANE.unpack_from(data, position)
        position += _PLANE.size
        if length:
            codec = zlib.decompressobj()
            plain = codec.decompress(data[position : position + length], count + 1)
            if len(plain) != count or not codec.eof or codec.unused_data:
                raise FormatError("an undo record that is cut short")
            columns[:, plane] = np.frombuffer(plain, np.uint8)
        position += length
    return columns.view(kind).reshape(count), position
