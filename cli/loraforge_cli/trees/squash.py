"""``loraforge tree squash``."""

import click

from loraforge_cli.options import Session, common
from loraforge_cli.trees.common import open_tree, print_node, tree_argument


@click.command("squash")
@tree_argument
@click.argument("node", metavar="NODE")
@click.option("--onto", metavar="NODE", default="", help="Where the chain begins: atop this node (the base).")
@click.option("--rank", type=int, help="The best approximation of this rank instead, with its error.")
@click.option("--energy", type=float, help="The lowest rank that keeps this share of |dW|^2.")
@click.option("--force", is_flag=True, help="Even though what grew on NODE changes by that error.")
@common
def command(
    session: Session, *, tree: str, node: str, onto: str, rank: int | None, energy: float | None, force: bool
) -> None:
    """Make one node of the chain that ends in NODE, with the same weights to the bit; children keep theirs, too."""
    opened = open_tree(session, tree)
    from loraforge.tree.reshape import squash

    print_node(session, squash(opened, node, onto=onto, rank=rank, energy=energy, force=force))
