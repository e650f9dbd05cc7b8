"""``loraforge tag``: another name."""

import click

from loraforge_cli.options import SOURCE, Session, common, stored
from loraforge_cli.output import emit
from loraforge_registry.names import RefName


@click.command("tag")
@click.argument("source", type=SOURCE)
@click.argument("name", metavar="NAME[:TAG]")
@click.option("--force", is_flag=True, help="Move a tag that means another adapter.")
@common
def command(session: Session, *, source: str, name: str, force: bool) -> None:
    """Give the adapter SOURCE the name NAME:TAG as well."""
    store = session.store()
    digest, ref = stored(store, source), RefName.parse(name)
    store.tag(digest, ref, force=force)
    if session.as_json:
        emit({"digest": str(digest), "name": ref.name, "tag": ref.tag})
    else:
        click.echo(f"{ref}  sha256:{digest.short}")
