"""``loraforge export``: artifacts and their lineage as one file."""

import click

from loraforge_cli.options import SOURCE, Session, common, stored
from loraforge_cli.output import emit, many, one_line, size
from loraforge_registry.names import Reference


@click.command("export")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=SOURCE)
@click.argument("target", metavar="FILE")
@common
def command(session: Session, *, sources: tuple[str, ...], target: str) -> None:
    """Write adapters, with all that they were made from, into one file for: loraforge import FILE.

    The same adapters give the same bytes. Names travel along where a SOURCE is one.
    """
    if not target or "://" in target:
        raise click.UsageError(f"{target!r}: name a file to write, for instance adapters.lf")
    store = session.store()
    found = {source: stored(store, source) for source in sources}
    refs = {ref: digest for source, digest in found.items() if (ref := Reference.parse(source).ref) is not None}
    written = store.export_bundle(list(found.values()), refs, target)
    if session.as_json:
        emit({"file": target, "size": written, "digests": sorted({str(digest) for digest in found.values()})})
    else:
        click.echo(f"{one_line(target)}  {size(written)}, {many(len(set(found.values())), 'adapter')}, with lineage")
