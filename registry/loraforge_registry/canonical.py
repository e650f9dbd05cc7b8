"""Canonical msgpack: one value, one spelling (SPEC.md section 3)."""

import math
from collections.abc import Sized
from typing import TypeAlias, TypeVar

import msgpack

from loraforge_registry.errors import ManifestError

Value: TypeAlias = "bool | int | float | str | bytes | list[Value] | dict[str, Value] | None"

T = TypeVar("T", bound=Sized)

MAX_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 32
# A byte can be an empty list of 56: bytes alone bound neither memory nor time. Some 100,000 tensors fit.
MAX_CONTAINERS = 250_000
MAX_VALUES = 1_000_000
_LEAVES = (str, int, bytes, type(None))


def encode(value: Value, *, max_bytes: int | None = MAX_BYTES) -> bytes:
    """Return the one spelling of ``value``; ``decode(encode(v)) == v``.

    Raises:
        ManifestError: a type, number or depth outside the format, or more than ``max_bytes`` or than a reader counts
            to; ``max_bytes=None`` is for what is hashed and never read back.
    """
    count = _Count(unlimited=max_bytes is None)
    try:
        data: bytes = msgpack.packb(_ordered(value, MAX_DEPTH, count), use_bin_type=True, strict_types=True)
    except (OverflowError, UnicodeEncodeError, TypeError) as error:
        raise ManifestError(f"cannot be written as canonical msgpack: {error}") from error
    if max_bytes is not None and len(data) > max_bytes:
        raise ManifestError(f"{len(data)} bytes of msgpack; the limit is {max_bytes}")
    return data


def decode(data: bytes) -> Value:
    """Read canonical msgpack; ``encode(decode(b)) == b``, or ``b`` is refused.

    Raises:
        ManifestError: malformed, over the limits, or a second spelling of a value.
    """
    if len(data) > MAX_BYTES:  # before unpacking: nested empty arrays cost 70 times their size in memory
        raise ManifestError(f"{len(data)} bytes of msgpack; the limit is {MAX_BYTES}")
    count = _Count()
    try:
        value: Value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_ext,
            list_hook=count.add,
            object_hook=count.add,
            max_array_len=MAX_CONTAINERS,
            max_map_len=MAX_CONTAINERS,
        )
    except ManifestError:
        raise
    except (ValueError, msgpack.UnpackException, TypeError, RecursionError) as error:
        raise ManifestError(f"not msgpack: {type(error).__name__} {error}".rstrip()) from error
    if encode(value) != data:
        raise ManifestError("not canonical: another spelling of the same value was expected")
    return value


class _Count:
    """Counts a document's containers and the values in them, while it is read or written."""

    def __init__(self, *, unlimited: bool = False) -> None:
        self._containers, self._values = (-math.inf, -math.inf) if unlimited else (0.0, 0.0)

    def add(self, container: T) -> T:
        self._containers += 1
        self._values += len(container)
        if self._containers > MAX_CONTAINERS or self._values > MAX_VALUES:
            raise ManifestError(f"more than {MAX_CONTAINERS} lists and maps, or {MAX_VALUES} values in them")
        return container


def _ordered(value: Value, depth: int, count: _Count) -> Value:
    """Return ``value`` with sorted maps, refusing what the format does not hold."""
    if depth < 0:
        raise ManifestError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, _LEAVES):  # most are: first
        return value
    if isinstance(value, float):
        if not math.isfinite(value) or (value == 0 and math.copysign(1, value) < 0):
            raise ManifestError(f"{value} is not a number that a manifest can hold")
        return value
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ManifestError("a map key that is not a string")
        # code-point order, which is what UTF-8 bytes sort by
        return {key: _ordered(value[key], depth - 1, count) for key in sorted(count.add(value))}
    if isinstance(value, list | tuple):
        return [_ordered(item, depth - 1, count) for item in count.add(value)]
    raise ManifestError(f"{type(value).__name__} is not a type that a manifest can hold")


def _refuse_ext(code: int, _data: bytes) -> Value:
    raise ManifestError(f"msgpack extension type {code}; none is allowed")
