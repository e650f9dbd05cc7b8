"""What a recipe may say: one schema, every field of one kind, every name defined.

Each error begins with the place that it is about.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loraforge.compose import LATEST, OPERATIONS, Kind, Operation
from loraforge.errors import LoraforgeError
from loraforge.recipe._nodes import Fields, Listing, Node, Place, Scalar, refuse_ambiguous
from loraforge_registry.manifest import MAX_INPUTS
from loraforge_registry.patterns import is_plain

FORMAT = 1
RESULT = "result"

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_MOST = 2**53


@dataclass(frozen=True)
class Source:
    """An input as the recipe names it: a reference into the store, or a path (it contains a slash)."""

    text: str
    place: Place


@dataclass(frozen=True)
class Term:
    """One adapter of a step: a weight, or a gradient of weights, and a filter."""

    adapter: str
    place: Place
    weight: float = 1.0
    selection: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of ``select``: include, exclude, gradient."""


@dataclass(frozen=True)
class Step:
    """One operation of the table on inputs and other steps."""

    name: str
    operation: str
    terms: tuple[Term, ...]
    parameters: Mapping[str, Any]
    place: Place


@dataclass(frozen=True)
class Document:
    """A recipe's contents; ``order`` are the steps that the result needs, each behind those that it needs itself."""

    inputs: Mapping[str, Source]
    steps: Mapping[str, Step]
    order: tuple[Step, ...]
    layers: int | None = None

    @property
    def unused(self) -> list[str]:
        """Steps that the result does not need, and inputs that no such step names."""
        used = {term.adapter for step in self.order for term in step.terms} | {step.name for step in self.order}
        return [name for name in (*self.inputs, *self.steps) if name not in used]


def read_document(node: Node) -> Document:
    """Check a tree against the schema.

    Raises:
        RecipeError: with the place.
    """
    top = _mapping(node, "a recipe", "recipe inputs steps result layers", needed="recipe inputs result")
    if (version := _whole(top.items["recipe"][1])) != FORMAT:
        top.items["recipe"][1].place.refuse(f"recipe is {version}; this version of loraforge reads recipe: {FORMAT}")
    inputs = {name: _source(value) for name, _, value in _named(top.items["inputs"][1], "inputs")}
    steps = {}
    for name, place, value in _named(top.items["steps"][1], "steps") if "steps" in top.items else ():
        if name in inputs or name == RESULT:
            place.refuse(
                f"{name!r} is {'an input' if name in inputs else 'the result'} already; give the step another name"
            )
        steps[name] = _step(name, place, value)
    final = _result(top.items[RESULT][1], inputs)
    if isinstance(final, Step):
        steps[RESULT] = final
    layers = _whole(top.items["layers"][1], least=1) if "layers" in top.items else None
    known = {**inputs, **steps}
    for step in steps.values():
        for term in step.terms:
            _check_known(term.adapter, term.place, known)
    start = final.name if isinstance(final, Step) else final.text
    if isinstance(final, Scalar):
        _check_known(start, final.place, steps)
    return Document(inputs, steps, _ordered(start, steps), layers)


def _step(name: str, place: Place, node: Node) -> Step:
    if not isinstance(node, Fields):
        node.place.refuse(f"step {name!r} is {_what(node)}; expected a mapping with 'from'")
    method = node.items.get("method")
    operation = "linear" if method is None else _text(method[1], "a method")
    if operation not in LATEST or not OPERATIONS[operation, LATEST[operation]].offered:
        assert method is not None, "linear is there"  # noqa: S101 - of the table
        method[1].place.refuse(f"there is no method {operation[:60]!r}{_near(operation, LATEST)}")
    row = OPERATIONS[operation, LATEST[operation]]
    fields = _mapping(node, f"a {operation} step", " ".join(["method from", *row.parameters]), needed="from")
    terms = _terms(fields.items["from"][1], row, operation)
    return Step(name, operation, terms, _parameters(fields, operation, row), place)


