"""A lineage drawn as lines that run together: what an adapter was made from above it, what was made from it below.

One row for each adapter, or value that was never stored: it fits into any column, and every name is a link. What
whoever looks may not see has neither name nor lineage here, only the digest that another adapter's record states.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Artifact, Derivation, Input
from loraforge_registry.server.relations import Place, Relations
from loraforge_registry.server.web import text
from loraforge_registry.words import elide

MAX_ROWS, MAX_INPUTS, MAX_BELOW, MAX_DEPTH = 40, 6, 12, 12
TITLE, NOTE = 28, 40  # characters that fit beside the lines on a telephone
PITCH, LANES, CORNER = 18, 110, 11  # between lines, all of them together, and where one turns
HIGH, LOW, DOT = 48, 32, 17
_TOLD = ("rank", "energy", "max_parameters", "density", "steps", "epochs", "lr")


@dataclass
class _Node:
    """One row: an adapter or a value, and what runs into it from above."""

    title: str
    path: str | None = None
    note: str = ""
    weight: str = ""
    mark: str = "seen"
    above: list["_Node"] = field(default_factory=list)
    lane: int = 0
    y: float = 0


def figure(label: str, derivation: Derivation | None, found: Relations, made: Sequence[Place]) -> str:
    """The drawing, empty for an adapter that has to do with no other."""
    if not made and (derivation is None or not derivation.inputs):
        return ""
    this = _Node(label, note=_operation(derivation), mark="this")
    _add_sources(this, derivation, found)
    rows = list(_in_order(this, 0))
    below = [_Node(place.label, place.path, _operation(place.derivation), lane=1) for place in made[:MAX_BELOW]]
    below += [_Node(f"and {len(made) - MAX_BELOW} more", mark="more", lane=1)] if len(made) > MAX_BELOW else []
    high = _place([*rows, *below])
    lanes = max(node.lane for node in (*rows, *below)) + 1
    pitch = min(PITCH, LANES / lanes)
    lines = [_line(source, node, pitch) for node in rows for source in node.above]
    lines += [_line(this, node, pitch) for node in reversed(below)]
    start = (lanes - 1) * pitch + 2 * DOT
    drawn = "".join(_row(node, pitch, start) for node in (*rows, *below))
    return (
        f"<svg class=lineage width='100%' height={high:.0f} fill=none role=group aria-label='Lineage'>"
        f"{''.join(lines)}{drawn}</svg>"
    )


def _add_sources(this: _Node, derivation: Derivation | None, found: Relations) -> None:
    """Hang on what a derivation names, the nearest first: where there are too many, the farthest are left out."""
    left, drawn = MAX_ROWS, set[Digest]()
    todo = deque([(this, derivation, 0)])
    while todo:
        node, made, depth = todo.popleft()
        inputs = made.inputs if made is not None else ()
        if inputs and (left < min(len(inputs), MAX_INPUTS) + 1 or depth == MAX_DEPTH):
            node.above.append(_Node("further back", mark="more"))
            continue
        for item in inputs[:MAX_INPUTS]:
            source, below = _source(item, found)
            node.above.append(source)
            seen = isinstance(item.source, Artifact) and item.source.digest in drawn
            if isinstance(item.source, Artifact):
                drawn.add(item.source.digest)
            if seen and below is not None and below.inputs:
                source.note = "as above"
            else:
                todo.append((source, below, depth + 1))
        if len(inputs) > MAX_INPUTS:
            node.above.append(_Node(f"and {len(inputs) - MAX_INPUTS} more", mark="more"))
        left -= len(node.above)


def _source(item: Input, found: Relations) -> tuple[_Node, Derivation | None]:
    weight = "" if item.weight == 1 else f"{item.weight:.4g} \N{MULTIPLICATION SIGN} "
    if isinstance(item.source, Derivation):
        return _Node(_operation(item.source), weight=weight, mark="step"), item.source
    digest = item.source.digest if isinstance(item.source, Artifact) else item.source
    place = found.places.get(digest)
    if place is None:
        what = "an adapter" if isinstance(item.source, Artifact) else "a value in no store"
        return _Node(digest.short, note=what, weight=weight, mark="unseen"), None
    derivation = place.derivation
    return _Node(place.label, place.path, _operation(derivation), weight), derivation


def _operation(derivation: Derivation | None) -> str:
    if derivation is None:
        return ""
    told = [f"{key} {value}" for key in _TOLD for value in [derivation.parameters.get(key)] if _is_short(value)]
    return " · ".join([derivation.operation, *told])


def _is_short(value: Value) -> TypeGuard[int | float | str]:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _in_order(node: _Node, lane: int) -> Iterator[_Node]:
    """Yield what runs into a node, then the node: each source on its own line until they meet."""
    node.lane = lane
    for number, source in enumerate(node.above):
        yield from _in_order(source, lane + number)
    yield node


def _place(nodes: Sequence[_Node]) -> float:
    y = 0.0
    for node in nodes:
        node.y = y + DOT
        y += HIGH if node.note else LOW
    return y + 2


def _line(upper: _Node, lower: _Node, pitch: float) -> str:
    """Down on the line of the upper, and around a corner where the lower has another."""
    begin, end = _x(upper, pitch), _x(lower, pitch)
    turn = min(CORNER, abs(end - begin), lower.y - upper.y)
    side = turn if end > begin else -turn
    corner = f"V{lower.y - turn:.1f}Q{begin:.1f} {lower.y:.1f} {begin + side:.1f} {lower.y:.1f}H{end:.1f}"
    return f"<path class=l-line d='M{begin:.1f} {upper.y:.1f}{corner if turn else f'V{lower.y:.1f}'}'/>"


def _row(node: _Node, pitch: float, start: float) -> str:
    title = text(elide(node.title, TITLE - len(node.weight)))
    title = title if node.path is None else f"<a href='{text(node.path)}'>{title}</a>"
    weight = f"<tspan class=l-weight>{text(node.weight)}</tspan>" if node.weight else ""
    words = f"<text class='l-title l-{node.mark}' x={start:.1f} y={node.y + 5:.1f}>{weight}{title}</text>"
    if node.note:
        words += f"<text class=l-note x={start:.1f} y={node.y + 22:.1f}>{text(elide(node.note, NOTE))}</text>"
    return f"<g><title>{text(node.title[:200])}</title>{_dot(node, pitch)}{words}</g>"


def _dot(node: _Node, pitch: float) -> str:
    x, y = _x(node, pitch), node.y
    radius = {"this": 6, "seen": 5, "step": 3.5}.get(node.mark, 4)
    ring = f"<circle class=l-ring cx={x:.1f} cy={y:.1f} r=9.5 />" if node.mark == "this" else ""
    return f"{ring}<circle class='l-dot l-dot-{node.mark}' cx={x:.1f} cy={y:.1f} r={radius} />"


def _x(node: _Node, pitch: float) -> float:
    return 11 + node.lane * pitch
