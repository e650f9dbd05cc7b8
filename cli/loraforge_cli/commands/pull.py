"""``loraforge pull``: a stored adapter as a plain directory."""

import click

from loraforge_cli.describe import describe
from loraforge_cli.options import SOURCE, Session, common, refuse_url, stored
from loraforge_cli.output import emit, one_line
from loraforge_cli.summary import line
from loraforge_cli.tree_view import is_tree, print_tree, view
from loraforge_registry.paths import expand


@click.command("pull")
@click.argument("name", type=SOURCE)
@click.option("--to", "target", metavar="DIR", required=True, help="The directory to make.")
@common
def command(session: Session, *, name: str, target: str) -> None:
    """Write a stored adapter as a directory that PEFT loads, every byte checked; a tree as one for each path.

    DIR must be new, empty, or hold this adapter already.
    """
    refuse_url(name)
    store = session.store()
    digest = stored(store, name)
    if not target:
        raise click.UsageError("--to is empty; name a new directory")
    store.export(digest, expand(target))
    if is_tree(store, digest):
        print_tree(session, view(store, digest), directory=target)
        return
    described = describe(store, digest)
    if session.as_json:
        emit({**described.as_json(), "directory": target})
    else:
        click.echo(f"{one_line(target)}  {line(described)}")
