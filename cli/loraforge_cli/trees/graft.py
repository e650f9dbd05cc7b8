"""``loraforge tree graft``."""

import click

from loraforge_cli.options import SOURCE, Session, common, refuse_url
from loraforge_cli.trees.common import base_option, open_tree, print_node, tree_argument
from loraforge_registry.paths import is_path


@click.command("graft")
@tree_argument
@click.argument("node", metavar="NODE")
@click.argument("source", metavar="SOURCE", type=SOURCE)
@base_option
@common
def command(session: Session, *, tree: str, node: str, source: str, base: str | None) -> None:
    """Put the adapter SOURCE, trained elsewhere, into the tree as NODE; its record says that it was grafted.

    Its update then adds to whatever the node's parent is, whether or not it was trained for that.
    """
    refuse_url(source)
    opened = open_tree(session, tree)
    opened.base(base)
    from loraforge.tree.reshape import graft
    from loraforge_registry.manifest import Artifact

    store = opened.registry.store
    opened.check_free(node)
    with store.session():
        digest = opened.registry.push(source) if is_path(source) else store.resolve(source)
        print_node(session, graft(opened, node, Artifact(digest, store.manifest(digest).content_id)))
