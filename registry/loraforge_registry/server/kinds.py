"""Spectra of an adapter by kind of target: all layers' ``q_proj`` together, small enough to keep and to draw."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import median

import msgpack

from loraforge_registry.spectrum import Spectrum

MAX_KINDS = 48
MAX_POINTS = 48
MAX_NAME = 200
SHARE = 0.99
_VERSION = 1
_LAYER = re.compile(r"\.\d+(?=\.)")
Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Kind:
    """The spectra of one kind: ``low``, ``middle``, ``high`` of the layers' singular values number ``at`` (from 1).

    The spans are of the layers' numbers, ``held`` of the ranks that hold 99 % of ``|dW|_F^2``.
    """

    name: str
    layers: int
    at: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]
    norm: Span
    largest: Span
    stable: Span
    effective: Span
    held: Span


@dataclass(frozen=True, slots=True)
class Kinds:
    """The kinds of an adapter, in the order of their names; ``left_out`` more are not among them."""

    kinds: tuple[Kind, ...]
    left_out: int = 0


def kind_of(target: str) -> str:
    """The name of a target without the numbers of layers: ``model.layers.*.mlp.up_proj``."""
    return _LAYER.sub(".*", target)


def summarise(spectra: Mapping[str, Spectrum]) -> Kinds:
    """Gather targets by kind."""
    groups: dict[str, list[Spectrum]] = {}
    for name, spectrum in spectra.items():
        groups.setdefault(kind_of(name), []).append(spectrum)
    shown = sorted(groups.items())[:MAX_KINDS]
    return Kinds(tuple(_kind(name, found) for name, found in shown), len(groups) - len(shown))


def pack(kinds: Kinds) -> bytes:
    """As a row of the index; ``unpack(pack(kinds)) == kinds``."""
    packed: bytes = msgpack.packb([_VERSION, kinds.left_out, [astuple(kind) for kind in kinds.kinds]])
    return packed


def unpack(row: bytes) -> Kinds | None:
    """Read a row; None where it is of another version."""
    version, left_out, kinds = msgpack.unpackb(row, use_list=False)
    return Kinds(tuple(Kind(*kind) for kind in kinds), left_out) if version == _VERSION else None


def _kind(name: str, found: Sequence[Spectrum]) -> Kind:
    at = _positions(max(len(spectrum.values) for spectrum in found))
    columns = [sorted(s.values[i - 1] for s in found if len(s.values) >= i) for i in at]

    def span(number: Callable[[Spectrum], float]) -> Span:
        return _span(map(number, found))

    return Kind(
        name=name if len(name) <= MAX_NAME else f"…{name[1 - MAX_NAME :]}",
        layers=len(found),
        at=at,
        low=tuple(column[0] for column in columns),
        middle=tuple(median(column) for column in columns),
        high=tuple(column[-1] for column in columns),
        norm=span(lambda s: s.norm),
        largest=span(lambda s: s.largest),
        stable=span(lambda s: s.stable_rank),
        effective=span(lambda s: s.effective_rank),
        held=span(lambda s: s.rank_for(SHARE)),
    )


def _positions(count: int) -> tuple[int, ...]:
    """All of 1 to ``count``, or as many of them as are drawn, evenly, with both ends."""
    if count <= MAX_POINTS:
        return tuple(range(1, count + 1))
    return tuple(1 + i * (count - 1) // (MAX_POINTS - 1) for i in range(MAX_POINTS))


def _span(numbers: Iterable[float]) -> Span:
    found = [float(number) for number in numbers]
    return min(found), max(found)
