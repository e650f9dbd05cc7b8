"""What people look at: tables of 80 columns, sizes, text that a terminal cannot be fooled by."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence

import click

from loraforge_registry.words import elide

WIDTH = 80
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def emit(value: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, sort_keys=True))  # ASCII: a path may hold bytes that are no text


def one_line(text: str) -> str:
    """Escape what would break a line or move a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows in aligned columns; where 80 are not enough, the widest columns give way.

    A column whose header ends in ``>`` is aligned to the right.
    """
    names = [name.removesuffix(">") for name in header]
    cells = [names, *[[one_line(cell) for cell in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths[widths.index(max(widths))] -= 1
    align = [str.rjust if name.endswith(">") else str.ljust for name in header]
    return "\n".join(
        "  ".join(put(elide(cell, w), w) for put, cell, w in zip(align, row, widths, strict=True)).rstrip()
        for row in cells
    )


def size(number: int) -> str:
    """Return bytes as people say them: powers of 1000, three digits."""
    return f"{_scaled(number)}B" if number >= 1000 else f"{number} B"


def many(number: int, what: str) -> str:
    """Return ``1 file``, ``2 files``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def count(number: int) -> str:
    """Return a number as people say it: 1.2M."""
    return _scaled(number).replace(" ", "") if number >= 1000 else str(number)


def spread(values: Iterable[float]) -> str:
    """Return one number, or the smallest and largest of several that differ."""
    low, high = min(found := [f"{value:.3g}" for value in values], key=float), max(found, key=float)
    return low if low == high else f"{low}..{high}"


def by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Group module paths that differ only in their numbers: ``model.layers.*.mlp.up_proj``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("*", name), []).append(name)
    return {key if len(found) > 1 else found[0]: found for key, found in groups.items()}


def facts(pairs: Mapping[str, str | None]) -> str:
    """Return labelled lines, without those that have nothing to say."""
    said = {key: value for key, value in pairs.items() if value}
    width = max(map(len, said), default=0)
    return "\n".join(f"{key.ljust(width)}  {one_line(value)}" for key, value in said.items())


def note(text: str, *, quiet: bool = False) -> None:
    """Say something that is not the result, on stderr."""
    if not quiet:
        click.echo(one_line(text), err=True)


def _scaled(number: int) -> str:
    value, units = float(number), iter(["", "k", "M", "G", "T", "P"])
    unit = next(units)
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}"
