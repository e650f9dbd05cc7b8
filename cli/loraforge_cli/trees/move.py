"""``loraforge tree move``."""

import click

from loraforge_cli.options import Session, common
from loraforge_cli.trees.common import open_tree, print_node, tree_argument


@click.command("move")
@tree_argument
@click.argument("node", metavar="NODE")
@click.argument("target", metavar="PATH")
@click.option("--keep-delta", is_flag=True, help="Onto another parent: the same update, on other weights.")
@common
def command(session: Session, *, tree: str, node: str, target: str, keep_delta: bool) -> None:
    """Give NODE, and all that grew on it, the path PATH.

    Under the same parent that is only a name. Under another one the weights change by the difference of the two paths,
    which --keep-delta says is meant; loraforge tree rebase keeps the weights instead.
    """
    opened = open_tree(session, tree)
    from loraforge.tree.reshape import move

    print_node(session, move(opened, node, target, keep_delta=keep_delta))
