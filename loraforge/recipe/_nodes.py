"""YAML as a tree of texts with their places: no value is converted here, and nothing is ever constructed.

Of YAML only what says one thing to every reader: one document of mappings, lists and texts. Anchors, aliases, tags,
directives, merge keys and keys that stand twice are refused while the events arrive, so that a few lines that would
unfold to gigabytes cost what the few lines cost. What a text means (a number, a name) the schema decides.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import yaml
from yaml.reader import ReaderError

from loraforge.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 12


@dataclass(frozen=True)
class Place:
    """Where something stands: counted from 1, as editors do."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"

    def refuse(self, message: str) -> NoReturn:
        """Raise what is wrong here."""
        raise RecipeError(f"{self}: {message}")


@dataclass(frozen=True)
class Scalar:
    """A text as it stands there; ``plain`` where it has no quotes, so that other readers may take it for more."""

    text: str
    plain: bool
    place: Place


@dataclass(frozen=True)
class Listing:
    """Several values in order."""

    items: "tuple[Node, ...]"
    place: Place


@dataclass(frozen=True)
class Fields:
    """Values by key, with the keys' places."""

    items: "Mapping[str, tuple[Place, Node]]"
    place: Place


Node: TypeAlias = Scalar | Listing | Fields


def read_nodes(data: bytes, file: str) -> Node:
    """Return the tree of a document.

    Raises:
        RecipeError: with file, line and column: not UTF-8, not YAML, over a limit, or more than the plain part of YAML.
    """
    if len(data) > MAX_BYTES:
        Place(file, 1, 1).refuse(f"{len(data)} bytes; a recipe has at most {MAX_BYTES}")
    text = _decoded(data, file)
    try:
        return _Reader(text, file).document()
    except ReaderError as error:
        at_position(text, error.position, file).refuse(f"the character U+{error.character:04X} is not allowed")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file, 1, 1)
        place.refuse(f"not YAML: {error.problem or error.context}")


def at_position(text: str, position: int, file: str) -> Place:
    """Return the place of a character by its number."""
    before = text[:position]
    return Place(file, before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1)


class _Reader:
    """Events of one document, refused as they come where they are not the plain part of YAML."""

    def __init__(self, text: str, file: str) -> None:
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._file = file

    def document(self) -> Node:
        self._next(yaml.StreamStartEvent)
        start = self._next()
        if isinstance(start, yaml.StreamEndEvent):
            Place(self._file, 1, 1).refuse("is empty; expected a recipe")
        if getattr(start, "version", None) or getattr(start, "tags", None):
            self._place(start).refuse("a directive (%); leave it out")
        found = self._node(self._next(), MAX_DEPTH)
        self._next(yaml.DocumentEndEvent)
        more = self._next()
        if not isinstance(more, yaml.StreamEndEvent):
            self._place(more).refuse("a second document; a recipe is one")
        return found

    def _next(self, kind: type[yaml.Event] = yaml.Event) -> yaml.Event:
        event = next(self._events)
        assert isinstance(event, kind)  # noqa: S101 - PyYAML's grammar
        return event

    def _place(self, event: yaml.Event) -> Place:
        return Place(self._file, event.start_mark.line + 1, event.start_mark.column + 1)

    def _node(self, event: yaml.Event, depth: int) -> Node:
        place = self._place(event)
        if isinstance(event, yaml.AliasEvent):
            place.refuse(f"an alias (*{event.anchor:.40}); write the value itself")
        if event.anchor is not None:
            place.refuse(f"an anchor (&{event.anchor:.40}); recipes have none")
        if event.tag is not None:
            place.refuse(f"a tag ({event.tag:.60}); recipes have none")
        if isinstance(event, yaml.ScalarEvent):
            return Scalar(event.value, event.implicit[0], place)
        if depth == 0:
            place.refuse(f"nested deeper than {MAX_DEPTH}")
        if isinstance(event, yaml.SequenceStartEvent):
            return Listing(tuple(self._items(depth)), place)
        return self._fields(place, depth)

    def _items(self, depth: int) -> Iterator[Node]:
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            yield self._node(event, depth - 1)

    def _fields(self, place: Place, depth: int) -> Fields:
        found: dict[str, tuple[Place, Node]] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._node(event, depth - 1)
            if not isinstance(key, Scalar):
                key.place.refuse("a key that is a list or mapping; expected a name")
            refuse_ambiguous(key, "a key")
            if key.text in found:
                key.place.refuse(f"{key.text[:60]!r} stands twice; first in line {found[key.text][0].line}")
            found[key.text] = key.place, self._node(self._next(), depth - 1)
        return Fields(found, place)


def _decoded(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        good = data[: error.start].decode("utf-8")
        at_position(good, len(good), file).refuse(f"not UTF-8: the byte 0x{data[error.start]:02x}")


# What YAML 1.1 or 1.2 reads as something else than text: null, booleans, numbers (octal, hexadecimal, binary,
# sexagesimal, with underscores), dates, merge and value keys.
_AMBIGUOUS = re.compile(
    r"~|null|y|n|yes|no|on|off|true|false|<<|="
    r"|[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:e[-+]?[0-9]+)?"
    r"|[-+]?0[box][0-9a-f_]+|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?|[-+]?\.(?:inf|nan)"
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*",
    re.IGNORECASE,
)


def refuse_ambiguous(scalar: Scalar, what: str) -> None:
    """Refuse a text without quotes that some reader of YAML takes for a number, boolean, date or nothing."""
    if scalar.plain and not scalar.text:
        scalar.place.refuse(f"nothing here; expected {what}")
    if scalar.plain and _AMBIGUOUS.fullmatch(scalar.text):
        scalar.place.refuse(
            f"{scalar.text[:60]} without quotes is a number, boolean, date or nothing to some readers of YAML; as "
            f'{what} write "{scalar.text[:60]}"'
        )
