"""What the targets compare with: second opinions that share no code with what they judge."""

import math
import struct
from typing import Any

import safetensors

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def tensors_by_safetensors(data: bytes) -> Tensors | None:
    """What the safetensors library reads, or None where it refuses."""
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found}


class NotCanonicalError(ValueError):
    """The bytes are not the one spelling of a value."""


MAX_DEPTH = 32
_UNSIGNED = {0xCC: (1, 128), 0xCD: (2, 2**8), 0xCE: (4, 2**16), 0xCF: (8, 2**32)}
_SIGNED = {0xD0: (1, -33), 0xD1: (2, -(2**7) - 1), 0xD2: (4, -(2**15) - 1), 0xD3: (8, -(2**31) - 1)}
_TEXT = {0xD9: (1, 32), 0xDA: (2, 2**8), 0xDB: (4, 2**16)}
_BYTES = {0xC4: (1, 0), 0xC5: (2, 2**8), 0xC6: (4, 2**16)}
_LIST = {0xDC: (2, 16), 0xDD: (4, 2**16)}
_MAP = {0xDE: (2, 16), 0xDF: (4, 2**16)}


def canonical_value(data: bytes) -> Any:
    """Read canonical msgpack byte by byte, as section 3 of SPEC.md describes it."""
    value, end = _value(data, 0, 0)
    _want(end == len(data))
    return value


def _value(data: bytes, at: int, depth: int) -> tuple[Any, int]:  # noqa: PLR0911 - a row of the format each
    _want(at < len(data) and depth <= MAX_DEPTH)
    first, at = data[at], at + 1
    if first < 0x80:
        return first, at
    if first >= 0xE0:
        return first - 256, at
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at
    if first in _UNSIGNED:
        number, at = _number(data, at, _UNSIGNED[first][0])
        _want(number >= _UNSIGNED[first][1])
        return number, at
    if first in _SIGNED:
        width, most = _SIGNED[first]
        number, at = _number(data, at, width)
        number -= (number >> (8 * width - 1)) << (8 * width)
        _want(number <= most)
        return number, at
    if first == 0xCB:
        (real,) = struct.unpack(">d", _take(data, at, 8))
        _want(math.isfinite(real) and not (real == 0 and math.copysign(1, real) < 0))
        return real, at + 8
    if 0xA0 <= first < 0xC0 or first in _TEXT:
        size, at = _size(data, at, first, first - 0xA0 if first < 0xC0 else None, _TEXT)
        return _text(_take(data, at, size)), at + size
    if first in _BYTES:
        size, at = _size(data, at, first, None, _BYTES)
        return _take(data, at, size), at + size
    if 0x90 <= first < 0xA0 or first in _LIST:
        count, at = _size(data, at, first, first - 0x90 if first < 0xA0 else None, _LIST)
        return _items(data, at, count, depth)
    _want(first < 0x90 or first in _MAP)
    count, at = _size(data, at, first, first - 0x80 if first < 0x90 else None, _MAP)
    return _pairs(data, at, count, depth)


def _items(data: bytes, at: int, count: int, depth: int) -> tuple[list[Any], int]:
    found = []
    for _ in range(count):
        item, at = _value(data, at, depth + 1)
        found.append(item)
    return found, at


def _pairs(data: bytes, at: int, count: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    last: bytes | None = None
    for _ in range(count):
        key, at = _value(data, at, MAX_DEPTH)
        _want(isinstance(key, str))
        _want(last is None or last < key.encode())
        last = key.encode()
        found[key], at = _value(data, at, depth + 1)
    return found, at


def _size(data: bytes, at: int, first: int, short: int | None, table) -> tuple[int, int]:
    if short is not None:
        return short, at
    width, least = table[first]
    size, at = _number(data, at, width)
    _want(size >= least)
    return size, at


def _number(data: bytes, at: int, width: int) -> tuple[int, int]:
    return int.from_bytes(_take(data, at, width), "big"), at + width


def _take(data: bytes, at: int, size: int) -> bytes:
    _want(at + size <= len(data))
    return data[at : at + size]


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise NotCanonicalError from error


def _want(holds: bool) -> None:  # noqa: FBT001 - a condition
    if not holds:
        raise NotCanonicalError


_PART = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")
_ENDS = _PART - frozenset("._-")
_HEX = frozenset("0123456789abcdef")


def is_part(text: str) -> bool:
    """Whether a text is a name or a tag, as section 5 of SPEC.md has it."""
    return (
        0 < len(text) <= 128
        and set(text) <= _PART
        and text[0] in _ENDS
        and text[-1] in _ENDS
        and ".." not in text
        and not text.endswith(".lock")
        and text not in ("sha256", "blake3")
        and not (len(text) == 64 and set(text) <= _HEX)
    )


def is_digest(text: str) -> bool:
    """Whether a text is a digest, as section 2 of SPEC.md has it."""
    return text[:7] in ("sha256:", "blake3:") and len(text) == 71 and set(text[7:]) <= _HEX


def is_reference(text: str) -> bool:
    """Whether a text is ``name[:tag]``, ``name@sha256:HEX`` or ``sha256:HEX``."""
    name, at, prefix = text.partition("@")
    if at or text.startswith(("sha256:", "blake3:")):
        prefix = prefix if at else text
        digits = prefix[7:]
        return (not at or is_part(name)) and prefix[:7] == "sha256:" and 8 <= len(digits) <= 64 and set(digits) <= _HEX
    name, colon, tag = text.partition(":")
    return is_part(name) and (not colon or is_part(tag))
