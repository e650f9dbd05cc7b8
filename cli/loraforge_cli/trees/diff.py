"""``loraforge tree diff``."""

import click

from loraforge_cli.options import Session, common, stored
from loraforge_cli.output import emit, table
from loraforge_cli.trees.common import open_tree, tree_argument
from loraforge_registry.digest import Digest


@click.command("diff")
@tree_argument
@click.argument("first", metavar="NODE|OTHER")
@click.argument("second", metavar="[NODE]", required=False)
@common
def command(session: Session, *, tree: str, first: str, second: str | None) -> None:
    """Show how two nodes of a tree differ, each with all that is below it; or how a tree differs from an OTHER one.

    \b
    loraforge tree diff law-tree french/law french/medicine
    loraforge tree diff law-tree:v1 law-tree
    """  # noqa: D301 - click's mark for lines to leave as they are
    if second is None:
        _trees(session, tree, first)
        return
    opened = open_tree(session, tree)
    from loraforge.compose import compare, exact_sum, overall

    base = opened.record.base_name
    one, other = (
        exact_sum([(adapter, 1.0) for adapter in opened.adapters(opened.node(node).path)], base=base)
        for node in (first, second)
    )
    rows = compare(one, other)
    if session.as_json:
        targets = {
            row.target: {"norm_before": row.norm_before, "norm_after": row.norm_after, "relative": row.relative}
            for row in rows
        }
        emit({"difference": overall(rows), "targets": targets})
        return
    from loraforge_cli.commands.diff import table_of

    click.echo(f"{first} and {second}: the sums of their paths differ by {overall(rows):.3g} of |dW|\n")
    click.echo(table_of(rows, every=False))


def _trees(session: Session, before: str, after: str) -> None:
    store = session.store()
    one, other = (store.tree(stored(store, name)) for name in (before, after))
    paths = sorted(path for path in {*one.nodes, *other.nodes} if one.nodes.get(path) != other.nodes.get(path))
    if session.as_json:
        changes = {path: [_spelt(one.nodes.get(path)), _spelt(other.nodes.get(path))] for path in paths}
        emit({"same_base": one.base == other.base, "nodes": changes})
        return
    if one.base != other.base:
        click.echo(f"the bases differ: sha256:{one.base.short} and sha256:{other.base.short}")
    rows = [[path, _short(one.nodes.get(path)), _short(other.nodes.get(path))] for path in paths]
    click.echo(table(["NODE", "BEFORE", "AFTER"], rows) if rows else "the same nodes")


def _spelt(digest: Digest | None) -> str | None:
    return None if digest is None else str(digest)


def _short(digest: Digest | None) -> str:
    return "-" if digest is None else digest.short
