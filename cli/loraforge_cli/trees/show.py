"""``loraforge tree show``."""

import click

from loraforge_cli.options import Session, common, stored
from loraforge_cli.output import emit, note
from loraforge_cli.tree_view import lines, view
from loraforge_cli.trees.common import tree_argument
from loraforge_registry.names import Reference


@click.command("show")
@tree_argument
@click.option("--format", "form", type=click.Choice(["text", "svg", "json"]), default="text", show_default=True)
@common
def command(session: Session, *, tree: str, form: str) -> None:
    """Show a tree: every node with its rank, size, loss and digest; svg is a picture for a file."""
    store = session.store()
    seen = view(store, stored(store, tree), Reference.parse(tree).ref)
    if session.as_json or form == "json":
        emit(seen.as_json())
    elif form == "svg":
        from loraforge_cli.tree_svg import svg

        click.echo(svg(seen), nl=False)
    else:
        click.echo("\n".join(lines(seen)))
        if not seen.nodes:
            note(f"no nodes yet: loraforge tree grow {tree} NODE --data FILE", quiet=session.quiet)
