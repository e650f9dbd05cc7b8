"""``loraforge explain``: what an adapter is made of, by its numbers."""

from typing import TYPE_CHECKING

import click

from loraforge_cli.options import SOURCE, Session, common, refuse_url
from loraforge_cli.output import by_layer, emit, note, spread, table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraforge.compose import Explanation

_GOOD = 1e-5
_COLUMNS = 5


@click.command("explain")
@click.argument("source", type=SOURCE)
@click.option("--among", multiple=True, type=SOURCE, metavar="SOURCE", help="Write it by these (repeatable).")
@click.option("--derived", is_flag=True, help="Also by adapters that were made from others.")
@click.option(
    "--most", type=click.IntRange(1, 1000), default=16, metavar="N", help="At most this many.", show_default=True
)
@click.option("--layers", is_flag=True, help="Each layer for itself: a gradient has other coefficients in each.")
@common
def command(session: Session, *, source: str, among: tuple[str, ...], derived: bool, most: int, layers: bool) -> None:
    """Write an adapter as a weighted sum of others, by least squares on their updates, and say what is left over.

    The others are those with a name in the store, and those in its lineage, on the same base, that were not made from
    others. RESIDUAL is |dW - sum c dW_i| / |dW|: about 1e-7 is float32's rounding, 1 is nothing in common. Few are
    taken: always the one that explains most of what is left, until none explains a hundredth of that (orthogonal
    least squares).
    """
    for each in (source, *among):
        refuse_url(each)
    from loraforge.recipe import explain, explain_layers
    from loraforge.registry import Registry

    if layers:
        by = explain_layers(source, Registry(session.store_path), among=among, derived=derived, most=most)
        _show_layers(session, by)
        return
    found = explain(source, Registry(session.store_path), among=among, derived=derived, most=most)
    if session.as_json:
        emit(_document(found))
        return
    _say_left_out(session, found)
    rows = [[f"{part.coefficient:.6g}", part.label, f"{part.size:.3g}"] for part in found.parts]
    if rows:
        click.echo(table(["COEFFICIENT>", "ADAPTER", "SIZE>"], rows) + "\n")
    click.echo(f"residual {found.residual:.3g} of |dW|, among {found.candidates} adapters")
    if found.residual > _GOOD and not session.quiet:
        click.echo("\n" + _left_over(found))


def _say_left_out(session: Session, found: "Explanation") -> None:
    if found.left_out:
        label, why = next(iter(found.left_out.items()))
        note(f"left out: {len(found.left_out)}, such as {label}: {why}", quiet=session.quiet)


def _show_layers(session: Session, found: "Mapping[int | None, Explanation]") -> None:
    """One column for each adapter that any layer is made of, those that explain most first."""
    if session.as_json:
        emit({"layers": {str(layer) if layer is not None else "": _document(one) for layer, one in found.items()}})
        return
    _say_left_out(session, next(iter(found.values())))
    sizes: dict[str, float] = {}
    for one in found.values():
        for part in one.parts:
            sizes[part.label] = sizes.get(part.label, 0.0) + part.size
    shown = sorted(sizes, key=lambda label: -sizes[label])[:_COLUMNS]
    rows = []
    for layer, one in found.items():
        by = {part.label: f"{part.coefficient:.4g}" for part in one.parts}
        rows.append(
            ["-" if layer is None else str(layer), *(by.get(label, "") for label in shown), f"{one.residual:.3g}"]
        )
    click.echo(table(["LAYER>", *(f"{label}>" for label in shown), "RESIDUAL>"], rows))
    if len(sizes) > len(shown):
        note(f"and {len(sizes) - len(shown)} more adapters: --json has all", quiet=session.quiet)


def _document(found: "Explanation") -> dict[str, object]:
    return {
        "parts": [{"source": p.label, "coefficient": p.coefficient, "size": p.size} for p in found.parts],
        "residual": found.residual,
        "targets": dict(found.targets),
        "candidates": found.candidates,
        "left_out": dict(found.left_out),
    }


def _left_over(found: "Explanation") -> str:
    groups = by_layer(found.targets)
    rows = [[label, str(len(names)), spread(found.targets[name] for name in names)] for label, names in groups.items()]
    return table(["TARGET", "N>", "RESIDUAL>"], rows)
