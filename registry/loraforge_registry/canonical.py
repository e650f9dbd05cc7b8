"""Canonical msgpack: one value, one spelling (SPEC.md section 3)."""

import math
from typing import TypeAlias

import msgpack

from loraforge_registry.errors import ManifestError

Value: TypeAlias = "bool | int | float | str | bytes | list[Value] | dict[str, Value] | None"

MAX_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 32


def encode(value: Value, *, max_bytes: int | None = MAX_BYTES) -> bytes:
    """Return the one spelling of ``value``; ``decode(encode(v)) == v``.

    Raises:
        ManifestError: a type, number or depth outside the format, or more than ``max_bytes``.
    """
    try:
        data: bytes = msgpack.packb(_ordered(value, MAX_DEPTH), use_bin_type=True, strict_types=True)
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
    try:
        value: Value = msgpack.unpackb(data, raw=False, strict_map_key=True, ext_hook=_refuse_ext)
    except ManifestError:
        raise
    except (ValueError, msgpack.UnpackException, TypeError, RecursionError) as error:
        raise ManifestError(f"not msgpack: {type(error).__name__} {error}".rstrip()) from error
    if encode(value) != data:
        raise ManifestError("not canonical: another spelling of the same value was expected")
    return value


def _ordered(value: Value, depth: int) -> Value:
    """Return ``value`` with sorted maps, refusing what the format does not hold."""
    if depth < 0:
        raise ManifestError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ManifestError("a map key that is not a string")
        # code-point order, which is what UTF-8 bytes sort by
        return {key: _ordered(value[key], depth - 1) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_ordered(item, depth - 1) for item in value]
    if isinstance(value, float) and (not math.isfinite(value) or (value == 0 and math.copysign(1, value) < 0)):
        raise ManifestError(f"{value} is not a number that a manifest can hold")
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise ManifestError(f"{type(value).__name__} is not a type that a manifest can hold")


def _refuse_ext(code: int, _data: bytes) -> Value:
    raise ManifestError(f"msgpack extension type {code}; none is allowed")
