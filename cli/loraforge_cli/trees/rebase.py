"""``loraforge tree rebase``."""

import click

from loraforge_cli.options import Session, common
from loraforge_cli.trees.common import base_option, open_tree, print_node, tree_argument


@click.command("rebase")
@tree_argument
@click.argument("node", metavar="NODE")
@click.option("--onto", metavar="NODE", default="", show_default="the base", help="What it shall stand on.")
@click.option("--rank", type=int, help="The best approximation of this rank, with its error.")
@click.option("--energy", type=float, help="The lowest rank that keeps this share of |dW|^2.")
@click.option("--force", is_flag=True, help="Even though what grew on NODE changes.")
@click.option("--retrain", is_flag=True, help="Train it again, on the same data with the same settings.")
@click.option("--data", metavar="PATH", help="With --retrain: where the data is.")
@base_option
@common
def command(
    session: Session,
    *,
    tree: str,
    node: str,
    onto: str,
    rank: int | None,
    energy: float | None,
    force: bool,
    retrain: bool,
    data: str | None,
    base: str | None,
) -> None:
    """Put NODE onto another node, with the same weights: its update becomes what lies between the two.

    Exact to the bit, at the sum of the ranks that differ; with --rank or --energy re-ranked, with the error. With
    --retrain it is trained anew atop the other node instead, from the settings in its record.
    """
    if retrain != (data is not None):
        raise click.UsageError("--retrain and --data go together: the record has the data's digest, not the data")
    if retrain and (rank is not None or energy is not None):
        raise click.UsageError("a node that is trained again keeps its rank: leave --rank and --energy out")
    opened = open_tree(session, tree)
    if data is not None:
        from loraforge_cli.tree_retrain import retrain as train_again

        print_node(session, train_again(session, opened, node, onto, data, base=base, force=force))
        return
    from loraforge.tree.reshape import rebase

    print_node(session, rebase(opened, node, onto, rank=rank, energy=energy, force=force))
