"""Spectra drawn: a panel for each kind of target, all on the same axes, and the same numbers as a table.

A panel is a picture of fixed proportions that grows with its column; its words stand beside it in HTML, where they
wrap. Colours are in the style sheet: the pages' policy allows none here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loraforge_registry.server.kinds import SHARE, Kind, Kinds, Span
from loraforge_registry.server.web import table, text

MAX_PANELS = 18
WIDTH, HIGH = 184, 126
LEFT, RIGHT, TOP, BOTTOM = 37, 178, 8, 105
DECADES = 6  # below this share of the largest, what is left is rounding: it would flatten everything else
LABEL = 34


@dataclass(frozen=True)
class _Axes:
    """What all panels share: ranks 1 to ``count``, and logarithms from ``low`` to ``high``."""

    count: int
    low: float
    high: float

    def x(self, rank: float) -> float:
        return LEFT + (RIGHT - LEFT) * (rank - 1) / max(self.count - 1, 1)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low) if value > 0 else 0.0
        return BOTTOM - (BOTTOM - TOP) * min(max(share, 0.0), 1.0)


def section(known: Kinds | str | None) -> str:
    """The part of a page: the figure, why there is none, or that it is under way."""
    if known is None:
        shown = "<p class=quiet>It is being worked out. <a href=''>Look again</a> in a moment.</p>"
    elif isinstance(known, str):
        shown = f"<p class=quiet>There is none: {text(known)}.</p>"
    else:
        shown = figure(known)
    return f"<h2 id=spectrum>Spectrum</h2>{shown}"


def figure(found: Kinds) -> str:
    """The drawing and the table of what is known of an adapter's spectra."""
    kinds = [kind for kind in found.kinds if kind.largest[1] > 0]
    still = len(found.kinds) - len(kinds)
    labels = dict(zip(found.kinds, _short([kind.name for kind in found.kinds]), strict=True))
    drawn, axes = kinds[:MAX_PANELS], _axes(kinds)
    panels = "".join(_panel(kind, labels[kind], axes) for kind in drawn)
    said = [] if not kinds else [_legend(several=any(kind.layers > 1 for kind in drawn))]
    said += [f"{len(kinds) - len(drawn)} kinds more are in the table alone."] if len(kinds) > len(drawn) else []
    said += [f"{found.left_out} kinds more are left out."] if found.left_out else []
    said += ["Nothing moves yet: dW is zero."] if found.kinds and not kinds else []
    said += [f"On {still} of the kinds dW is zero."] if kinds and still else []
    return (
        f"<p class=quiet>{' '.join(said)}</p><div class=panels>{panels}</div>"
        f"{_table(found.kinds, labels) if found.kinds else ''}"
    )


def _legend(*, several: bool) -> str:
    if several:
        line = "The line is the median of the layers, the band all of them"
    else:
        line = "The line is the one layer that there is"
    return (
        f"Singular values of dW, the largest first, on one scale. {line}; "
        f"the mark is the rank that holds {SHARE:.0%} of <span class=whole>|dW|²</span> in every layer."
    )


def _axes(kinds: Sequence[Kind]) -> _Axes:
    most = max((kind.high[0] for kind in kinds), default=1.0)
    least = min((value for kind in kinds for value in kind.low if value > most * 10**-DECADES), default=most)
    low, high = math.log10(least), math.log10(most)
    room = max((high - low) * 0.06, 0.05)
    return _Axes(max((kind.at[-1] for kind in kinds), default=1), low - room, high + room)


def _panel(kind: Kind, label: str, axes: _Axes) -> str:
    layers = f"{kind.layers} layers" if kind.layers > 1 else ""
    said = f"{label}: from {_number(kind.high[0])} to {_number(kind.low[-1])} over {kind.at[-1]} singular values"
    return (
        f"<figure class=panel><figcaption><b title='{text(kind.name)}'>{text(label)}</b> "
        f"<span class=quiet>{layers}</span></figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HIGH}' fill=none role=img aria-label='{text(said)}'>"
        f"{_grid(axes)}{_marks(kind, axes)}</svg></figure>"
    )