def _result(node: Node, inputs: Mapping[str, Source]) -> Step | Scalar:
    """A step's name; or a mapping that re-ranks one."""
    if isinstance(node, Scalar):
        if _text(node, "a step's name") in inputs:
            node.place.refuse(f"{node.text!r} is an input; a result is what a step makes")
        return node
    row = OPERATIONS["rerank", LATEST["rerank"]]
    fields = _mapping(node, "the result", " ".join(["from", *row.parameters]), needed="from")
    if len(fields.items) == 1:
        return _result(fields.items["from"][1], inputs)
    terms = _terms(fields.items["from"][1], row, "the result")
    return Step(RESULT, "rerank", terms, _parameters(fields, "rerank", row), fields.place)


def _parameters(fields: Fields, operation: str, row: Operation) -> dict[str, Any]:
    found = {
        name: _READ[row.parameters[name]](value) for name, (_, value) in fields.items.items() if name in row.parameters
    }
    try:
        row.check(**found)
    except LoraforgeError as error:
        fields.place.refuse(f"{operation}: {error}")
    return found


def _terms(node: Node, row: Operation, what: str) -> tuple[Term, ...]:
    if not row.many:
        if not isinstance(node, Scalar):
            node.place.refuse(f"{what} is from one adapter; expected its name, found {_what(node)}")
        return (Term(_text(node, "a name"), node.place),)
    if not isinstance(node, Listing) or not node.items:
        node.place.refuse(
            f"expected a list of terms, such as '- {{adapter: french, weight: 0.7}}', found {_what(node)}"
        )
    if len(node.items) > MAX_INPUTS:
        node.place.refuse(f"{len(node.items)} terms; the limit is {MAX_INPUTS}")
    return tuple(_term(item) for item in node.items)


def _term(node: Node) -> Term:
    if isinstance(node, Scalar):
        return Term(_text(node, "a name"), node.place)
    fields = _mapping(node, "a term", "adapter weight include exclude", needed="adapter")
    read = {name: value for name, (_, value) in fields.items.items()}
    selection: dict[str, Any] = {what: _patterns(read[what]) for what in ("include", "exclude") if what in read}
    weight, gradient = 1.0, isinstance(read.get("weight"), Listing)
    if "weight" in read:
        if gradient:
            selection["gradient"] = _numbers(read["weight"])
        else:
            weight = _number(read["weight"])
    if selection:
        select = OPERATIONS["select", LATEST["select"]]
        try:
            select.check(**selection)
        except LoraforgeError as error:
            node.place.refuse(str(error))
    return Term(_text(read["adapter"], "a name"), node.place, weight, selection)


def _source(node: Node) -> Source:
    text = _text(node, "a reference or a path")
    if "://" in text:
        node.place.refuse(f"{text[:80]!r} is a URL; pull it into the store first, and name it as it is called there")
    return Source(text, node.place)


def _ordered(start: str, steps: Mapping[str, Step]) -> tuple[Step, ...]:
    """Return what ``start`` needs, itself last. Not by recursion: a chain may be longer than Python's stack."""
    done: dict[str, Step] = {}
    path = {start: iter(steps[start].terms)}
    while path:
        name = next(reversed(path))
        for term in path[name]:
            if term.adapter in path:
                term.place.refuse(f"step {name!r} needs {term.adapter!r}, which needs {name!r}: a circle")
            if term.adapter in steps and term.adapter not in done:
                path[term.adapter] = iter(steps[term.adapter].terms)
                break
        else:
            done[name] = steps[name]
            del path[name]
    return tuple(done.values())


def _check_known(name: str, place: Place, known: Mapping[str, object]) -> None:
    if name not in known:
        place.refuse(f"there is no input or step {name[:60]!r}{_near(name, known)}")


def _named(node: Node, what: str) -> list[tuple[str, Place, Node]]:
    if not isinstance(node, Fields) or not node.items:
        node.place.refuse(f"{what} is {_what(node)}; expected a mapping of names")
    if len(node.items) > MAX_INPUTS:
        node.place.refuse(f"{len(node.items)} {what}; the limit is {MAX_INPUTS}")
    for name, (place, _) in node.items.items():
        if not _NAME.fullmatch(name):
            place.refuse(
                f"{name[:80]!r} is not a name; expected a letter, then letters, digits, '_', '.' and '-', at most 64"
            )
    return [(name, place, value) for name, (place, value) in node.items.items()]


