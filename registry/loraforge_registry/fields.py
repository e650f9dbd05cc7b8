"""Fields of a record that was read: of the right type, or a ManifestError that says what was found."""

import re
from collections.abc import Mapping
from typing import TypeVar

from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ManifestError, ReferenceSyntaxError

_MAX_SIZE = 2**53
T = TypeVar("T")


def check_schema(found: Value, expected: str) -> None:
    """Refuse another schema than ``expected``, and say what helps where it is a later one of that kind.

    Raises:
        ManifestError: another schema.
    """
    if found == expected:
        return
    kind, _, _ = expected.rpartition("/")
    said = found if isinstance(found, str) else type(found).__name__
    if re.fullmatch(rf"{re.escape(kind)}/([0-9]{{1,6}})", said):
        raise ManifestError(f"manifest schema {said}; this version reads {expected}: upgrade loraforge")
    raise ManifestError(f"not a manifest: schema is {said[:60]!r}, expected {expected!r}")


def typed(what: str, value: Value, kind: type[T]) -> T:
    """Return ``value`` if it is of a type; a bool is no int."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ManifestError(f"{what} is {type(value).__name__}, expected {kind.__name__}")
    return value


def integer(what: str, value: Value) -> int:
    """Return a count or size."""
    number = typed(what, value, int)
    if not 0 <= number <= _MAX_SIZE:
        raise ManifestError(f"{what} is {number}, expected 0 to 2^53")
    return number


def keys(what: str, fields: Mapping[str, Value], expected: str) -> None:
    """Refuse a map that has not exactly these keys."""
    if set(fields) != set(expected.split()):
        raise ManifestError(f"{what}: the fields {sorted(fields)[:12]}, expected {expected.split()}")


def mapping(what: str, value: Value, expected: str) -> dict[str, Value]:
    """Return a map of exactly these keys."""
    fields: dict[str, Value] = typed(what, value, dict)
    keys(what, fields, expected)
    return fields


def raw_digest(algorithm: str, value: Value) -> Digest:
    """Return the digest that 32 bytes are."""
    try:
        return Digest.from_raw(algorithm, typed("digest", value, bytes))
    except ReferenceSyntaxError as error:
        raise ManifestError(f"a digest of a wrong length: {error}") from error
