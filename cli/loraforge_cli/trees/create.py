"""``loraforge tree create``."""

import click

from loraforge_cli.options import Session, common, refuse_url
from loraforge_cli.output import emit
from loraforge_cli.trees.common import tree_argument


@click.command("create")
@tree_argument
@click.option("--base", metavar="DIR", required=True, help="The base checkpoint.")
@common
def command(session: Session, *, tree: str, base: str) -> None:
    """Make a tree without nodes on a base, which it knows by its content from then on."""
    refuse_url(base)
    from loraforge.registry import Registry
    from loraforge.tree import Tree

    made = Tree.create(Registry(session.store_path), tree, base)
    if session.as_json:
        emit({"digest": str(made.digest), "name": tree, "base": {"digest": str(made.record.base), "name": base}})
    else:
        click.echo(f"{made.ref}  sha256:{made.digest.short}  on {base}, tensors sha256:{made.record.base.short}")
