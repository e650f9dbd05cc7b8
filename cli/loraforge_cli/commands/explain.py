"""``loraforge explain``: what an adapter is made of, by its numbers."""

from typing import TYPE_CHECKING

import click

from loraforge_cli.options import SOURCE, Session, common, refuse_url
from loraforge_cli.output import by_layer, emit, note, spread, table

if TYPE_CHECKING:
    from loraforge.compose import Explanation

_GOOD = 1e-5


@click.command("explain")
@click.argument("source", type=SOURCE)
@click.option("--among", multiple=True, type=SOURCE, metavar="SOURCE", help="Write it by these (repeatable).")
@click.option("--derived", is_flag=True, help="Also by adapters that were made from others.")
@click.option(
    "--most", type=click.IntRange(1, 1000), default=16, metavar="N", help="At most this many.", show_default=True
)
@common
def command(session: Session, *, source: str, among: tuple[str, ...], derived: bool, most: int) -> None:
    """Write an adapter as a weighted sum of others, by least squares on their updates, and say what is left over.

    The others are those with a name in the store, and those in its lineage, on the same base, that were not made from
    others. RESIDUAL is |dW - sum c dW_i| / |dW|: about 1e-7 is float32's rounding, 1 is nothing in common. Few are
    taken: always the one that explains most of what is left, until none explains a hundredth of that (orthogonal
    least squares).
    """
    for each in (source, *among):
        refuse_url(each)
    from loraforge.recipe import explain
    from loraforge.registry import Registry

    found = explain(source, Registry(session.store_path), among=among, derived=derived, most=most)
    if session.as_json:
        emit(_document(found))
        return
    if found.left_out:
        label, why = next(iter(found.left_out.items()))
        note(f"left out: {len(found.left_out)}, such as {label}: {why}", quiet=session.quiet)
    rows = [[f"{part.coefficient:.6g}", part.label, f"{part.size:.3g}"] for part in found.parts]
    if rows:
        click.echo(table(["COEFFICIENT>", "ADAPTER", "SIZE>"], rows) + "\n")
    click.echo(f"residual {found.residual:.3g} of |dW|, among {found.candidates} adapters")
    if found.residual > _GOOD and not session.quiet:
        click.echo("\n" + _left_over(found))


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