def _mapping(node: Node, what: str, known: str, *, needed: str) -> Fields:
    if not isinstance(node, Fields):
        node.place.refuse(f"{what} is {_what(node)}; expected a mapping with {', '.join(needed.split())}")
    allowed = dict.fromkeys(known.split())
    for key, (place, _) in node.items.items():
        if key not in allowed:
            place.refuse(f"{what} has no field {key[:60]!r}{_near(key, allowed)}")
    for key in needed.split():
        if key not in node.items:
            node.place.refuse(f"{what} without {key!r}")
    return node


def _scalar(node: Node, expected: str) -> Scalar:
    if not isinstance(node, Scalar):
        node.place.refuse(f"{_what(node)}; expected {expected}")
    return node


def _text(node: Node, what: str = "text") -> str:
    scalar = _scalar(node, what)
    refuse_ambiguous(scalar, what)
    if not scalar.text or len(scalar.text) > 4096 or not scalar.text.isprintable():
        scalar.place.refuse(f"{scalar.text[:60]!r}: expected {what}, printable, of 1 to 4096 characters")
    return scalar.text


def _number(node: Node) -> float:
    scalar = _unquoted(node, "a number")
    if not _NUMBER.fullmatch(scalar.text):
        scalar.place.refuse(f"{scalar.text[:60]!r}: expected a number in decimals, such as 0.7 or 1e-3")
    value = float(scalar.text)
    if not math.isfinite(value):
        scalar.place.refuse(f"{scalar.text[:60]}: beyond the numbers there are")
    return value + 0.0  # no -0.0


def _whole(node: Node, least: int = 0) -> int:
    scalar = _unquoted(node, "a whole number")
    if not _WHOLE.fullmatch(scalar.text):
        scalar.place.refuse(f"{scalar.text[:60]!r}: expected a whole number in decimals, such as 16")
    if len(scalar.text) > 17 or not least <= int(scalar.text) <= _MOST:
        scalar.place.refuse(f"{scalar.text[:60]}: expected {least} to 2^53")
    return int(scalar.text)


def _flag(node: Node) -> bool:
    scalar = _unquoted(node, "true or false")
    if scalar.text not in ("true", "false"):
        scalar.place.refuse(f"{scalar.text[:60]!r}: expected true or false")
    return scalar.text == "true"


def _unquoted(node: Node, expected: str) -> Scalar:
    scalar = _scalar(node, expected)
    if not scalar.plain:
        scalar.place.refuse(f"text in quotes; expected {expected}, without")
    if not scalar.text:
        scalar.place.refuse(f"nothing here; expected {expected}")
    return scalar


def _numbers(node: Node) -> list[float]:
    if not isinstance(node, Listing) or not node.items:
        node.place.refuse(f"{_what(node)}; expected a list of numbers")
    return [_number(item) for item in node.items]


def _patterns(node: Node) -> str | list[str]:
    """A list of names; or one text: names with commas between, all-linear, attention, or a regular expression."""
    if isinstance(node, Listing):
        return [_text(item, "a name") for item in node.items]
    text = _text(node, "names, or a regular expression")
    names = [part.strip() for part in text.split(",")]
    if text in ("all-linear", "attention") or not all(name and is_plain(name) for name in names):
        return text
    return names


_READ: Mapping[Kind, Callable[[Node], Any]] = {
    "flag": _flag,
    "whole": _whole,
    "number": _number,
    "text": _text,
    "numbers": _numbers,
    "patterns": _patterns,
}


def _what(node: Node) -> str:
    if isinstance(node, Scalar):
        return f"the text {node.text[:40]!r}" if node.text else "nothing"
    if isinstance(node, Listing):
        return "a list" if node.items else "an empty list"
    return "a mapping" if node.items else "an empty mapping"


def _near(word: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(word.replace("-", "_"), known, 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; there is {', '.join(list(known)[:12])}"
