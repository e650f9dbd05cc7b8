"""``loraforge tree log``."""

import click

from loraforge_cli.commands.log import show_moves
from loraforge_cli.options import Session, common, stored
from loraforge_cli.trees.common import tree_argument
from loraforge_registry.names import Reference


@click.command("log")
@tree_argument
@common
def command(session: Session, *, tree: str) -> None:
    """Show what was done to a tree, newest first.

    A state comes back until a gc: loraforge tag sha256:FROM TREE --force.
    """
    store = session.store()
    store.tree(stored(store, tree))
    name = Reference.parse(tree).ref
    moves = store.reflog(tree.partition("@")[0] if name is None else name.name)
    show_moves(session, [move for move in moves if name is None or move.tag == name.tag])
