"""A tree as SVG without colours: the base at the left, a card for every node, the branches between them.

Whoever shows it gives the colours, by the classes ``t-…``: a file in a style of its own, a page by its style sheet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

from loraforge_registry.trees import parent_path
from loraforge_registry.words import elide

CARD, GAP_X = 216, 56
HEIGHTS = {3: (62, 20), 2: (46, 12), 1: (30, 8)}  # of a card with so many lines, and what is left between two
BASE_HIGH = 46
MARKS = ("train", "graft", "rebase", "squash", "move", "damaged")
MORE = "more"
_NAME, _NOTE = 24, 32  # characters that fit


@dataclass(frozen=True, slots=True)
class Card:
    """What is drawn of a node: its name, up to two lines below it, how it was made, where a click leads.

    The card of the base has the path ``""``. A ``rank`` makes the branch to it thicker.
    """

    path: str
    name: str
    notes: tuple[str, ...] = ()
    mark: str = ""
    tip: str = ""
    href: str | None = None
    rank: int = 0
    short: str = ""  # beside the name, where there is but one line
    this: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    x: float
    y: float  # of the middle


@dataclass(frozen=True, slots=True)
class Figure:
    """What goes into an ``<svg>`` of this size."""

    width: float
    height: float
    body: str


def figure(base: Card, nodes: Sequence[Card], *, lines: int = 3, edge: float = 28) -> Figure:
    """Draw a tree whose nodes come parents before children; ``lines`` are of a card: 3, 2 or 1.

    With one line, for trees that are higher than a screen, parents are beside the first of their children.
    """
    high, gap = HEIGHTS[lines]
    places = _layout(nodes, high, gap, edge, top=lines == 1)
    width = max(place.x for place in places.values()) + CARD + edge
    height = max(max(place.y for place in places.values()) + max(high, BASE_HIGH) / 2, 0) + edge
    parts = [
        *(_branch(places[parent_path(node.path) or ""], places[node.path], node) for node in nodes),
        _linked(base, _base(base, places[""], max(high, BASE_HIGH))),
        *(_linked(node, _card(node, places[node.path], high, lines)) for node in nodes),
    ]
    return Figure(width, height, "\n".join(parts))


def fitting(nodes: Sequence[Card]) -> int:
    """How many lines a card may have, so that a tree of many leaves is still seen as one."""
    above = {parent_path(node.path) for node in nodes}
    leaves = sum(node.path not in above for node in nodes)
    return 3 if leaves <= 8 else 2 if leaves <= 16 else 1


def shown_first(paths: Sequence[str], most: int) -> tuple[list[str], Mapping[str, int]]:
    """Choose the nodes nearest to the base, and say how many children of each shown one (``""``: the base) are not."""
    near = sorted(paths, key=lambda path: (path.count("/"), path))
    shown, hidden = near[:most], dict[str, int]()
    there = {"", *shown}
    for path in near[most:]:
        above = parent_path(path) or ""
        if above in there:
            hidden[above] = hidden.get(above, 0) + 1
    return sorted(shown), hidden


def more(above: str, number: int) -> Card:
    """The card that stands for the children of a node that are not drawn; its path is behind those of all others."""
    return Card(f"{above}/\uffff".lstrip("/"), f"and {number:,} more", mark=MORE)


def _layout(nodes: Sequence[Card], high: float, gap: float, edge: float, *, top: bool) -> dict[str, _Place]:
    """Put leaves below each other, and every parent in the middle of its children, or beside the first."""
    children: dict[str, list[str]] = {}
    for node in nodes:
        children.setdefault(parent_path(node.path) or "", []).append(node.path)
    places: dict[str, _Place] = {}
    rows = count()
    first = edge + max(high, BASE_HIGH if top or len(nodes) < 2 else 0) / 2

    def place(path: str, depth: int) -> float:
        middles = [place(child, depth + 1) for child in children.get(path, ())]
        middles = middles[:1] if top else middles
        y = (middles[0] + middles[-1]) / 2 if middles else first + next(rows) * (high + gap)
        places[path] = _Place(edge + depth * (CARD + GAP_X), y)
        return y

    place("", 0)
    return places


def _branch(parent: _Place, child: _Place, node: Card) -> str:
    """A curve that leaves and arrives level, as thick as the node's rank says."""
    begin, middle = parent.x + CARD, parent.x + CARD + GAP_X / 2
    thick = 1.5 + min(max(node.rank, 0), 64) ** 0.5 / 2
    return (
        f'<path class="t-branch" stroke-width="{thick:.1f}" d="M{begin:.1f} {parent.y:.1f} C{middle:.1f} '
        f'{parent.y:.1f}, {middle:.1f} {child.y:.1f}, {child.x:.1f} {child.y:.1f}"/>'
    )


def _linked(card: Card, drawn: str) -> str:
    inside = f"<g><title>{escape(card.tip or card.name)}</title>{drawn}</g>"
    return inside if card.href is None else f'<a href="{escape(card.href)}">{inside}</a>'


def _card(node: Card, place: _Place, high: float, lines: int) -> str:
    top, left = place.y - high / 2, place.x + 18
    first, notes = top + {3: 22, 2: 19, 1: 20}[lines], node.notes[: lines - 1]
    short = node.short if lines == 1 else ""
    words = [_text("t-name", left, first, elide(node.name, _NAME - len(short)))]
    words += [_text("t-facts t-end", place.x + CARD - 12, first, short)] if short else []
    kinds = zip(("t-facts", "t-digest"), notes, strict=False)
    words += [_text(kind, left, first + 16 * row, elide(note, _NOTE)) for row, (kind, note) in enumerate(kinds, 1)]
    size = f'y="{top:.1f}" width="{CARD}" height="{high}" rx="9"'
    if node.mark == MORE:
        return "\n".join([f'<rect class="t-card t-more" x="{place.x:.1f}" {size}/>', *words])
    kind = "t-card t-this" if node.this else "t-card"
    mark = f"t-mark t-{node.mark}" if node.mark in MARKS else "t-mark"
    side = f'<rect class="{mark}" x="{place.x:.1f}" y="{top + 8:.1f}" width="4" height="{high - 16}" rx="2"/>'
    return "\n".join([f'<rect class="{kind}" x="{place.x:.1f}" {size}/>', side, *words])


def _base(base: Card, place: _Place, high: float) -> str:
    top, left = place.y - high / 2, place.x + 26
    middle = place.y - (3 if base.notes else -5)
    size = f'y="{top:.1f}" width="{CARD}" height="{high}" rx="{high / 2:.0f}"'
    return "\n".join(
        [
            f'<rect class="t-base" x="{place.x:.1f}" {size}/>',
            _text("t-base-name", left, middle, elide(base.name, _NAME - 2)),
            *(_text("t-base-facts", left, place.y + 13, elide(note, _NOTE - 4)) for note in base.notes[:1]),
        ]
    )


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
