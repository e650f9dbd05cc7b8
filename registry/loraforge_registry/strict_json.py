"""JSON without Python's leniency: no key twice, no NaN, no -0, no lone surrogates, limits on size and depth."""

import json
import math
from typing import TypeAlias

from loraforge_registry.errors import FormatError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def loads(data: bytes, *, max_bytes: int, max_depth: int) -> Json:
    """Parse UTF-8 JSON.

    Raises:
        FormatError: malformed, a key twice in one object, NaN, infinity or -0, an unpaired surrogate, or over a limit.
    """
    if len(data) > max_bytes:
        raise FormatError(f"{len(data)} bytes of JSON; the limit is {max_bytes}")
    try:
        text = data.decode("utf-8")
        # int itself is the quick way; only it would take -0 for 0, which other readers take for a float
        whole = _whole if "-0" in text else int
        value: Json = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=whole)
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise FormatError(f"nested deeper than {max_depth}") from error
    except FormatError:
        raise
    except json.JSONDecodeError as error:
        raise FormatError(f"not JSON: {str(error)[:200]}") from error
    except ValueError as error:  # Python's limit
        raise FormatError("a whole number of thousands of digits") from error
    _check(value, max_depth, max_depth)
    return value


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for key, value in pairs:
        if key in found:
            raise FormatError(f"the key {key[:100]!r} stands twice in one object")
        found[key] = value
    return found


def _whole(digits: str) -> int:
    if digits == "-0":
        raise FormatError("-0 is not a whole number; 0 is")
    return int(digits)


def _no_constant(name: str) -> Json:
    raise FormatError(f"{name} is not JSON")


def _check(value: Json, depth: int, max_depth: int) -> None:
    if depth < 0:
        raise FormatError(f"nested deeper than {max_depth}")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check(item, depth - 1, max_depth)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1, max_depth)
    elif isinstance(value, str):
        _check_text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise FormatError("a number too large for float64")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError("an unpaired surrogate in a string") from error
