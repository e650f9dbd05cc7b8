"""Changes to documents that blind ones would seldom make: a value for another, a key twice, offsets that add up again.

Each mutator takes good or bad bytes, a source of randomness and a way to change bytes blindly; what it cannot read
it changes blindly.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import msgpack

from loraforge_registry.header import BITS

Blindly = Callable[[bytes], bytes]
Mutator = Callable[[bytes, random.Random, Blindly], bytes]


class Pairs(list):
    """An object's or map's keys and values as they stand, ``[key, value]`` each: a key may stand twice."""


class Token(str):
    """A number or constant as it is spelt."""

    __slots__ = ()


# --- any document ---------------------------------------------------------------------------------------------------


def change(document: Any, generator: random.Random, leaves: list[Any], keys: list[Any]) -> Any:
    """Return the document with one change somewhere; it may be changed itself."""
    places: list[tuple[list[Any], int]] = []
    _collect(document, places)
    if not places or generator.random() < 0.02:
        return copied(generator.choice(leaves))
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        _change_at(*generator.choice(places), places, generator, leaves, keys)
    return document


def _collect(value: Any, places: list[tuple[list[Any], int]]) -> None:
    """Every place that holds a value: in lists, and behind keys."""
    if isinstance(value, Pairs):
        for pair in value:
            places.append((pair, 1))
            _collect(pair[1], places)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            places.append((value, at))
            _collect(item, places)


def _change_at(holder, at, places, generator, leaves, keys) -> None:
    if at >= len(holder):
        return
    value, kind = holder[at], generator.randrange(10)
    if kind < 3:
        holder[at] = copied(generator.choice(leaves))
    elif kind == 3:
        other, where = generator.choice(places)
        if where < len(other):
            holder[at] = copied(other[where])
    elif kind == 4 and isinstance(value, list):
        holder[at] = type(value)(generator.sample(value, generator.randrange(len(value) + 1)))
    elif kind == 5 and isinstance(value, list) and value:
        value.append(copied(generator.choice(value)))
    elif kind == 6:
        holder[at] = generator.choice(([value], [value, value], Pairs([[generator.choice(keys), value]])))
    elif kind == 7 and isinstance(value, Pairs):
        value.append([generator.choice(keys), copied(generator.choice(leaves))])
    elif kind == 8 and isinstance(value, Pairs) and value:
        generator.choice(value)[0] = generator.choice(keys)
    else:
        holder[at] = _nearby(value, generator)


def copied(value: Any) -> Any:
    return type(value)(map(copied, value)) if isinstance(value, list) else value


def _nearby(value: Any, generator: random.Random) -> Any:
    """A value that is only a little different."""
    if isinstance(value, Token):
        return Token(int(value) + generator.choice((-1, 1, 2, 8)) if value.isdigit() and len(value) < 25 else 0)
    if isinstance(value, str):
        at = generator.randrange(len(value) + 1)
        return value[:at] + generator.choice(TEXTS) + value[at + generator.randrange(2) :]
    if isinstance(value, bytes):
        return value[: generator.randrange(len(value) + 1)] + generator.choice((b"", b"\0", value))
    if isinstance(value, float):
        return generator.choice((value + 1, -value, value / 3))
    if isinstance(value, int) and not isinstance(value, bool):
        return value + generator.choice((-1, 1, 2, 8, 256))
    return generator.choice((True, False, None))


TEXTS = ["", "a", ".", "..", "/", "\0", "\n", "\x1b", "\u202e", "é", "\U0001f600", "\ud800", "A", "0", "\\", '"',
         "x" * 130]  # fmt: skip

# --- JSON -----------------------------------------------------------------------------------------------------------

NUMBERS = ["0", "1", "-1", "-0", "2", "4", "8", "16", "64", "1.0", "1.5", "1e3", "1E400", "-0.0", "NaN", "Infinity",
           "-Infinity", "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616",
           "4294967296", "01", "+1", "1_0", "9" * 40, "null", "true", "false", "{}", "[]", '""']  # fmt: skip
JSON_LEAVES: list[Any] = [*map(Token, NUMBERS), *TEXTS]


def read_json(data: bytes) -> Any:
    return json.loads(
        data.decode("utf-8", "surrogatepass"),
        object_pairs_hook=lambda pairs: Pairs(map(list, pairs)),
        parse_int=Token,
        parse_float=Token,
        parse_constant=Token,
    )


def write_json(value: Any) -> str:
    if isinstance(value, Token):
        return value
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{write_json(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(write_json, value)) + "]"
    return json.dumps(value)


def json_mutator(leaves: list[Any], keys: list[str]) -> Mutator:
    """Change a JSON document."""

    def mutate(data: bytes, generator: random.Random, blindly: Blindly) -> bytes:
        if generator.random() < 0.3:
            return blindly(data)
        try:
            document = read_json(data)
        except (ValueError, RecursionError):
            return blindly(data)
        return write_json(change(document, generator, leaves, keys)).encode("utf-8", "surrogatepass")

    return mutate


HEADER_LEAVES = [*JSON_LEAVES, *BITS, Pairs([["dtype", "U8"], ["shape", [Token("1")]],
                                             ["data_offsets", [Token("0"), Token("1")]]])]  # fmt: skip
HEADER_KEYS = ["__metadata__", "dtype", "shape", "data_offsets", "a", "b", "", "format", "é", "\u202e"]


def header(data: bytes, generator: random.Random, blindly: Blindly) -> bytes:
    """Change a safetensors file; half of the time its tensors tile it afterwards."""
    if generator.random() < 0.2:
        return blindly(data)
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    padding = b" " * (len(text) - len(text.rstrip(b" "))) if generator.random() < 0.9 else generator.choice(
        (b" ", b"\n", b"\0", b"\t"))  # fmt: skip
    try:
        document = read_json(text)
    except (ValueError, RecursionError):
        return blindly(data)
    document = change(document, generator, HEADER_LEAVES, HEADER_KEYS)
    if generator.random() < 0.5:
        rest = bytes(_tile(document))
    text = write_json(document).encode("utf-8", "surrogatepass") + padding
    if generator.random() < 0.02:
        text = generator.choice((b" ", b"\n", b"\xef\xbb\xbf")) + text
    return len(text).to_bytes(8, "little") + text + rest


def _tile(document: Any) -> int:
    """Give tensors offsets one behind the other, as far as they have shapes; return where the last one ends."""
    position = 0
    for name, entry in document if isinstance(document, Pairs) else ():
        if name == "__metadata__" or not isinstance(entry, Pairs):
            continue
        fields = {key: value for key, value in entry if isinstance(key, str)}
        shape, dtype = fields.get("shape"), fields.get("dtype")
        if not isinstance(shape, list) or not isinstance(dtype, str) or dtype not in BITS:
            continue
        size = BITS[dtype]
        for dimension in shape:
            size *= int(dimension) if isinstance(dimension, Token) and dimension.isdigit() else 1
        end = position + min(size // 8, 600)
        for pair in entry:
            if pair[0] == "data_offsets":
                pair[1] = [Token(position), Token(end)]
        position = end
    return position


# --- msgpack --------------------------------------------------------------------------------------------------------

MSGPACK_LEAVES: list[Any] = [None, True, False, 0, 1, -1, 31, 127, 128, 255, 256, -32, -33, -128, -129, 65535, 65536,
                             2**31, 2**32 - 1, 2**32, 2**53, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 0.0, 0.5, -1.5,
                             1e300, float("nan"), float("inf"), -0.0, b"", bytes(31), bytes(32), b"x" * 32, bytes(300),
                             [], Pairs(), *TEXTS]  # fmt: skip


def read_msgpack(data: bytes) -> Any:
    return msgpack.unpackb(
        data, raw=False, strict_map_key=False, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)),
        unicode_errors="surrogatepass",
    )  # fmt: skip


_PACKER = msgpack.Packer(unicode_errors="surrogatepass")


def write_msgpack(value: Any, *, in_order: bool = True) -> bytes:
    """Spell a document: keys sorted and each once, or as they stand."""
    if in_order:
        try:
            return _PACKER.pack(_plain(value))
        except (OverflowError, TypeError):  # a number or a key that is none
            _PACKER.reset()
    return _as_it_stands(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Pairs):
        return {key: _plain(item) for key, item in sorted(value, key=_by_key)}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _by_key(pair: list[Any]) -> str:
    return pair[0]


def _as_it_stands(value: Any) -> bytes:
    if isinstance(value, Pairs):
        return _head(0x80, 0xDE, len(value)) + b"".join(map(_as_it_stands, (part for pair in value for part in pair)))
    if isinstance(value, list):
        return _head(0x90, 0xDC, len(value)) + b"".join(map(_as_it_stands, value))
    try:
        return _PACKER.pack(value)
    except OverflowError:
        _PACKER.reset()
        return b"\xc0"


def _head(fix: int, long: int, count: int) -> bytes:
    return bytes([fix | count]) if count < 16 else bytes([long]) + count.to_bytes(2, "big")


def msgpack_mutator(keys: list[Any], leaves: list[Any] = MSGPACK_LEAVES) -> Mutator:
    """Change a msgpack document; mostly its spelling stays canonical."""

    def mutate(data: bytes, generator: random.Random, blindly: Blindly) -> bytes:
        if generator.random() < 0.3:
            return blindly(data)
        try:
            document = read_msgpack(data)
        except (ValueError, msgpack.UnpackException, RecursionError):
            return blindly(data)
        return write_msgpack(change(document, generator, leaves, keys), in_order=generator.random() < 0.9)

    return mutate


# --- lines ----------------------------------------------------------------------------------------------------------


def words(choices: list[bytes], *, finish: Callable[[bytes], bytes] | None = None) -> Mutator:
    """Put words into bytes; ``finish`` makes some of the results whole again."""

    def mutate(data: bytes, generator: random.Random, blindly: Blindly) -> bytes:
        kind = generator.random()
        if kind < 0.5:
            start = generator.randrange(len(data) + 1)
            data = data[:start] + generator.choice(choices) + data[start + generator.choice((0, 0, 1, 4, 70)) :]
        else:
            data = blindly(data)
        return finish(data) if finish is not None and generator.random() < 0.6 else data

    return mutate


MANIFEST_KEYS = ["schema", "base", "content_id", "derivation", "files", "report", "tensors", "name", "revision", "path",
                 "digest", "size", "operation", "version", "parameters", "inputs", "weight", "artifact", "targets",
                 "error", ""]  # fmt: skip
