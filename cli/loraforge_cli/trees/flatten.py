"""``loraforge tree flatten``."""

import click

from loraforge_cli.options import Session, common
from loraforge_cli.trees.common import open_tree, tree_argument
from loraforge_registry.names import RefName


@click.command("flatten")
@tree_argument
@click.argument("node", metavar="NODE")
@click.option("--as", "name", metavar="NAME[:TAG]", required=True, help="What to call it.")
@click.option("--rank", type=int, help="The best approximation of this rank, with its error.")
@click.option("--energy", type=float, help="The lowest rank that keeps this share of |dW|^2.")
@click.option("--force", is_flag=True, help="Move a tag that means another adapter.")
@common
def command(
    session: Session, *, tree: str, node: str, name: str, rank: int | None, energy: float | None, force: bool
) -> None:
    """Make one plain adapter on the base of NODE and all that is below it; PEFT loads it.

    Merged, it gives the node's weights to the bit; with --rank or --energy the nearest, with the error.
    """
    ref = RefName.parse(name)
    opened = open_tree(session, tree)
    from loraforge.compose import Reranked
    from loraforge_cli.sources import print_result, store_result

    found = opened.flatten(node, rank=rank, energy=energy)
    adapter, report = (found.adapter, found.report) if isinstance(found, Reranked) else (found, None)
    print_result(session, store_result(session, adapter, [], ref, report, force=force), report)
