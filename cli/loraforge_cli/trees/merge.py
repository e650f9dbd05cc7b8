"""``loraforge tree merge``."""

import click

from loraforge_cli.options import Session, common
from loraforge_cli.trees.common import base_option, open_tree, tree_argument


@click.command("merge")
@tree_argument
@click.argument("node", metavar="NODE")
@click.option("--out", metavar="DIR", required=True, help="The directory to make.")
@click.option("--no-receipt", is_flag=True, help="Faster, without digests; cannot be unmerged or verified.")
@base_option
@common
def command(session: Session, *, tree: str, node: str, out: str, no_receipt: bool, base: str | None) -> None:
    """Write the base with NODE and all below it merged in, rounded once; unmerge takes it back bit for bit."""
    opened = open_tree(session, tree)
    from loraforge_cli.merging import print_merge, progress_bar

    opened.node(node)
    opened.base(base)
    with progress_bar(session, "merging") as progress:
        result = opened.merge(node, out, receipt=not no_receipt, progress=progress)
    print_merge(session, result)