def _grid(axes: _Axes) -> str:
    rows = [
        f"<path class=f-grid d='M{LEFT} {y:.1f}H{RIGHT}'/><text class=f-tick x={LEFT - 6} y={y + 3.5:.1f} "
        f"text-anchor=end>{_number(value)}</text>"
        for value in _ticks(axes.low, axes.high)
        for y in [axes.y(value)]
    ]
    ends = [(1, "start")] if axes.count == 1 else [(1, "start"), (axes.count, "end")]
    middle = (axes.count + 1) // 2
    ends += [(middle, "middle")] if axes.count > 8 else []
    rows += [
        f"<text class=f-tick x={axes.x(rank):.1f} y={BOTTOM + 16} text-anchor={anchor}>{rank}</text>"
        for rank, anchor in ends
    ]
    return f"<path class=f-axis d='M{LEFT} {BOTTOM}H{RIGHT}'/>{''.join(rows)}"


def _marks(kind: Kind, axes: _Axes) -> str:
    xs = [axes.x(rank) for rank in kind.at]
    line = _points(xs, kind.middle, axes)
    held = axes.x(kind.held[1])
    parts = [f"<path class=f-mark d='M{held:.1f} {TOP}V{BOTTOM}'/>"] if kind.held[1] else []
    if kind.layers > 1:
        back = _points(xs[::-1], kind.low[::-1], axes)
        parts.append(f"<path class=f-band d='M{_points(xs, kind.high, axes)}L{back}Z'/>")
    parts.append(f"<path class=f-line d='M{line}'/>")
    if len(xs) <= 20:
        dots = zip(xs, kind.middle, strict=True)
        parts += [f"<circle class=f-dot cx={x:.1f} cy={axes.y(value):.1f} r=2.2 />" for x, value in dots]
    return "".join(parts)


def _points(xs: Sequence[float], values: Sequence[float], axes: _Axes) -> str:
    return "L".join(f"{x:.1f} {axes.y(value):.1f}" for x, value in zip(xs, values, strict=True))


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms, four at most; where there is but one, what lies between helps."""
    decades = range(math.ceil(low), math.floor(high) + 1)
    if len(decades) < 2:
        fine = [m * 10.0**e for e in range(math.floor(low), math.floor(high) + 1) for m in (1, 2, 5)]
        return [value for value in fine if low <= math.log10(value) <= high]
    step = -(-len(decades) // 4)
    return [10.0**decade for decade in decades][::-step][::-1]


def _table(kinds: Sequence[Kind], labels: dict[Kind, str]) -> str:
    rows = [
        [
            f"<span title='{text(kind.name)}'>{text(labels[kind])}</span>",
            *(_spread(span) for span in (kind.norm, kind.largest, kind.stable, kind.effective, kind.held)),
        ]
        for kind in kinds
    ]
    return table(["target", "|dW|>", "largest>", "stable rank>", "effective rank>", f"rank for {SHARE:.0%}>"], rows)


def _short(names: Sequence[str]) -> list[str]:
    """The ends of dotted names, as few parts as tell them apart, and never too long for a panel."""
    for count in range(1, 4):
        ends = [".".join(name.split(".")[-count:]) for name in names]
        if len(set(ends)) == len(ends):
            break
    return (
        [end if len(end) <= LABEL else f"{end[: LABEL // 3]}…{end[-LABEL * 2 // 3 + 1 :]}" for end in ends]
        if names
        else []
    )


def _spread(span: Span) -> str:
    low, high = map(_number, span)
    return low if low == high else f"{low}&ndash;{high}"


def _number(value: float) -> str:
    """Three digits: 0.0123, 1.2e-7."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, power = f"{value:.2g}".partition("e")
        return f"{mantissa}e{int(power)}" if power else mantissa
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
