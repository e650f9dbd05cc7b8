"""A tree as a picture: the base at the left, a card for every node, the branches between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

from loraforge_cli.output import elide
from loraforge_cli.tree_view import Shown, View
from loraforge_registry.trees import parent_path

CARD, HIGH, GAP_X, GAP_Y, EDGE = 216, 62, 74, 20, 28
_STYLE = """
  text { font-family: Inter, "Segoe UI", "Helvetica Neue", Helvetica, Arial, sans-serif; }
  .paper { fill: #fbfaf7; }
  .card { fill: #ffffff; stroke: #ddd8cd; }
  .name { fill: #23201b; font-weight: 600; font-size: 14px; }
  .facts { fill: #6b655b; font-size: 11.5px; }
  .digest { fill: #a39c8f; font-size: 10.5px; }
  text.digest { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
  .branch { fill: none; stroke: #b9ae9b; stroke-linecap: round; }
  .base { fill: #3b352c; }
  .base-name { fill: #fbfaf7; font-weight: 600; font-size: 14px; }
  .base-facts { fill: #cfc7b8; font-size: 11.5px; }
  .mark { fill: #8f8778; }
  .train { fill: #4c8b6b; }
  .graft { fill: #c98a2b; }
  .rebase, .squash, .move { fill: #4f76b3; }
  .damaged { fill: #c0453a; }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #1d1b18; }
    .card { fill: #292622; stroke: #423d36; }
    .name { fill: #f1ece2; }
    .facts { fill: #b3ab9d; }
    .digest { fill: #7d766a; }
    .branch { stroke: #6a6152; }
    .base { fill: #e9e2d4; }
    .base-name { fill: #23201b; }
    .base-facts { fill: #5d564a; }
  }
"""


@dataclass(frozen=True)
class _Place:
    x: float
    y: float  # of the middle


def svg(tree: View) -> str:
    """Return the picture as an SVG document."""
    places = _layout(tree)
    width = max(place.x for place in places.values()) + CARD + EDGE
    height = max(place.y for place in places.values()) + HIGH / 2 + EDGE
    title = escape(str(tree.ref or tree.digest))
    size = f'width="{width:.0f}" height="{height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
        f"<title>{title}</title><style>{_STYLE}</style>",
        f'<rect class="paper" {size} rx="14"/>',
        *(_branch(places[parent_path(node.path) or ""], places[node.path], node) for node in tree.nodes),
        _base(tree, places[""]),
        *(_card(node, places[node.path]) for node in tree.nodes),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _layout(tree: View) -> dict[str, _Place]:
    """Put leaves below each other, and every parent in the middle of its children."""
    places: dict[str, _Place] = {}
    rows = _counted()

    def place(path: str, depth: int) -> float:
        middles = [place(child.path, depth + 1) for child in tree.children(path)]
        y = (middles[0] + middles[-1]) / 2 if middles else EDGE + HIGH / 2 + next(rows) * (HIGH + GAP_Y)
        places[path] = _Place(EDGE + depth * (CARD + GAP_X), y)
        return y

    place("", 0)
    return places


def _counted() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _branch(parent: _Place, child: _Place, node: Shown) -> str:
    """A curve that leaves and arrives level, as thick as the node's rank says."""
    begin, middle = parent.x + CARD, parent.x + CARD + GAP_X / 2
    thick = 1.5 + min(max(node.ranks, default=0), 64) ** 0.5 / 2
    return (
        f'<path class="branch" stroke-width="{thick:.1f}" d="M{begin:.1f} {parent.y:.1f} C{middle:.1f} {parent.y:.1f}, '
        f'{middle:.1f} {child.y:.1f}, {child.x:.1f} {child.y:.1f}"/>'
    )


def _card(node: Shown, place: _Place) -> str:
    top = place.y - HIGH / 2
    kind = "damaged" if node.problem else node.made_by
    text = place.x + 18
    return "\n".join(
        [
            f"<g><title>{escape(f'{node.path}  {node.digest}')}</title>",
            f'<rect class="card" x="{place.x:.1f}" y="{top:.1f}" width="{CARD}" height="{HIGH}" rx="9"/>',
            f'<rect class="mark {escape(kind)}" x="{place.x:.1f}" y="{top + 10:.1f}" width="4" height="42" rx="2"/>',
            _text("name", text, top + 22, elide(node.name, 24)),
            _text("facts", text, top + 38, elide(" · ".join(_short_facts(node)), 36)),
            _text("digest", text, top + 53, f"sha256:{node.digest.short}"),
            "</g>",
        ]
    )


def _short_facts(node: Shown) -> list[str]:
    return [fact.removesuffix(" parameters") for number, fact in enumerate(node.facts) if number != 2]


def _base(tree: View, place: _Place) -> str:
    top, text = place.y - HIGH / 2, place.x + 18
    name = tree.record.base_name.rstrip("/").rpartition("/")[2] or tree.record.base_name
    return "\n".join(
        [
            f"<g><title>{escape(tree.record.base_name)}</title>",
            f'<rect class="base" x="{place.x:.1f}" y="{top:.1f}" width="{CARD}" height="{HIGH}" rx="{HIGH / 2:.0f}"/>',
            _text("base-name", text + 10, place.y - 3, elide(name, 22)),
            _text("base-facts", text + 10, place.y + 14, f"the base · {len(tree.nodes)} nodes"),
            "</g>",
        ]
    )


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
