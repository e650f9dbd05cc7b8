"""``loraforge rm``: take a name away."""

import click

from loraforge_cli.options import SOURCE, Session, common
from loraforge_cli.output import emit
from loraforge_registry.names import RefName


@click.command("rm")
@click.argument("names", metavar="NAME[:TAG]...", nargs=-1, required=True, type=SOURCE)
@common
def command(session: Session, *, names: tuple[str, ...]) -> None:
    """Take names away.

    The adapters stay in the store until a gc, and come back with: loraforge tag sha256:DIGEST NAME:TAG.
    """
    store = session.store()
    refs = list(dict.fromkeys(RefName.parse(name) for name in names))
    for ref in refs:
        store.resolve(str(ref))  # all are there, or none is removed
    removed = [(ref, store.remove(ref)) for ref in refs]
    if session.as_json:
        emit([{"name": ref.name, "tag": ref.tag, "digest": str(digest)} for ref, digest in removed])
    else:
        for ref, digest in removed:
            click.echo(f"removed {ref}  sha256:{digest.short}")
