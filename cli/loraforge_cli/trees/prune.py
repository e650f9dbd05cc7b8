"""``loraforge tree prune``."""

import click

from loraforge_cli.options import Session, common
from loraforge_cli.output import emit, note
from loraforge_cli.trees.common import open_tree, tree_argument


@click.command("prune")
@tree_argument
@click.argument("node", metavar="NODE")
@click.option("-r", "--recursive", is_flag=True, help="And all that grew on it.")
@common
def command(session: Session, *, tree: str, node: str, recursive: bool) -> None:
    """Take NODE out of the tree; it stays in the store until a gc."""
    opened = open_tree(session, tree)
    from loraforge.tree.reshape import prune

    before = opened.digest
    gone = prune(opened, node, recursive=recursive)
    if session.as_json:
        emit({"digest": str(opened.digest), "pruned": gone, "before": str(before)})
        return
    for path in gone:
        click.echo(f"{path}  gone")
    note(f"back until a gc with: loraforge tag sha256:{before.short} {opened.ref} --force", quiet=session.quiet)
