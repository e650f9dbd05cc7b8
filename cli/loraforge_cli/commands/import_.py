"""``loraforge import``: what ``export`` wrote, into the store."""

import click

from loraforge_cli.options import Session, common, refuse_url
from loraforge_cli.output import emit, note
from loraforge_registry.names import RefName


@click.command("import")
@click.argument("source", metavar="FILE")
@click.option("--as", "name", metavar="NAME[:TAG]", help="What to call its only adapter, instead of the name in it.")
@click.option("--force", is_flag=True, help="Move tags that mean other adapters.")
@common
def command(session: Session, *, source: str, name: str | None, force: bool) -> None:
    """Store the adapters in FILE, with their lineage and names, every byte checked.

    A file that is damaged, or that holds what push would refuse, changes nothing.
    """
    refuse_url(source)
    ref = None if name is None else RefName.parse(name)
    roots, names = session.store().import_bundle(source, name=ref, force=force)
    if session.as_json:
        named = [{"name": ref.name, "tag": ref.tag, "digest": str(digest)} for ref, digest in names.items()]
        emit({"digests": [str(root) for root in roots], "names": named})
        return
    for ref, digest in names.items():
        click.echo(f"{ref}  sha256:{digest.short}")
    for root in set(roots) - set(names.values()):
        click.echo(f"sha256:{root.short}")
        note(f"without a name, a gc takes it: loraforge tag sha256:{root.short} NAME:TAG", quiet=session.quiet)
